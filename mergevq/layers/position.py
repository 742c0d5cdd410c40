"""Fixed sinusoidal embeddings."""

import torch
from jaxtyping import Float, Num
from torch import Tensor


def sinusoid(positions: Num[Tensor, "..."], width: int) -> Float[Tensor, "... D"]:
    """Returns sines, then cosines, of the positions at `width / 2` frequencies from 1 down to 1/10000 (arXiv
    1706.03762).

    Args:
        positions: any real numbers.
        width: of the embedding; even.
    """
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def sinusoid_grid(rows: int, columns: int, width: int, device: torch.device) -> Float[Tensor, "L D"]:
    """Returns the embedding of each cell of a grid, row-major: half of the channels for the row, half for the column.

    Args:
        rows: of the grid.
        columns: of the grid.
        width: of the embedding; a multiple of 4.
        device: where to make it.
    """
    row = sinusoid(torch.arange(rows, device=device), width // 2)
    column = sinusoid(torch.arange(columns, device=device), width // 2)
    return torch.cat([row[:, None].expand(-1, columns, -1), column[None].expand(rows, -1, -1)], -1).flatten(0, 1)
