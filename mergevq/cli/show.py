"""`mergevq show`: a picture of what merging did to one image."""

from pathlib import Path
from typing import Annotated

import tyro

from mergevq.cli.options import Counts, Model, Size, choose_device, choose_size
from mergevq.errors import ConfigError


def show(
    image: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="PICTURE")],
    model: Model,
    num_tokens: Counts = (),
    size: Size = None,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Draw an image beside its token maps (which patches became one token) and its reconstructions.

    Args:
        image: The image.
        out: Picture to write; its ending says which format (.png, .webp, .jpg).
        model: Model file, folder of a training run, or Hugging Face hub id.
        num_tokens: Kept tokens, one column for each K.
        size: Side in pixels: the short side is resized to it, the middle is cut out.
        device: auto, cpu, cuda, cuda:1, ...
        force: Overwrite the output.
    """
    from mergevq.data.images import read_images
    from mergevq.evaluation.token_map import contact_sheet, draw_token_map
    from mergevq.files import atomic_path, refuse_existing
    from mergevq.tokenizer.model import MergeVQ

    if out.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
        raise ConfigError(f"expected a picture that ends in .png, .webp or .jpg, got {out}")
    refuse_existing(out, force)
    device = choose_device(device)
    tok = MergeVQ.from_pretrained(model, device=device)
    counts = num_tokens or (tok.config.num_tokens,)
    side = choose_size(tok.config, size, counts)
    original = read_images([image], side).to(device)

    cell = max(256, side)
    maps, drawn, titles = [], [], ["original"]
    for k in counts:
        tokens = tok.encode(original, k)
        assert tokens.source is not None
        maps.append(draw_token_map(original[0], tokens.source.index[0], tokens.grid, scale=-(-cell // side)))
        drawn.append(tok.decode(tokens)[0])
        titles.append(f"{k} tokens, {int(tokens.bits_per_image().total[0]):,} bits")
    sheet = contact_sheet(
        [[original[0], *maps], [original[0], *drawn]], titles, ["token map", "reconstruction"], cell=cell
    )
    with atomic_path(out) as temporary:
        sheet.save(temporary)
    print(f"{out}: {', '.join(titles)}")
