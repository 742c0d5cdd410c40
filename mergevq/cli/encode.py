"""`mergevq encode`: images to a token file."""

from pathlib import Path
from typing import Annotated

import tyro

from mergevq.cli.models import Tokenizer
from mergevq.cli.options import (
    Counts,
    Size,
    check_at_least_one,
    check_batch_size,
    check_source,
    choose_device,
    choose_size,
    counted,
    progress,
)
from mergevq.errors import ConfigError, TokenFileError


def encode(
    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE.mvq")],
    model: Tokenizer,
    num_tokens: Counts = (),
    size: Size = None,
    batch_size: int = 16,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Encode images to a token file, and print its bits per image.

    Args:
        images: An image, a folder of images, or a .zip of images; they are taken in the order of their names.
        out: Token file to write.
        model: The tokenizer.
        num_tokens: Kept tokens of every image.
        size: Side in pixels: the short side is resized to it, the middle is cut out.
        batch_size: Images at a time.
        device: auto, cpu, cuda, cuda:1, ...
        force: Overwrite the output.
    """
    check_source(images, "an image, a folder of images or a .zip")
    check_batch_size(batch_size)
    check_at_least_one("--num-tokens", *num_tokens)
    if len(num_tokens) > 1:
        raise ConfigError(f"expected one K for a token file, got {len(num_tokens)}: write one file for each")

    from mergevq.data.folder import ImageFolder
    from mergevq.data.images import SUFFIXES, read_images
    from mergevq.data.loader import evaluation_batches
    from mergevq.files import refuse_existing
    from mergevq.tokenizer.model import MergeVQ
    from mergevq.tokens import MergedTokens, save_tokens

    if out.suffix != ".mvq":
        raise TokenFileError(f"expected a token file that ends in .mvq, got {out}")
    refuse_existing(out, force)
    single = images.suffix.lower() in SUFFIXES and not images.is_dir()
    data = None if single else ImageFolder(images)
    device = choose_device(device)
    tok = MergeVQ.from_pretrained(model, device=device)
    side, k = choose_size(tok.config, size, num_tokens), num_tokens[0] if num_tokens else None
    if data is None:
        batches, total = iter([{"image": read_images([images], side)}]), 1
    else:
        batches, total = evaluation_batches(data, side, batch_size=batch_size, workers=2), len(data)
    parts = []
    with progress("encode", total) as advance:
        for batch in batches:
            parts.append(tok.encode(batch["image"].to(device), k).to("cpu"))
            advance(len(batch["image"]))
    tokens = MergedTokens.join(parts)
    save_tokens(out, tokens, force=force)

    bits = tokens.bits_per_image()
    left_out = f", {total - len(tokens)} unreadable left out" if len(tokens) < total else ""
    print(f"{out}: {counted(len(tokens), 'image')} of {side} x {side} pixels{left_out}")
    print(f"{int(tokens.num_tokens[0])} of {tokens.num_patches} tokens an image, {tokens.num_bits} bits a token")
    print(f"{int(bits.total[0]):,} bits an image: {int(bits.index[0]):,} index + {int(bits.source[0]):,} source map")
    print(f"{out.stat().st_size:,} bytes in the file")
