"""`mergevq decode`: a token file to images."""

from pathlib import Path
from typing import Annotated

import tyro

from mergevq.cli.models import TokenizerOf
from mergevq.cli.options import check_batch_size, choose_device, counted, progress


def decode(
    tokens: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.mvq")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")],
    model: TokenizerOf,
    predict_source: bool = False,
    batch_size: int = 16,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Decode a token file to PNG images, named 0000.png, 0001.png and so on in the order of encoding.

    Args:
        tokens: Token file (.mvq).
        out: Folder for the images.
        model: The tokenizer that made the tokens.
        predict_source: Ignore the stored source maps and let the model predict them from the tokens.
        batch_size: Images at a time.
        device: auto, cpu, cuda, cuda:1, ...
        force: Write into a folder that holds files already; files of the same names are replaced.
    """
    from mergevq.data.images import write_images
    from mergevq.files import refuse_existing
    from mergevq.tokenizer.model import MergeVQ
    from mergevq.tokens import load_tokens

    check_batch_size(batch_size)
    refuse_existing(out, force)
    tok = MergeVQ.from_pretrained(model, device=choose_device(device))
    encoded = load_tokens(tokens, expect_tokenizer=tok.fingerprint())
    if predict_source:
        encoded = encoded.without_source()
    digits = max(4, len(str(len(encoded) - 1)))
    written = 0
    with progress("decode", len(encoded)) as advance:
        for start in range(0, len(encoded), batch_size):
            part = encoded[start : start + batch_size]
            names = [f"{start + i:0{digits}d}.png" for i in range(len(part))]
            write_images(out, tok.decode(part), names, force=force)
            written += len(names)
            advance(len(part))
    print(f"{out}: {counted(written, 'image')}")
