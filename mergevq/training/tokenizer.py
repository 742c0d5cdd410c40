"""Training a tokenizer: `train_step` is the mathematics, `train_tokenizer` the run around it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergevq.configuration import check_is
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import HardwareConfig, TokenizerLoopConfig, TokenizerRun
from mergevq.training.inputs import Inputs, open_inputs, stream
from mergevq.training.loop import Plan, check_start, run_training
from mergevq.training.optim import clip_gradients, gradient_norm, lr_factor, run_progress, set_lr
from mergevq.training.processes import agreed_values, build_fabric
from mergevq.training.state import TrainState, build_state, check_init, start_from
from mergevq.training.steps import weighted_sum
from mergevq.training.validation import draw_held_out, validate


class StepReport(NamedTuple):
    """What one optimizer step did."""

    num_tokens: int
    """K."""
    lr: float
    """Learning rate of the autoencoder."""
    disc_lr: float
    """Learning rate of the discriminator."""
    values: dict[str, float]
    """Losses, metrics and gradient norms: means over micro-batches and processes."""


def train_step(state: TrainState, batch: Sequence[Batch], run: TokenizerRun) -> StepReport:
    """Takes one optimizer step of the autoencoder and one of the discriminator, with one K.

    Both are computed from the weights as they are before. The weights, their average and LeCam change at the end, or
    not at all if any number is not finite.

    Args:
        state: changed in place.
        batch: the micro-batches of this process, on its device. Losses are divided by their number.
        run: what to minimise.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite on some process; all processes raise it.
    """
    weights = run.loss.weights
    num_tokens = draw_num_tokens(state.rng, run.loop)
    adversary = state.adversary if state.step >= run.loss.disc_start else None
    progress = run_progress(state.step, state.elapsed, run.loop.steps, run.loop.minutes)
    factor = lr_factor(progress, state.step, run.optim)
    means: dict[str, Tensor] = {}

    # Autoencoder step. Gradients pass through the discriminator and leave none in it: its own come from its own loss.
    state.optimizer.zero_grad()
    if adversary is not None:
        adversary.discriminator.requires_grad_(False)
    inputs = [(micro, num_tokens, adversary is not None) for micro in batch]
    drawn = _backward(state, state.autoencoder, inputs, weights, means)
    means["grad_norm"] = gradient_norm(state.model.parameters())

    # Discriminator step.
    if adversary is not None:
        adversary.discriminator.requires_grad_(True)
        adversary.optimizer.zero_grad()
        pairs = [(micro["image"], images) for micro, images in zip(batch, drawn, strict=True)]
        _backward(state, adversary.step, pairs, weights, means)
        means["disc_grad_norm"] = gradient_norm(adversary.discriminator.parameters())

    values = agreed_values(state.fabric, means, f"optimizer step {state.step} (K = {num_tokens})")

    # From here on the weights change.
    set_lr(state.optimizer, run.optim.lr * factor)
    clip_gradients(state.model.parameters(), run.optim.clip_norm, means["grad_norm"])
    state.optimizer.step()
    state.ema.update_parameters(state.model)
    if adversary is not None:
        set_lr(adversary.optimizer, run.optim.disc_lr * factor)
        clip_gradients(adversary.discriminator.parameters(), run.optim.clip_norm, means["disc_grad_norm"])
        adversary.optimizer.step()
        if adversary.lecam is not None:
            # After its use, unlike the release: the means of all micro-batches are known only now.
            adversary.lecam.update(values["logits_real"], values["logits_fake"])
    state.step += 1
    return StepReport(num_tokens, run.optim.lr * factor, run.optim.disc_lr * factor, values)


def draw_num_tokens(rng: torch.Generator, loop: TokenizerLoopConfig) -> int:
    """Returns one K from `loop.num_tokens`; processes with equal rngs draw the same."""
    probs = loop.num_tokens_probs or (1.0,) * len(loop.num_tokens)
    return loop.num_tokens[int(torch.multinomial(torch.tensor(probs, dtype=torch.float64), 1, generator=rng))]


def _backward(
    state: TrainState, module: Any, inputs: Sequence[tuple[Any, ...]], weights: Any, means: dict[str, Tensor]
) -> list[Tensor]:
    """Accumulates gradients of `module` over micro-batches and adds mean losses to `means`; returns what was drawn."""
    drawn = []
    for i, arguments in enumerate(inputs):
        # Forward and backward both belong inside: processes average their gradients once, at the last micro-batch.
        with state.fabric.no_backward_sync(module, enabled=i + 1 < len(inputs)):
            out = module(*arguments)
            state.fabric.backward(weighted_sum(out.losses, weights) / len(inputs))
        for name, value in {**out.losses, **out.metrics}.items():
            share = value.detach().double() / len(inputs)
            means[name] = means[name] + share if name in means else share
        drawn.append(out.reconstruction)
    return drawn


def train_tokenizer(
    run: TokenizerRun,
    out: str | Path,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    force: bool = False,
    perceptual: nn.Module | None = None,
    teacher: nn.Module | None = None,
    train_data: ImageFolder | None = None,
    val_data: ImageFolder | None = None,
    hardware: HardwareConfig | None = None,
) -> Path:
    """Trains a tokenizer and returns its file, `out/model.safetensors`: the averaged weights.

    Also in `out`: `run.json` (the configuration), `log.jsonl`, `images/`, and `state/`, from which `resume` goes on as
    if nothing had happened. SIGTERM and Ctrl-C finish the optimizer step, save and stop.

    Args:
        run: what to train; see `mergevq.presets.tokenizer`.
        out: a folder for the run, new or empty.
        resume: go on with the run in `out`.
        init: start from the weights of this tokenizer (a file, a folder or a hub id).
        force: start anew in a folder that holds something; an earlier run's files are removed.
        perceptual: module that compares two batches of images, instead of `run.loss.perceptual`. Frozen here.
        teacher: module that maps images in [-1, 1] to the alignment target, instead of `run.loss.teacher`. Frozen here;
            with `run.data.teacher_cache` only compared with the one that was cached.
        train_data: images to train on, instead of `run.data.train`.
        val_data: held-out images, instead of `run.data.val`; needed with `train_data`.
        hardware: devices; by default one GPU, or the CPU.

    Raises:
        OutputExistsError: `out` is not empty, and neither `resume` nor `force` is given.
        ConfigError: the run does not make sense, or `resume` with another configuration.
        DataError: images are missing or too few, or `resume` with other images.
        CheckpointError: nothing to resume, or what is there does not fit.
        MissingDependencyError: mergevq was installed without its train extra.
        NonFiniteLossError: a loss became NaN or infinite; the last saved state is whole.
        TrainingStopped: a signal stopped the run and its state was saved; a SystemExit with 128 + the signal's number.
    """
    check_is(run, TokenizerRun, "presets.tokenizer(name) is one")
    out = Path(out)
    hardware = hardware or HardwareConfig()
    fabric = build_fabric(hardware)
    fits, first = partial(check_init, run.model), fabric.is_global_zero
    check_start(out, run, resume=resume, init=init, force=force, check_init=fits, first=first)
    inputs = open_inputs(run, train_data, val_data, perceptual, teacher, fabric.world_size)
    images = {"train": len(inputs.train), "val": len(inputs.val)}
    build = partial(_TokenizerTraining, run, inputs)
    caches = {} if inputs.teacher_cache is None else {"teacher_cache": inputs.teacher_cache.fingerprint}
    return run_training(fabric, Plan(run, out, build, images, resume, init, caches=caches))


class _TokenizerTraining:
    """What the loop asks of the training of a tokenizer."""

    def __init__(self, run: TokenizerRun, inputs: Inputs, fabric: Any) -> None:
        self.run = run
        self.inputs = inputs
        self.state = build_state(fabric, run, inputs.perceptual, inputs.teacher)

    def start_from(self, name: str | Path) -> list[str]:
        return start_from(self.state, name)

    def batches(self) -> Iterator[Batch]:
        fabric = self.state.fabric
        rank, processes, at = fabric.global_rank, fabric.world_size, self.state.position
        return stream(self.run, self.inputs.train, rank, processes, at, self.inputs.teacher_cache)

    def step(self, batch: list[Batch]) -> dict[str, Any]:
        report = train_step(self.state, batch, self.run)
        record: dict[str, Any] = {"num_tokens": report.num_tokens, **report.values, "lr": report.lr}
        if "disc_grad_norm" in report.values:
            record["disc_lr"] = report.disc_lr
        return record

    def validate(self, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        found = validate(self.state, self.inputs.val, self.run, stop)
        return None if found is None else [{"num_tokens": count, **values} for count, values in found.items()]

    def draw(self, path: Path) -> None:
        draw_held_out(path, self.state, self.inputs.val, self.run)

    def publish(self, path: Path) -> None:
        model: MergeVQ = self.state.ema.module  # type: ignore[assignment]
        model.save_pretrained(path, step=self.state.step, force=True)
