"""Rotary positions (RoPE, arXiv 2104.09864): on a line, and on a grid with half of the pairs for each axis."""

import torch
from jaxtyping import Float, Num
from torch import Tensor


def rotation_1d(positions: Num[Tensor, "*n"], head_width: int, base: float) -> Float[Tensor, "*n P 2"]:
    """Returns cosine and sine of the angle by which each pair of channels turns, P = head_width / 2 pairs, float32.

    Pair k turns by `position * base ** (-2k / head_width)`.

    Args:
        positions: any real numbers.
        head_width: channels of an attention head; even.
        base: the slowest pair turns about `base` times slower than the fastest.
    """
    pairs = torch.arange(head_width // 2, device=positions.device, dtype=torch.float32)
    angles = positions.float()[..., None] * base ** (-2 * pairs / head_width)
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotation_grid(
    rows: int, columns: int, head_width: int, base: float, device: torch.device | str | None = None
) -> Float[Tensor, "L P 2"]:
    """Returns the rotation of each cell of a grid, row-major: the first half of the pairs turns with the row, the
    second with the column, each like `rotation_1d` of half the head.

    Args:
        rows: of the grid.
        columns: of the grid.
        head_width: channels of an attention head; a multiple of 4.
        base: see `rotation_1d`.
        device: where to make it.
    """
    row = rotation_1d(torch.arange(rows, device=device), head_width // 2, base)
    column = rotation_1d(torch.arange(columns, device=device), head_width // 2, base)
    return torch.cat([row[:, None].expand(-1, columns, -1, -1), column.expand(rows, -1, -1, -1)], 2).flatten(0, 1)


def rotate(x: Float[Tensor, "*n T C"], rotation: Float[Tensor, "*m T P 2"]) -> Float[Tensor, "*n T C"]:
    """Returns queries or keys turned by their positions, in the type of `x`; the arithmetic is at least float32.

    Args:
        x: channels 2k and 2k + 1 are pair k.
        rotation: of each position; leading axes broadcast. A rotation of zeros makes a query or key vanish.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    cos, sin = rotation.split(1, -1)
    quarter = torch.stack([-pairs[..., 1], pairs[..., 0]], -1)  # Each pair turned by a right angle.
    return torch.addcmul(pairs * cos, quarter, sin).flatten(-2).to(x.dtype)
