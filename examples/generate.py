"""One row of generated images for each class, one column for each guidance scale; and what the merge cache saves.

    python examples/generate.py --classes flags,food_drink,smileys_emotion --guidance 1,2,4 --out generated.png

The same images are sampled twice: with a cache that keeps every key and value, and with the one that drops duplicates.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import mergevq
from mergevq.evaluation.token_map import contact_sheet


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="emoji_64", help="a MergeAR: file, run, name or hub id (%(default)s)")
    parser.add_argument("--tokenizer", default="emoji_64", help="the tokenizer it was trained with (%(default)s)")
    parser.add_argument("--classes", default="", help="names or numbers with commas between; all if not given")
    parser.add_argument("--guidance", default="1,2,4", help="scales (default: %(default)s)")
    parser.add_argument("--num-tokens", type=int, default=None, help="K; the generator's own if not given")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("generated.png"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)

    gen = mergevq.MergeAR.from_pretrained(options.generator)
    tok = mergevq.MergeVQ.from_pretrained(options.tokenizer)
    gen.check_tokens_of(grid=None, num_bits=tok.config.num_bits, tokenizer=tok.fingerprint())
    words = [word for word in options.classes.split(",") if word]
    classes = [int(word) if word.isdigit() else word for word in words] or list(range(gen.config.num_classes))

    columns = []
    for guidance in map(float, options.guidance.split(",")):
        found = {}
        for cache in ("full", "merge"):
            # The noise of an image comes from its seed alone, so all columns and both caches share it.
            rng = torch.Generator().manual_seed(options.seed)
            found[cache] = gen.generate_with_stats(
                classes, num_tokens=options.num_tokens, guidance=guidance, cache=cache, rng=rng
            )
        full, merge = found["full"][0], found["merge"][0]
        same = sum(bool(torch.equal(a, b)) for a, b in zip(full.full_index(), merge.full_index(), strict=True))
        distinct = float(merge.num_tokens.double().mean())
        costs = [f"{name} cache {c.cache_bytes / 2**20:.1f} MiB, {c.seconds:.1f} s" for name, (_, c) in found.items()]
        print(
            f"guidance {guidance:g}: {distinct:.0f} of {merge.num_patches} tokens are distinct; {'; '.join(costs)}; "
            f"{same} of {len(merge)} images equal"
        )
        columns.append(tok.decode(merge))
    names = gen.config.class_names
    titles = [names[c] if isinstance(c, int) and names else str(c) for c in classes]
    rows = [[column[i] for column in columns] for i in range(len(classes))]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, [f"guidance {s}" for s in options.guidance.split(",")], titles, cell=128).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
