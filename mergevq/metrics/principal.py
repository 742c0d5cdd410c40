"""Principal components: the flat picture of features that keeps most of their variance."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.errors import ShapeError


class Projection(NamedTuple):
    """Features seen along their first principal components."""

    coordinates: Float[Tensor, "n k"]
    """Float32, on the CPU; the mean is at 0."""
    explained: tuple[float, ...]
    """Share of the variance along each component."""


@torch.no_grad()
def principal_components(features: Float[Tensor, "n D"], count: int = 2) -> Projection:
    """Returns the features along the directions of most variance, exactly, in float64.

    A direction is known up to its sign: here the coordinate of largest magnitude is positive. Directions without
    variance, or beyond the numbers of rows or columns, have coordinates of 0.

    Args:
        features: one row an image. Takes the time of an eigenvalue problem of size min(n, D).
        count: k.

    Raises:
        ShapeError: there are no features, or a number is not finite.
    """
    x = features.detach().cpu().double()
    if x.ndim != 2 or not x.numel() or not x.isfinite().all():
        raise ShapeError(f"expected finite features [n, D] of at least one image, got {list(features.shape)}")
    x = x - x.mean(0)
    wide = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    values, vectors = values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    along = vectors * values.sqrt() if wide else x @ vectors
    total = float(x.square().sum())
    # What round-off leaves along a direction without variance is no picture of anything.
    along = along * (values > 1e-12 * total)
    largest = along.gather(0, along.abs().argmax(0, keepdim=True))
    along = along * torch.where(largest < 0, -1.0, 1.0)
    missing = count - along.shape[1]
    along = torch.nn.functional.pad(along, (0, missing))
    explained = [float(value) / total if total else 0.0 for value in values] + [0.0] * missing
    return Projection(along.float(), tuple(explained))
