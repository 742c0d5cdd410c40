"""Which earlier tokens should MergeAR see? Trains one small generator for each rule, on the same tokens, and compares.

    python examples/compare_masks.py --tokenizer emoji_64 --out masks

Every run is resumable: start the command again after an interruption, and finished runs are read, not repeated. The
rules are those of docs/method.md; the two with the lowest held-out loss of the first seed get two more seeds.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

import mergevq
from mergevq.data.cache_writer import write_token_cache
from mergevq.data.embedded import EmbeddedImages
from mergevq.data.token_batches import evaluation_token_batches
from mergevq.data.token_cache import TokenCache
from mergevq.files import write_json
from mergevq.generator.config import MaskConfig
from mergevq.generator.masks import merge_mask
from mergevq.training.generator_config import GeneratorRun


def rules(columns: int) -> dict[str, MaskConfig]:
    """The rules that are compared; `columns` is the width of the patch grid."""
    return {
        "R = 2, first (paper)": MaskConfig(),
        "plain causal": MaskConfig(recent=None),
        "R = 1": MaskConfig(recent=1),
        "R = 8": MaskConfig(recent=8),
        f"R = {columns}, one row of the grid": MaskConfig(recent=columns),
        "keep last": MaskConfig(keep="last"),
        f"R = {columns}, keep last": MaskConfig(recent=columns, keep="last"),
        "proportional": MaskConfig(proportional=True),
        "duplicates by source": MaskConfig(duplicate="source"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default="emoji_64", help="a tokenizer of 64 pixels (default: %(default)s)")
    parser.add_argument("--num-tokens", default="64,100,144", help="K's to train on (default: %(default)s)")
    parser.add_argument("--preset", default="s_64", help="generator preset (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the two best rules (default: %(default)s)")
    parser.add_argument("--only", default="", help="only rules that contain one of these words, with commas between")
    parser.add_argument("--images", type=int, default=None, help="only so many images of each part, for a quick look")
    parser.add_argument("--out", type=Path, default=Path("masks"), help="folder of caches and runs")
    options = parser.parse_args(arguments)

    tok = mergevq.MergeVQ.from_pretrained(options.tokenizer)
    counts = tuple(map(int, options.num_tokens.split(",")))
    caches = {}
    for part, views in (("train", ("crop", "flip")), ("val", ("crop",))):
        folder = options.out / part
        if not (folder / "manifest.json").exists():
            images = EmbeddedImages(part)
            if options.images is not None:  # Evenly spread: they are sorted by class.
                images = images.select(range(0, len(images), max(1, len(images) // options.images)))
            write_token_cache(tok, images, folder, num_tokens=counts, views=views)
        caches[part] = TokenCache(folder, tok.fingerprint())
    index = held_out_index(caches["val"], counts)

    words = [word for word in options.only.split(",") if word]
    compared = {name: mask for name, mask in rules(caches["val"].grid[1]).items() if chosen(name, words)}
    losses: dict[str, list[dict[str, float]]] = {name: [] for name in compared}
    for name in compared:
        losses[name].append(train(name, compared[name], 0, caches, counts, options))
    best = sorted(compared, key=lambda name: losses[name][0]["loss"])[:2]
    for name in best:
        for seed in range(1, options.seeds):
            losses[name].append(train(name, compared[name], seed, caches, counts, options))

    rows = []
    for name, mask in compared.items():
        causal = index.shape[1] * (index.shape[1] - 1) / 2
        seen = merge_mask(index, mask).sum().item() / len(index) / causal
        found = losses[name]
        rows.append(
            {
                "rule": name,
                "seeds": len(found),
                "loss": mean(f["loss"] for f in found),
                "lowest": min(f["loss"] for f in found),
                "highest": max(f["loss"] for f in found),
                "first": mean(f["first"] for f in found),
                "duplicate": mean(f["duplicate"] for f in found),
                "keys seen": seen,
            }
        )
    write_json(options.out / "masks.json", {"steps": options.steps, "num_tokens": counts, "rows": rows})
    print("| rule | seeds | held-out loss | lowest - highest | first of a kind | duplicates | keys seen |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(rows, key=lambda row: row["loss"]):
        print(
            f"| {row['rule']} | {row['seeds']} | {row['loss']:.4f} | {row['lowest']:.4f} - {row['highest']:.4f} | "
            f"{row['first']:.4f} | {row['duplicate']:.4f} | {row['keys seen']:.2f} |"
        )


def chosen(name: str, words: Sequence[str]) -> bool:
    return not words or any(word in name for word in words)


def held_out_index(cache: TokenCache, counts: Sequence[int]) -> torch.Tensor:
    """The unmerged indices of some held-out images at the middle K, for counting what each rule sees."""
    middle = sorted(counts)[len(counts) // 2]
    batch = next(evaluation_token_batches(cache, batch_size=64, num_tokens=middle, view="crop"))
    return batch["index"].gather(1, batch["source"])


def train(
    name: str,
    mask: MaskConfig,
    seed: int,
    caches: dict[str, TokenCache],
    counts: tuple[int, ...],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Trains one rule with one seed, goes on, or reads what was found; returns the means over K of the last losses."""
    words = "".join(c if c.isalnum() else "_" for c in name)
    out = options.out / f"{words}_{seed}"
    preset: GeneratorRun = mergevq.presets.generator(options.preset)
    run = replace(
        preset,
        model=replace(preset.model, mask=mask),
        # The preset's are for ten times as long: averages would still hold the beginning.
        optim=replace(
            preset.optim,
            warmup_steps=min(preset.optim.warmup_steps, options.steps // 10),
            ema_decay=min(preset.optim.ema_decay, max(0.0, 1 - 20 / options.steps)),
        ),
        loop=replace(
            preset.loop,
            steps=options.steps,
            minutes=0.0,
            batch_size=options.batch_size,
            accumulate=1,
            num_tokens=counts,
            num_tokens_probs=(),
            val_num_tokens=counts,
            val_every=options.steps,
            val_images=caches["val"].num_images,
            save_every=max(1, options.steps // 5),
            seed=seed,
        ),
    )
    if not finished(out, options.steps):
        resume = (out / "state" / "state.json").exists()
        mergevq.train_generator(run, out, cache=caches["train"], val_cache=caches["val"], resume=resume)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "val" and record["step"] == options.steps]
    return {key: mean(record[key] for record in last) for key in ("loss", "first", "duplicate")}


def finished(out: Path, steps: int) -> bool:
    log = out / "log.jsonl"
    if not log.exists():
        return False
    return any(r["kind"] == "val" and r["step"] == steps for r in map(json.loads, log.read_text().splitlines()))


if __name__ == "__main__":
    main()
