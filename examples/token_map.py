"""Which patches became one token: a row for each image, its token maps at several K.

    python examples/token_map.py --model runs/small/model.safetensors --num-tokens 144,64,16 --out token_map.png

Each kept token is painted in the mean colour of its patches. Without --model the weights are random; merging then still
follows the image, because similar patches have similar keys whatever the weights.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import mergevq
from mergevq.data.embedded import EmbeddedImages
from mergevq.data.loader import evaluation_batches
from mergevq.evaluation.token_map import contact_sheet, draw_token_map


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model file, the folder of a run, or a hub id; random weights if not given")
    parser.add_argument("--num-tokens", default="144,64,16", help="numbers of kept tokens (default: %(default)s)")
    parser.add_argument("--images", type=int, default=6, help="how many held-out images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("token_map.png"), help="a picture (default: %(default)s)")
    options = parser.parse_args(arguments)

    if options.model:
        tok = mergevq.MergeVQ.from_pretrained(options.model)
    else:
        torch.manual_seed(0)
        tok = mergevq.MergeVQ(mergevq.presets.tiny().model).eval()

    # Of your own images: mergevq.read_images("photos/", size=tok.config.image_size)
    held_out = evaluation_batches(
        EmbeddedImages("val"), tok.config.image_size, batch_size=options.images, limit=options.images
    )
    images = next(held_out)["image"]

    rows = [[image] for image in images]
    titles = ["image"]
    for num_tokens in map(int, options.num_tokens.split(",")):
        tokens = tok.encode(images, num_tokens)
        assert tokens.source is not None  # encode always gives one
        for row, image, source in zip(rows, images, tokens.source.index, strict=True):
            row.append(draw_token_map(image, source, tokens.grid, scale=3))
        largest = int(tokens.source.sizes().max())
        titles.append(f"K = {num_tokens}\nlargest token: {largest} patches")

    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, titles).save(options.out)
    print(f"{options.out}: {len(rows)} images, L = {tokens.num_patches} patches")


if __name__ == "__main__":
    main()
