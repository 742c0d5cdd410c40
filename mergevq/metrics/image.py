"""How close two images are, one number an image, on pixels rounded to bytes as a viewer would see them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from mergevq.errors import ShapeError

WINDOW = 11
SIGMA = 1.5


def to_uint8(images: Float[Tensor, "*n"]) -> UInt8[Tensor, "*n"]:
    """Pixels 0..255 of images in [-1, 1]; values outside are clamped, then rounded.

    Raises:
        ShapeError: A number is not finite.
    """
    if not images.isfinite().all():
        raise ShapeError("expected finite pixels, got NaN or infinity: the network that made them has diverged")
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def psnr(
    images: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"],
    references: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"],
) -> Float[Tensor, "B"]:
    """Peak signal-to-noise ratio of each image in dB (float64), 10 log10(255^2 / mean squared error); equal: infinity.

    Args:
        images: Float in [-1, 1] (clamped and rounded here) or bytes.
        references: Likewise.
    """
    a, b = _bytes(images).double(), _bytes(references).double()
    mse = (a - b).square().mean((1, 2, 3))
    return 10 * (255**2 / mse).log10()


def ssim(
    images: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"],
    references: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"],
) -> Float[Tensor, "B"]:
    """Structural similarity of each image, at most 1 (float64).

    The definition: Gaussian window 11 x 11 of sigma 1.5, K1 = 0.01, K2 = 0.03, range 255, variances divided by the
    number of weights (not one less), each channel apart, mean over channels and over the positions where the window
    lies within the image.

    Args:
        images: Float in [-1, 1] (clamped and rounded here) or bytes.
        references: Likewise.

    Raises:
        ShapeError: The images are smaller than the window, or a number is not finite.

    Reference:
        Wang et al., Image quality assessment: from error visibility to structural similarity (2004), equation 13.
    """
    if min(images.shape[-2:]) < WINDOW:
        raise ShapeError(f"ssim needs images of at least {WINDOW} x {WINDOW} pixels, got {tuple(images.shape[-2:])}")
    a, b = _bytes(images).double(), _bytes(references).double()
    mean_a, mean_b, square_a, square_b, product = _blur(torch.stack([a, b, a * a, b * b, a * b])).unbind()
    var_a, var_b = square_a - mean_a**2, square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3))


def _bytes(images: Tensor) -> Tensor:
    return images if images.dtype == torch.uint8 else to_uint8(images)


def _blur(x: Tensor) -> Tensor:
    """Gaussian blur of the last two axes, where the window lies within the image."""
    position = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.exp(-(position**2) / (2 * SIGMA**2))
    window = window / window.sum()
    rows = F.conv2d(x.flatten(0, -3)[:, None], window[None, None, :, None])
    return F.conv2d(rows, window[None, None, None, :])[:, 0].unflatten(0, x.shape[:-2])
