"""Everything the training of a generator changes, in one value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mergevq.errors import CheckpointError, ConfigError
from mergevq.files import load_strict, read_header
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.model import read_config
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.model_files import find_model_file
from mergevq.training.config import flat_config
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_loss import GeneratorStep, build_generator
from mergevq.training.optim import average_weights, build_adamw
from mergevq.training.precision import choose_dtype


@dataclass
class GeneratorState:
    """A training between two optimizer steps. `save_state` writes all of it but what can be built again."""

    fabric: Any
    """The lightning.Fabric that wrapped the module."""
    model: MergeAR | RandomAR
    """The weights being trained."""
    ema: AveragedModel
    """Their average; `ema.module` is what is validated and published."""
    step_module: nn.Module
    """The wrapped `GeneratorStep` around `model`."""
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    """Seeds the noise of each optimizer step; on the CPU, and the same on all processes."""
    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Micro-batches that each process has taken from its data since the beginning."""
    elapsed: float = 0.0
    """Seconds spent in training steps, the same on all processes; validating and saving do not count."""

    def modules(self) -> dict[str, nn.Module]:
        """Returns everything with weights that change, by the name it has in the file."""
        return {"model": self.model, "ema": self.ema}

    def optimizers(self) -> dict[str, tuple[Any, nn.Module]]:
        """Returns every optimizer, by its name in the file, with the module whose parameters it moves."""
        return {"optimizer": (self.optimizer, self.model)}


def build_state(fabric: Any, run: GeneratorRun) -> GeneratorState:
    """Returns a training at step 0. The weights depend on `run.loop.seed` alone; no global random state is changed.

    Args:
        fabric: a launched lightning.Fabric.
        run: what to build.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the GPUs too, which fork_rng does not put back here.
        torch.default_generator.manual_seed(run.loop.seed)
        model = build_generator(run.model)
    dtype, _ = choose_dtype(run.loop.precision, fabric.device)
    step = GeneratorStep(model, run.loss.label_smoothing, dtype)
    fabric.to_device(step)
    ema = average_weights(model, run.optim.ema_decay)
    wrapped, optimizer = fabric.setup(step, build_adamw(model, run.optim.lr, run.optim))
    return GeneratorState(fabric, model, ema, wrapped, optimizer, torch.Generator().manual_seed(run.loop.seed))


# Fields of a model's configuration that change nothing for weights trained before, or that training may change.
_INDIFFERENT = (
    "class_names",
    "num_tokens",
    "trained_num_tokens",
    "token_dropout",
    "dropout",
    "class_dropout",
    "mask.recent",
    "mask.keep",
    "mask.proportional",
    "mask.duplicate",
)


def read_given(wanted: GeneratorConfig, name: str | Path) -> GeneratorConfig:
    """Returns the configuration of the generator to start from, of the same order as `wanted`.

    Raises:
        CheckpointError: there is no such generator, or it is of the other order.
    """
    path = find_model_file(name, role={"raster": "merge_ar", "random": "random_ar"}[wanted.order])
    given = read_config(read_header(path), path)
    if given.order != wanted.order:
        raise CheckpointError(f"{path}: expected a generator of order {wanted.order}, got one of order {given.order}")
    return given


def check_init(wanted: GeneratorConfig, name: str | Path) -> None:
    """Checks that a run may start from the weights of a generator. Reads the header of its file only.

    Raises:
        CheckpointError: there is no such generator, or it is of the other order.
        ConfigError: its configuration differs from `wanted` in a field that the weights depend on.
    """
    given = read_given(wanted, name)
    before, now = flat_config(given), flat_config(wanted)
    unknown = ("tokenizer",) if given.tokenizer is None else ()
    differing = [
        f"model.{field} ({before[field]!r} there, {now[field]!r} here)"
        for field in now
        if before[field] != now[field] and field not in (*_INDIFFERENT, *unknown)
    ]
    if differing:
        raise ConfigError(f"expected the model of this run in {name}, got other {', '.join(differing)}: set them alike")


def start_from(state: GeneratorState, name: str | Path) -> list[str]:
    """Gives the model and its average the weights of a generator; returns no notices. The mask may be another.

    Raises:
        CheckpointError: there is no such generator, it is of the other order, or its weights have other shapes.
        ConfigError: its configuration differs in a field that the weights depend on.
    """
    check_init(state.model.config, name)
    given = type(state.model).from_pretrained(name)
    for model in (state.model, state.ema.module):
        load_strict(model, given.state_dict(), str(name))
    return []
