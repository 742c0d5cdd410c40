"""A number for every patch as colours over the image: attention, similarity."""

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.errors import ShapeError

# Dark to bright and evenly so, which also reads in grey: black, violet, red, orange, pale yellow.
_COLOURS = ((8, 8, 28), (66, 16, 104), (146, 38, 103), (214, 72, 66), (248, 144, 44), (252, 250, 190))
_GREY = 0.35  # Share of the image's brightness in the picture.


def draw_heat_map(
    image: Float[Tensor, "3 H W"], values: Float[Tensor, "rows columns"], low: float, high: float, *, scale: int = 1
) -> Float[Tensor, "3 H2 W2"]:
    """Returns `image` in grey under the colours of `values`, dark for low and bright for high ones.

    Args:
        image: values in [-1, 1].
        values: one a patch; the grid divides H and W.
        low: this value and those below are darkest.
        high: this value and those above are brightest; more than `low`.
        scale: the picture is this many times larger than `image`.

    Returns:
        The picture, scale * H x scale * W, in [-1, 1].

    Raises:
        ShapeError: the grid does not divide the image, a value is not finite, or there is nothing between low and high.
    """
    (rows, columns), (height, width) = values.shape, image.shape[1:]
    if height % rows or width % columns:
        raise ShapeError(f"expected an image that a {rows} x {columns} grid divides, got {height} x {width} pixels")
    if not bool(values.isfinite().all()) or not low < high:
        raise ShapeError(f"expected finite values and low < high, got values to {values.max()}, {low} and {high}")
    heat = colours((values.to(image) - low) / (high - low))
    for axis, size in ((1, height // rows * scale), (2, width // columns * scale)):
        heat = heat.repeat_interleave(size, axis)
    # Darker than it is, or a white background would outshine low values.
    grey = (0.6 * image.mean(0) - 0.4).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return heat + _GREY * (grey - heat)


def colours(values: Float[Tensor, "*n"]) -> Float[Tensor, "3 *n"]:
    """Returns colours in [-1, 1] of values in 0..1, dark to bright; other values are clamped."""
    table = torch.tensor(_COLOURS, dtype=values.dtype, device=values.device).T / 127.5 - 1
    place = values.clamp(0, 1) * (table.shape[1] - 1)
    left = place.long().clamp_max(table.shape[1] - 2)
    share = place - left
    return table[:, left] * (1 - share) + table[:, left + 1] * share
