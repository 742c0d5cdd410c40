"""Distance between images as a frozen network sees them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError
from mergevq.layers.pretrained import EfficientNetLite, Frozen


class PerceptualLoss(nn.Module):
    """Mean over images of the distance of their feature maps: LPIPS without learned weights.

    In each map the channels of a position are scaled to unit length, so that the squared distance of two positions lies
    in [0, 4]; it is averaged over positions, and the maps are summed. Computed in float32 whatever the autocast: small
    feature differences are what it is about.

    Args:
        features: Any network from images [B, 3, H, W] in [-1, 1] to a sequence of maps [B, C, h, w]. It is frozen here.
        weights: Of the maps in the sum; 1 each by default.

    Reference:
        Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric (arXiv 1801.03924), eq. 1.
    """

    def __init__(self, features: nn.Module, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.features = Frozen(features)
        self.weights = None if weights is None else tuple(weights)

    def forward(self, reconstruction: Float[Tensor, "B 3 H W"], image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """The distance; the gradient goes to `reconstruction` alone.

        Args:
            reconstruction: May leave [-1, 1].
            image: In [-1, 1].
        """
        with torch.autocast(image.device.type, enabled=False):
            with torch.no_grad():
                expected: Sequence[Tensor] = self.features(image.float())
            maps: Sequence[Tensor] = self.features(reconstruction.float())
            weights = self.weights or (1.0,) * len(expected)
            if len(weights) != len(expected):
                raise ConfigError(f"expected one weight for each of {len(expected)} feature maps, got {len(weights)}")
            total = reconstruction.new_zeros((), dtype=torch.float32)
            for weight, a, b in zip(weights, maps, expected, strict=True):
                total = total + weight * (_unit(a) - _unit(b)).square().sum(1).mean()
            return total


class Lpips(nn.Module):
    """LPIPS on VGG16, from torchmetrics: mean over images, frozen, float32. Takes [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Frozen(_lpips_network())

    def forward(self, reconstruction: Float[Tensor, "B 3 H W"], image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """The distance; the gradient goes to `reconstruction` alone."""
        with torch.autocast(image.device.type, enabled=False):
            distance: Tensor = self.network(reconstruction.float(), image.detach().float())
            return distance.mean()


class Lite0Maps(nn.Module):
    """Feature maps of EfficientNet-Lite0 (from its package) at strides 2, 2, 4, 8 and 16."""

    after = (-1, 0, 2, 4, 10)

    def __init__(self) -> None:
        super().__init__()
        self.network = EfficientNetLite(0).to(memory_format=torch.channels_last)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The maps, finest first."""
        return self.network.feature_maps(images.contiguous(memory_format=torch.channels_last), self.after)


def lite0_perceptual() -> PerceptualLoss:
    """Perceptual loss on EfficientNet-Lite0; needs no download.

    Raises:
        MissingDependencyError: The packages with its weights are not installed.
    """
    return PerceptualLoss(Lite0Maps())


def lpips_perceptual() -> Lpips:
    """LPIPS-VGG; downloads the VGG16 weights on first use.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        CheckpointError: The weights are not on this machine and cannot be downloaded.
    """
    return Lpips()


def build_perceptual(name: str) -> nn.Module:
    """The perceptual loss of a configuration: lpips or lite0. Call it with (reconstruction, image)."""
    if name == "lpips":
        return lpips_perceptual()
    if name == "lite0":
        return lite0_perceptual()
    raise ConfigError(f"perceptual must be lpips or lite0, got {name!r}")


def _unit(x: Tensor) -> Tensor:
    # Inside the root, so that the gradient of an all-zero position (ReLU) is finite.
    return x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def _lpips_network() -> Any:
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    except ImportError as error:
        raise MissingDependencyError(
            f"perceptual lpips needs torchmetrics ({error}): pip install 'mergevq[train]', or use perceptual lite0"
        ) from error
    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    except OSError as error:  # urllib's URLError and HTTPError
        raise CheckpointError(
            f"perceptual lpips needs VGG16 weights, which are not on this machine and cannot be downloaded ({error}): "
            "connect once, or use perceptual lite0"
        ) from error
