"""Pictures of what merging did: token maps, and sheets of captioned images."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.metrics.image import to_uint8

OUTLINE_STRENGTH = 0.45
"""How far an outline moves from its token's colour towards black (bright tokens) or white (dark tokens)."""


def draw_token_map(
    image: Float[Tensor, "3 H W"],
    source_index: Int[Tensor, " L"],
    grid: tuple[int, int],
    *,
    scale: int = 1,
    outline: bool = True,
) -> Float[Tensor, "3 H2 W2"]:
    """Returns `image` with each kept token painted in the mean colour of its patches, outlined where tokens meet.

    Args:
        image: values in [-1, 1].
        source_index: the kept token of every patch, row-major over `grid` (one row of `SourceMap.index`).
        grid: rows and columns of patches; they divide H and W.
        scale: the picture is this many times larger than `image`. Outlines are one pixel wide at every scale, so small
            images want 3 or 4.
        outline: whether to draw the borders.

    Returns:
        The picture, scale * H x scale * W, in [-1, 1].

    Raises:
        ShapeError: the source index does not fill the grid, or the grid does not divide the image.
    """
    rows, columns = grid
    height, width = image.shape[1:]
    if len(source_index) != rows * columns:
        raise ShapeError(
            f"expected a source index of {rows * columns} patches for a {rows} x {columns} grid, "
            f"got {len(source_index)}"
        )
    if height % rows or width % columns:
        raise ShapeError(f"expected an image that a {rows} x {columns} grid divides, got {height} x {width} pixels")
    if scale < 1:
        raise ShapeError(f"expected a scale of at least 1, got {scale}")
    patches = image.reshape(3, rows, height // rows, columns, width // columns).mean(dim=(2, 4)).reshape(3, -1)
    source_index = source_index.to(image.device, torch.int64)
    count = int(source_index.max()) + 1
    sizes = torch.zeros(count, device=image.device).index_add_(0, source_index, torch.ones_like(patches[0]))
    colours = torch.zeros(3, count, device=image.device).index_add_(1, source_index, patches) / sizes.clamp_min(1)
    tokens = source_index.reshape(rows, columns)
    tokens = tokens.repeat_interleave(height // rows * scale, 0).repeat_interleave(width // columns * scale, 1)
    picture = colours[:, tokens]
    if outline:
        edge = torch.zeros_like(tokens, dtype=torch.bool)
        edge[1:] |= tokens[1:] != tokens[:-1]
        edge[:, 1:] |= tokens[:, 1:] != tokens[:, :-1]
        towards = torch.where(picture.mean(dim=0) > -0.3, -1.0, 1.0)
        picture = torch.where(edge, picture + OUTLINE_STRENGTH * (towards - picture), picture)
    return picture


def to_pil(image: Float[Tensor, "3 H W"], side: int | None = None) -> Image.Image:
    """Returns the image, clamped to [-1, 1], as 8-bit RGB; resized to `side` x `side` pixels if given."""
    picture = Image.fromarray(to_uint8(image[None])[0].permute(1, 2, 0).cpu().contiguous().numpy())
    if side is None or picture.size == (side, side):
        return picture
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def contact_sheet(
    rows: Sequence[Sequence[Float[Tensor, "3 _ _"] | Image.Image | None]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    *,
    cell: int = 192,
    gap: int = 8,
) -> Image.Image:
    """Returns one picture: the images of `rows` in a grid on white, titles over the columns and left of the rows.

    Args:
        rows: images with values in [-1, 1] of any size, or pictures of `cell` x `cell` pixels; None leaves a place
            white. Rows may be shorter than the longest.
        column_titles: one a column; a newline starts a second line.
        row_titles: one a row.
        cell: side of every image in the sheet, in pixels.
        gap: white pixels between images.
    """
    if not rows or not any(rows):
        raise ShapeError("expected at least one image for a contact sheet, got none")
    font = ImageFont.load_default(size=max(12, cell // 13))
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = gap + _text_size(pen, row_titles, font)[0]
    top = gap + _text_size(pen, column_titles, font)[1]
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (cell + gap), top + len(rows) * (cell + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for c, title in enumerate(column_titles):
        x = left + c * (cell + gap) + cell // 2
        pen.multiline_text((x, top - gap), title, "black", font, anchor="md", align="center")
    for r, row in enumerate(rows):
        y = top + r * (cell + gap)
        if r < len(row_titles):
            pen.multiline_text((left - gap, y + cell // 2), row_titles[r], "black", font, anchor="rm", align="right")
        for c, image in enumerate(row):
            if image is not None:
                picture = image if isinstance(image, Image.Image) else to_pil(image, cell)
                sheet.paste(picture, (left + c * (cell + gap), y))
    return sheet


def _text_size(
    pen: ImageDraw.ImageDraw, texts: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> tuple[int, int]:
    """Width and height, with a margin, that hold the largest of `texts`; (0, 0) without texts."""
    if not any(texts):
        return 0, 0
    boxes = [pen.multiline_textbbox((0, 0), text, font) for text in texts]
    return int(max(b[2] for b in boxes)) + 8, int(max(b[3] for b in boxes)) + 8
