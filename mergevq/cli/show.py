"""`mergevq show`: what merging did to an image, what two images have in common, what a token file holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mergevq.cli.models import Tokenizer
from mergevq.cli.options import Counts, Size, check_at_least_one, choose_device, choose_size, counted
from mergevq.errors import ConfigError

if TYPE_CHECKING:
    from mergevq.tokenizer.model import MergeVQ


def show(
    images: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="IMAGE [IMAGE]", help_behavior_hint="(required)"),
    ],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="PICTURE")],
    model: Tokenizer,
    num_tokens: Counts = (),
    size: Size = None,
    limit: int = 8,
    device: str = "auto",
    force: bool = False,
) -> None:
    """Draw an image as tokens: token maps (which patches became one token), reconstructions, the class token's
    attention, token sizes. Of two images, draw which tokens correspond.

    Args:
        images: An image, or two, or a token file (.mvq), whose images are drawn without originals and attention.
        out: Picture to write (.png, .webp, .jpg), or a page with everything inside (.html).
        model: The tokenizer.
        num_tokens: Kept tokens, one column for each K.
        size: Side in pixels: the short side is resized to it, the middle is cut out.
        limit: Images of a token file, from the first.
        device: auto, cpu, cuda, cuda:1, ...
        force: Overwrite the output.
    """
    from mergevq.evaluation.page import check_packages
    from mergevq.files import refuse_existing
    from mergevq.tokenizer.model import MergeVQ

    if out.suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg", ".html"):
        raise ConfigError(f"expected a picture that ends in .png, .webp or .jpg, or a page in .html, got {out}")
    as_tokens = [path.suffix == ".mvq" for path in images]
    if not 1 <= len(images) <= 2 or (any(as_tokens) and len(images) > 1):
        raise ConfigError(f"expected an image, two images or a token file (.mvq), got {' '.join(map(str, images))}")
    if any(as_tokens) and (num_tokens or size is not None):
        raise ConfigError("expected --num-tokens and --size with images only: a token file has its own")
    check_at_least_one("--limit", limit)
    check_at_least_one("--num-tokens", *num_tokens)
    if folder := next((path for path in images if path.is_dir()), None):
        raise ConfigError(f"expected an image, two images or a token file (.mvq), got the folder {folder}")
    if out.suffix.lower() == ".html":
        check_packages()
    refuse_existing(out, force)
    tok = MergeVQ.from_pretrained(model, device=choose_device(device))
    if any(as_tokens):
        _show_tokens(tok, model, images[0], out, limit)
    else:
        _show_images(tok, model, images, out, num_tokens, size)


def _show_images(
    tok: "MergeVQ", model: str, paths: Sequence[Path], out: Path, counts: tuple[int, ...], size: int | None
) -> None:
    from mergevq.data.images import read_images
    from mergevq.evaluation.correspondence import correspond
    from mergevq.evaluation.image_views import view_image
    from mergevq.evaluation.view_page import render_images
    from mergevq.evaluation.view_sheet import correspondence_sheet, correspondence_title, image_sheet, view_title

    counts = counts or (tok.config.num_tokens,)
    side = choose_size(tok.config, size, counts)
    originals = read_images(paths, side)
    found = [correspond(tok, originals, k) for k in counts] if len(paths) == 2 else []
    page = out.suffix.lower() == ".html"
    views = []
    if page or not found:
        views = [view_image(tok, image, counts, name=path.name) for image, path in zip(originals, paths, strict=True)]
    if page:
        _write(out, render_images(views, found, protocol=_protocol(tok, model, image_size=side)))
    elif found:
        _write(out, correspondence_sheet(originals, found, (paths[0].name, paths[1].name)))
    else:
        _write(out, image_sheet(views[0], cell=max(256, side)))
    titles = [correspondence_title(at) for at in found] or [view_title(at) for at in views[0].views]
    print(f"{out}: {'; '.join(title.replace(chr(10), ', ') for title in titles)}")


def _show_tokens(tok: "MergeVQ", model: str, path: Path, out: Path, limit: int) -> None:
    from mergevq.evaluation.image_views import view_tokens
    from mergevq.evaluation.view_page import render_tokens
    from mergevq.evaluation.view_sheet import tokens_sheet
    from mergevq.tokens import load_tokens

    tokens = load_tokens(path, expect_tokenizer=tok.fingerprint())
    views = view_tokens(tok, tokens[:limit])
    names = [f"{i:04d}" for i in range(len(views))]
    if out.suffix.lower() == ".html":
        _write(out, render_tokens(views, names, protocol=_protocol(tok, model, tokens=str(path)), title=path.name))
    else:
        _write(out, tokens_sheet(views, names))
    print(f"{out}: {len(views)} of {counted(len(tokens), 'image')}{', source predicted' if views[0].predicted else ''}")


def _protocol(tok: "MergeVQ", model: str, **about: Any) -> dict[str, Any]:
    from mergevq.evaluation.protocol import versions

    attention = {
        "preparation": "short side resized (bicubic, antialiased), centre crop",
        "attention": "class token in the last attention block, before it merges; mean over heads; a token's share "
        "divided by its patches; colours logarithmic",
        "correspondence": "mutual nearest neighbours by cosine of semantic tokens",
    }
    return {
        "tokenizer": {"name": model, "fingerprint": tok.fingerprint()},
        **about,
        **({} if "tokens" in about else attention),
        "versions": versions(),
    }


def _write(path: Path, what: Any) -> None:
    """Writes a page or a picture."""
    from mergevq.files import atomic_path

    with atomic_path(path) as temporary:
        if isinstance(what, str):
            temporary.write_text(what, encoding="utf-8")
        else:
            what.save(temporary)
