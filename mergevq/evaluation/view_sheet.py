"""Views of images as one picture: token maps, reconstructions, attention and token sizes at several K; and pairs."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.evaluation.correspondence import Correspondence, draw_correspondence
from mergevq.evaluation.heat_map import colours, draw_heat_map
from mergevq.evaluation.image_views import ImageView, TokenView
from mergevq.evaluation.size_histogram import draw_size_histogram
from mergevq.evaluation.token_map import contact_sheet, draw_token_map, to_pil

_LETTERS = 24  # Of a name, which has to fit over a picture.
_SPAN = 3.0  # Attention is shown from 1/8 to 8 times the mean: powers of two.


def image_sheet(view: ImageView, *, cell: int = 256) -> Image.Image:
    """Returns the image at several K: a column for each, below one another the token map, the reconstruction, the class
    token's attention and the histogram of token sizes.

    Args:
        view: from `view_image`.
        cell: side of each picture in pixels.
    """
    largest = max(int(at.sizes.max()) for at in view.views)
    return contact_sheet(
        [
            [view.original, *(map_picture(at, view.original, cell) for at in view.views)],
            [None, *(at.drawn for at in view.views)],
            [attention_legend(cell), *(attention_picture(at, view.original, cell) for at in view.views)],
            [None, *(draw_size_histogram(at.sizes, largest, side=cell) for at in view.views)],
        ],
        [_short(view.name), *(view_title(at) for at in view.views)],
        ["token map", "reconstruction", "class token's\nattention", "token sizes"],
        cell=cell,
    )


def tokens_sheet(views: Sequence[TokenView], names: Sequence[str], *, cell: int = 256) -> Image.Image:
    """Returns what tokens without originals hold: a column for each image, what comes back, the token map in its mean
    colours, and the histogram of token sizes.

    Args:
        views: from `view_tokens`.
        names: of the images.
        cell: side of each picture in pixels.

    Raises:
        ShapeError: there is no image.
    """
    if not views:
        raise ShapeError("expected tokens of at least one image, got none")
    largest = max(int(at.sizes.max()) for at in views)
    return contact_sheet(
        [
            [at.drawn for at in views],
            [map_picture(at, at.drawn, cell) for at in views],
            [draw_size_histogram(at.sizes, largest, side=cell) for at in views],
        ],
        [f"{_short(name)}\n{view_title(at)}" for name, at in zip(names, views, strict=True)],
        ["reconstruction", "token map", "token sizes"],
        cell=cell,
    )


def correspondence_sheet(
    images: Float[Tensor, "2 3 H W"],
    found: Sequence[Correspondence],
    names: tuple[str, str] = ("first image", "second image"),
    *,
    cell: int = 320,
    lines: int = 8,
) -> Image.Image:
    """Returns two images over their pairs of tokens, a row for each K.

    Args:
        images: in [-1, 1].
        found: from `correspond`.
        names: of the images.
        cell: side of each image in pixels.
        lines: see `draw_correspondence`.
    """
    gap = 16
    titles = [correspondence_title(pairs) for pairs in found]
    sheet = contact_sheet(
        [list(images), *([None, None] for _ in found)],
        [_short(name) for name in names],
        ["", *titles],
        cell=cell,
        gap=gap,
    )
    left, top = sheet.width - 2 * (cell + gap), sheet.height - len(found) * (cell + gap)
    for row, pairs in enumerate(found):
        picture = draw_correspondence(images, pairs, cell=cell, gap=gap, lines=lines)
        sheet.paste(picture, (left, top + row * (cell + gap)))
    return sheet


def view_title(view: TokenView) -> str:
    """Returns K, bits, and distance from the original where there is one, in two lines."""
    quality = "" if view.psnr is None else f", {view.psnr:.1f} dB"
    return f"{view.num_tokens} tokens\n{view.bits:,} bits{', source predicted' if view.predicted else quality}"


def correspondence_title(found: Correspondence) -> str:
    """Returns K and the number of pairs, in two lines."""
    merged = found.num_tokens < found.grid[0] * found.grid[1]
    count = len(found.matches.first)
    return f"{found.num_tokens} {'tokens' if merged else 'patches'}\n{count} {'pair' if count == 1 else 'pairs'}"


def map_picture(view: TokenView, image: Float[Tensor, "3 H W"], side: int) -> Image.Image:
    """Returns the token map, `side` pixels square.

    Args:
        view: whose tokens.
        image: whose colours.
        side: of the picture in pixels.
    """
    image = image.clamp(-1, 1)
    return to_pil(draw_token_map(image, view.source_index, view.tokens.grid, scale=_scale(image, side)), side)


def attention_picture(view: TokenView, image: Float[Tensor, "3 H W"], side: int) -> Image.Image | None:
    """Returns the class token's attention over the image in grey, `side` pixels square; None where there is none.

    Colours are logarithmic, from 1/8 to 8 times the mean attention of the image's patches, whatever K.

    Args:
        view: whose attention.
        image: the original.
        side: of the picture in pixels.
    """
    if view.attention is None:
        return None
    relative = view.attention / view.attention.mean().clamp_min(torch.finfo(torch.float32).tiny)
    heat = relative.clamp_min(2.0 ** -(2 * _SPAN)).log2()
    return to_pil(draw_heat_map(image, heat, -_SPAN, _SPAN, scale=_scale(image, side)), side)


def attention_legend(side: int) -> Image.Image:
    """Returns the scale of `attention_picture`, `side` pixels square."""
    picture = Image.new("RGB", (side, side), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(11, side // 17))
    length, width = side * 3 // 4, max(6, side // 20)
    bar = to_pil(colours(torch.linspace(1, 0, length))[..., None].expand(-1, -1, width))
    left, top = side - width - 4, (side - length) // 2
    picture.paste(bar, (left, top))
    for share, words in ((0.0, "8 times the mean"), (0.5, "the mean"), (1.0, "1/8")):
        pen.text((left - 8, top + share * length), words, "black", font, anchor="rm")
    return picture


def _scale(image: Tensor, side: int) -> int:
    return max(1, -(-side // min(image.shape[-2:])))


def _short(name: str) -> str:
    """The name, its middle left out if it is long: kinds and numbers stand at the end."""
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2 - 2]}...{name[-(_LETTERS // 2 - 1) :]}"
