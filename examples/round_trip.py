"""Images to tokens, tokens to a file, the file to images: everything that decoding needs is in the file.

    python examples/round_trip.py --model runs/small/model.safetensors --num-tokens 144,64 --out round_trip

Without --model the weights are random: all steps run, but what comes back is noise.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import mergevq
from mergevq.data.embedded import EmbeddedImages
from mergevq.data.loader import evaluation_batches
from mergevq.metrics.image import psnr


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model file, the folder of a run, or a hub id; random weights if not given")
    parser.add_argument("--num-tokens", default="144,64", help="numbers of kept tokens (default: %(default)s)")
    parser.add_argument("--images", type=int, default=8, help="how many held-out images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("round_trip"), help="a new folder (default: %(default)s)")
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
    mergevq.write_images(options.out / "original", images)

    for num_tokens in map(int, options.num_tokens.split(",")):
        tokens = tok.encode(images, num_tokens)
        path = options.out / f"{num_tokens}.mvq"
        mergevq.save_tokens(path, tokens)

        # Another process, or another machine with the same model, starts here.
        tokens = mergevq.load_tokens(path, expect_tokenizer=tok.fingerprint())
        drawn = tok.decode(tokens)
        mergevq.write_images(options.out / str(num_tokens), drawn)

        bits = tokens.bits_per_image()
        print(
            f"K = {num_tokens}: {int(bits.index[0])} + {int(bits.source[0])} bits an image (indices + source map), "
            f"{path.stat().st_size} bytes in the file, PSNR {float(psnr(drawn, images).mean()):.2f} dB"
        )


if __name__ == "__main__":
    main()
