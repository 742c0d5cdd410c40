"""How many patches the kept tokens hold, as bars."""

from collections.abc import Sequence

from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mergevq.evaluation.page import FAINT, INK


def size_classes(largest: int) -> list[tuple[int, int]]:
    """Returns the classes of token sizes up to `largest`, first and last size of each: 1, 2, 3..4, 5..8, 9..16, ..."""
    classes = [(1, 1)]
    while classes[-1][1] < largest:
        classes.append((classes[-1][1] + 1, 2 * classes[-1][1]))
    return classes


def count_sizes(sizes: Int[Tensor, " K"], classes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the number of tokens in each class of sizes."""
    return [int(((sizes >= low) & (sizes <= high)).sum()) for low, high in classes]


def draw_size_histogram(sizes: Int[Tensor, " K"], largest: int | None = None, *, side: int = 256) -> Image.Image:
    """Returns a bar for each class of token sizes, as long as its share of the tokens, with the number of tokens.

    Args:
        sizes: patches in each kept token (`SourceMap.sizes`); 0 where a predicted map gives a token none.
        largest: the classes go up to this size, so that pictures can be compared; the largest of `sizes` by default.
        side: of the picture in pixels.
    """
    sizes = sizes.cpu()
    classes = size_classes(max(1, int(sizes.max())) if largest is None else largest)
    if bool((sizes == 0).any()):
        classes = [(0, 0), *classes]
    counts = count_sizes(sizes, classes)
    labels = [f"{low}" if low == high else f"{low}-{high}" for low, high in classes]
    top = max(16, side // 10)
    row = (side - top) / len(classes)
    font = ImageFont.load_default(size=max(9, min(side / 18, row * 0.72)))
    head = ImageFont.load_default(size=max(9, side / 20))
    picture = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(picture)
    left = max(pen.textlength(label, font) for label in labels) + 8
    room = side - left - max(pen.textlength(f"{count}", font) for count in counts) - 8
    pen.text((2, top / 2), "tokens by number of patches", FAINT, head, anchor="lm")
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        middle, half = top + (i + 0.5) * row, min(row * 0.36, side / 16)
        pen.text((left - 6, middle), label, "black" if count else FAINT, font, anchor="rm")
        if count:
            end = left + max(1.0, room * count / max(counts))
            pen.rectangle((left, middle - half, end, middle + half), INK)
            pen.text((end + 5, middle), f"{count}", "black", font, anchor="lm")
    pen.line((left - 1, top, left - 1, side), FAINT)
    return picture
