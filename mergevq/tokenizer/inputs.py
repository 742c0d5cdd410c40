"""What may go into a tokenizer, and how much of it is kept."""

from typing import Any

import torch
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.merging import merge_schedule
from mergevq.tokenizer.config import TokenizerConfig

# Images come from uint8 through a division; their range may miss [-1, 1] by rounding only.
_RANGE_SLACK = 1e-3


def check_images(images: Any, downsampling: int) -> tuple[int, int]:
    """Returns the rows and columns of patches of a batch of images, after one reduction over its values.

    Args:
        images: what should be a float tensor [B, 3, H, W] in [-1, 1].
        downsampling: pixels per side of a patch; it must divide H and W.

    Raises:
        ShapeError: it is not.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] == 0:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"expected images as a tensor [B, 3, H, W] with B >= 1, got {got}")
    if not images.is_floating_point():
        raise ShapeError(
            f"expected float images in [-1, 1], got {images.dtype}: divide 0..255 by 127.5 and subtract 1, or use "
            "mergevq.read_images"
        )
    height, width = images.shape[-2:]
    if min(height, width) < downsampling or height % downsampling or width % downsampling:
        raise ShapeError(
            f"expected height and width to be multiples of {downsampling}, got {height} x {width}: resize or crop, "
            "for example with mergevq.read_images(size=)"
        )
    low, high = torch.stack(images.detach().aminmax()).tolist()
    # Comparisons with NaN are false, and aminmax passes NaN on.
    if not (low >= -1 - _RANGE_SLACK and high <= 1 + _RANGE_SLACK):
        raise ShapeError(f"expected finite images in [-1, 1], got values from {low:.4g} to {high:.4g}")
    return height // downsampling, width // downsampling


def kept_tokens(config: TokenizerConfig, num_patches: int, num_tokens: int) -> int:
    """Returns how many tokens an image keeps when `num_tokens` are asked for: as many, but for a converted model.

    That may miss K where it would have to merge more than half at once (`merging.overflow` clip); it keeps more then.

    Args:
        config: of the tokenizer.
        num_patches: L.
        num_tokens: K, 1 .. L.
    """
    merging = config.merging
    return num_patches - sum(
        merge_schedule(num_patches, num_tokens, config.encoder.depth, merging.schedule, merging.overflow)
    )
