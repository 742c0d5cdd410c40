"""Everything the training of a tokenizer changes, in one value."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mergevq.errors import ConfigError
from mergevq.files import load_strict, read_header
from mergevq.losses.adversarial import LeCam, PatchDiscriminator
from mergevq.model_files import find_model_file
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.model_file import read_config
from mergevq.tokenizer.recovery import fit_queries
from mergevq.training.config import TokenizerRun, flat_config
from mergevq.training.optim import average_weights, build_adamw
from mergevq.training.precision import choose_dtype
from mergevq.training.steps import AutoencoderStep, DiscriminatorStep


@dataclass
class Adversary:
    """The discriminator's side of a training."""

    discriminator: PatchDiscriminator
    step: nn.Module
    """The wrapped `DiscriminatorStep` around it."""
    optimizer: torch.optim.Optimizer
    lecam: LeCam | None
    """Running logits; None without the term."""


@dataclass
class TrainState:
    """A training between two optimizer steps. `save_state` writes all of it but what can be built again."""

    fabric: Any
    """The lightning.Fabric that wrapped the modules."""
    model: MergeVQ
    """The weights being trained."""
    ema: AveragedModel
    """Their average; `ema.module` is what is validated and published."""
    autoencoder: nn.Module
    """The wrapped `AutoencoderStep` around `model`."""
    optimizer: torch.optim.Optimizer
    """Of `model`."""
    perceptual: nn.Module | None
    """The frozen network of the perceptual term."""
    adversary: Adversary | None
    """None without an adversarial term."""
    rng: torch.Generator
    """Draws K; on the CPU, and the same on all processes."""
    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Micro-batches that each process has taken from its data since the beginning."""
    elapsed: float = 0.0
    """Seconds spent in training steps, the same on all processes; validating and saving do not count."""

    def modules(self) -> dict[str, nn.Module]:
        """Returns everything with weights that change, by the name it has in the file."""
        parts: dict[str, nn.Module] = {"model": self.model, "ema": self.ema}
        if self.adversary is not None:
            parts["discriminator"] = self.adversary.discriminator
            if self.adversary.lecam is not None:
                parts["lecam"] = self.adversary.lecam
        return parts

    def optimizers(self) -> dict[str, tuple[Any, nn.Module]]:
        """Returns every optimizer, by its name in the file, with the module whose parameters it moves."""
        parts: dict[str, tuple[Any, nn.Module]] = {"optimizer": (self.optimizer, self.model)}
        if self.adversary is not None:
            parts["disc_optimizer"] = (self.adversary.optimizer, self.adversary.discriminator)
        return parts


def build_state(
    fabric: Any, run: TokenizerRun, perceptual: nn.Module | None = None, teacher: nn.Module | None = None
) -> TrainState:
    """Returns a training at step 0. The weights depend on `run.loop.seed` alone; no global random state is changed.

    Args:
        fabric: a launched lightning.Fabric.
        run: what to build.
        perceptual: frozen network for the perceptual term; needed if its weight is positive.
        teacher: frozen network for the alignment term; needed if its weight is positive, its kind is not labels, and
            nothing is cached.
    """
    weights = run.loss.weights
    if weights.perceptual > 0 and perceptual is None:
        raise ConfigError(f"expected a perceptual network for loss.weights.perceptual {weights.perceptual}, got none")
    cached = bool(run.data.teacher_cache)
    if weights.alignment > 0 and run.loss.alignment != "labels" and teacher is None and not cached:
        raise ConfigError(f"expected a teacher for loss.weights.alignment {weights.alignment}, got none")
    discriminator = None
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the GPUs too, which fork_rng does not put back here.
        torch.default_generator.manual_seed(run.loop.seed)
        model = MergeVQ(run.model)
        if weights.adversarial > 0:
            discriminator = PatchDiscriminator(run.loss.disc_channels, run.loss.disc_layers)
    if run.loop.channels_last:
        for module in (model, discriminator, perceptual):
            if module is not None:
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    # A wrapper averages the gradients of the parameters that ask for one while it is built: the discriminator's belong
    # to its own wrapper only.
    if discriminator is not None:
        discriminator.requires_grad_(False)
    dtype, _ = choose_dtype(run.loop.precision, fabric.device)
    step = AutoencoderStep(
        model,
        run.loss,
        dtype,
        discriminator,
        perceptual if weights.perceptual > 0 else None,
        teacher if weights.alignment > 0 and run.loss.alignment != "labels" else None,
    )
    fabric.to_device(step)
    ema = average_weights(model, run.optim.ema_decay)
    autoencoder, optimizer = fabric.setup(step, build_adamw(model, run.optim.lr, run.optim))
    adversary = None
    if discriminator is not None:
        discriminator.requires_grad_(True)
        lecam = LeCam(run.loss.lecam_decay) if weights.lecam > 0 else None
        disc_step, disc_optimizer = fabric.setup(
            DiscriminatorStep(discriminator, lecam, dtype, run.loss.discriminator),
            build_adamw(discriminator, run.optim.disc_lr, run.optim),
        )
        adversary = Adversary(discriminator, disc_step, disc_optimizer, lecam)
    rng = torch.Generator().manual_seed(run.loop.seed)
    return TrainState(fabric, model, ema, autoencoder, optimizer, step.perceptual, adversary, rng)


# Fields of a model's configuration that change nothing for weights trained before.
_INDIFFERENT = (
    "image_size",
    "num_tokens",
    "layer_scale",
    "merging.schedule",
    "merging.overflow",
    "merging.order",
    "quantizer.temperature",
    "quantizer.scope",
    "quantizer.groups",
    "quantizer.eps",
    "alignment.view_tokens",
)
# And fields of the encoder that only the other kind reads.
_UNREAD = {
    "hybrid": ("encoder.patch_size", "encoder.vit_width"),
    "vit": ("encoder.channels", "encoder.multipliers", "encoder.blocks", "encoder.stem_stride"),
}


def differing_fields(given: TokenizerConfig, own: TokenizerConfig, ignored: Sequence[str] = ()) -> list[str]:
    """Returns the fields, with both values, in which a tokenizer's weights mean something else to a model.

    Args:
        given: configuration of the tokenizer.
        own: configuration of the model that is to have its weights.
        ignored: parts that one of the two lacks.
    """
    before, now = flat_config(given), flat_config(own)
    unread = _UNREAD[own.encoder.kind] if given.encoder.kind == own.encoder.kind else ()
    return [
        f"model.{field} ({before[field]!r} there, {now[field]!r} here)"
        for field in now
        if before[field] != now[field] and field not in (*_INDIFFERENT, *unread) and field.split(".")[0] not in ignored
    ]


def check_init(wanted: TokenizerConfig, name: str | Path) -> tuple[list[str], list[str]]:
    """Returns the parts that a tokenizer lacks and those that a run has no use for. Reads the header of its file only.

    Raises:
        CheckpointError: there is no such tokenizer.
        ConfigError: its configuration differs from `wanted` in a field that the weights depend on.
    """
    path = find_model_file(name)
    given = read_config(read_header(path), path)
    optional = ("recovery", "alignment")
    missing = [p for p in optional if getattr(wanted, p).enabled and not getattr(given, p).enabled]
    unused = [p for p in optional if getattr(given, p).enabled and not getattr(wanted, p).enabled]
    differing = differing_fields(given, wanted, missing + unused)
    if differing:
        raise ConfigError(f"expected the model of this run in {name}, got other {', '.join(differing)}: set them alike")
    return missing, unused


def start_from(state: TrainState, name: str | Path) -> list[str]:
    """Gives the model and its average the weights of a tokenizer; returns notices about parts only one of them has.

    Recovery and alignment are kept as they are if the tokenizer lacks them, and left out if the run does. For another
    image size the recovery's queries are resized.

    Raises:
        CheckpointError: there is no such tokenizer, or its weights have other shapes.
        ConfigError: its configuration differs in a field that the weights depend on.
    """
    missing, unused = check_init(state.model.config, name)
    given = MergeVQ.from_pretrained(name)
    tensors = {k: v for k, v in given.state_dict().items() if k.split(".")[0] not in unused}
    tensors |= {k: v for k, v in state.model.state_dict().items() if k.split(".")[0] in missing}
    resized: list[str] = []
    if given.recovery is not None and state.model.recovery is not None:
        rows, columns = state.model.recovery.queries.shape[-2:]
        fitted, resized = fit_queries(given.recovery, (rows, columns), str(name))
        tensors |= {f"recovery.{k}": v for k, v in fitted.items()}
    load_strict(state.model, tensors, str(name))
    load_strict(state.ema.module, tensors, str(name))
    notices = [f"{name} has no {part}: it starts from random weights" for part in missing]
    return notices + resized + [f"{name} has a {part} that this run does not train: it is left out" for part in unused]
