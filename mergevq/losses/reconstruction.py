"""Distance between images pixel by pixel."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mergevq.errors import ConfigError


def pixel_loss(
    kind: Literal["l1", "l2"], reconstruction: Float[Tensor, "B 3 H W"], image: Float[Tensor, "B 3 H W"]
) -> Float[Tensor, ""]:
    """Mean absolute (l1) or squared (l2) difference over all pixels and channels, in float32.

    Args:
        kind: l1, as the authors' release, or l2.
        reconstruction: Unclamped, so that values outside [-1, 1] keep a gradient.
        image: In [-1, 1].
    """
    difference = reconstruction.float() - image.float()
    if kind == "l1":
        return difference.abs().mean()
    if kind == "l2":
        return difference.square().mean()
    raise ConfigError(f"pixel loss must be l1 or l2, got {kind!r}")
