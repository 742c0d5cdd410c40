"""Tying the class token to a frozen teacher, or to labels."""

import difflib
from contextlib import suppress
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError
from mergevq.layers.pretrained import EfficientNetLite, Frozen, resize

TEACHER_IMAGE_SIZE = 224


def alignment_loss(
    student: Float[Tensor, "B Dt"],
    target: Float[Tensor, "B Dt"] | Int[Tensor, "B"],
    kind: Literal["kl", "cosine", "labels"] = "kl",
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Distance of the student's output to its target, mean over images, in float32.

    Args:
        student: Output of the alignment head.
        target: The teacher's output [B, Dt], or for labels the class numbers [B].
        kind: kl: divergence of the student's softmax from the teacher's, both over the Dt numbers as if they were
            logits, times temperature squared so that the gradient does not depend on it to first order. cosine: 1 minus
            the cosine. labels: cross-entropy with label smoothing 0.1.
        temperature: Softness of both sides of kl.

    Reference:
        MergeVQ section 3.2, equation 10; kl with temperature 4 and labels as in the authors' release.
    """
    student = student.float()
    if kind == "labels":
        return F.cross_entropy(student, target, label_smoothing=0.1)
    target = target.float()
    if kind == "kl":
        wanted = F.log_softmax(target / temperature, -1)
        got = F.log_softmax(student / temperature, -1)
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True) * temperature**2
    if kind == "cosine":
        return 1 - F.cosine_similarity(student, target, dim=-1).mean()
    raise ConfigError(f"alignment must be kl, cosine or labels, got {kind!r}")


class Teacher(nn.Module):
    """A frozen network with its own idea of images: takes any size in [-1, 1], resizes and normalises itself.

    Args:
        network: From normalised images [B, 3, size, size] to [B, Dt].
        width: Dt.
        size: Side of the images the network takes.
        mean: Of red, green and blue in [0, 1], subtracted first.
        std: Of the same, divided by.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        width: int,
        size: int = TEACHER_IMAGE_SIZE,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.network = Frozen(network)
        self.width = width
        self.size = size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B Dt"]:
        """The network's output for images in [-1, 1]; never with a gradient."""
        images = (resize(images, self.size) + 1) / 2
        out: Tensor = self.network((images - self.mean) / self.std)
        return out


def build_teacher(name: str) -> Teacher:
    """The teacher of a configuration.

    Args:
        name: lite0 for EfficientNet-Lite0 from its package (Dt = 1280, no download), or the name of a timm model, such
            as vit_base_patch14_dinov2.lvd142m (Dt = 768, the normalised class token), downloaded on first use.

    Raises:
        MissingDependencyError: timm, or the packages of EfficientNet-Lite0, are not installed.
        ConfigError: timm has no such model.
        CheckpointError: The weights are not on this machine and cannot be downloaded.
    """
    if name == "lite0":
        lite = EfficientNetLite(0)
        # It normalises itself, from [-1, 1].
        return Teacher(lite, lite.width, lite.image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(
            f"teacher {name} needs timm ({error}): pip install 'mergevq[train]', or use teacher lite0"
        ) from error
    config = _timm_config(timm, name)
    size = TEACHER_IMAGE_SIZE if config.fixed_input_size else config.input_size[-1]
    # A vision transformer is built for its pretraining size (DINOv2: 518) unless told; others do not know img_size.
    options: dict[str, Any] = {"img_size": size} if config.fixed_input_size else {}
    overlay = {"file": _hub_weights(name, config.hf_hub_id)}
    network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **options)
    return Teacher(network, cast(int, network.num_features), size, config.mean, config.std)


def _timm_config(timm: Any, name: str) -> Any:
    """timm's description of a pretrained model: input size, mean and deviation, hub repository."""
    config = None
    if timm.models.is_model(name):
        with suppress(RuntimeError):  # a known architecture with an unknown tag
            config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        near = difflib.get_close_matches(name, timm.list_models(pretrained=True), 1)
        raise ConfigError(
            f"teacher must be lite0 or a timm model with weights on the Hugging Face hub, got {name!r}"
            + (f": did you mean {near[0]}?" if near else "")
        )
    return config


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
            f"({type(error).__name__}: {reason}): connect once, or use teacher lite0"
        ) from error
    return str(path)
