"""Training a tokenizer: `train_step` is the mathematics, `train_tokenizer` the loop around it."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch
from mergevq.errors import ConfigError, NonFiniteLossError
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.checkpoint import load_state, save_state
from mergevq.training.config import HardwareConfig, LoopConfig, TokenizerRun
from mergevq.training.inputs import Inputs, open_inputs, stream
from mergevq.training.log import RunLog, truncate_log, validated_steps
from mergevq.training.optim import clip_gradients, gradient_norm, lr_factor, run_progress, set_lr
from mergevq.training.precision import choose_dtype
from mergevq.training.processes import agree, build_fabric, deterministic_kernels
from mergevq.training.run_folder import begin, check_folder, check_images
from mergevq.training.signals import StopRequest, TrainingStopped
from mergevq.training.state import TrainState, build_state, start_from
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

    values = _agreed_values(state, means, num_tokens)

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


def draw_num_tokens(rng: torch.Generator, loop: LoopConfig) -> int:
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


def _agreed_values(state: TrainState, means: dict[str, Tensor], num_tokens: int) -> dict[str, float]:
    """Returns the means over processes, waiting for the device once; a NaN of one process is then every process's."""
    stacked = torch.stack([value.double().to(state.fabric.device) for value in means.values()])
    agreed = state.fabric.all_reduce(stacked, reduce_op="mean").tolist()
    values = dict(zip(means, agreed, strict=True))
    broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        raise NonFiniteLossError(
            f"expected finite losses at optimizer step {state.step} (K = {num_tokens}), got {', '.join(broken)}: "
            "the weights were not changed; try a lower optim.lr, a smaller optim.clip_norm or loop.precision float32"
        )
    return values


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
        teacher: module that maps images in [-1, 1] to the alignment target, instead of `run.loss.teacher`. Frozen here.
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
    out = Path(out)
    hardware = hardware or HardwareConfig()
    fabric = build_fabric(hardware)
    if fabric.is_global_zero:
        check_folder(out, run, resume, force)
    if resume and init is not None:
        raise ConfigError("expected one of --resume (go on) and --init (start from a model), got both")
    inputs = open_inputs(run, train_data, val_data, perceptual, teacher, fabric.world_size)
    if resume:
        check_images(out, len(inputs.train), len(inputs.val))
    given = _Given(run, out, inputs, resume, init)
    outcome: _Outcome = fabric.launch(_train, given)
    if outcome.signum:
        # Other processes end well: their launcher kills the first one if they do not.
        raise TrainingStopped(outcome.signum, outcome.step, quiet=not fabric.is_global_zero)
    return outcome.model


class _Given(NamedTuple):
    """What each process of a run is started with."""

    run: TokenizerRun
    out: Path
    inputs: Inputs
    resume: bool
    init: str | Path | None


class _Session(NamedTuple):
    """What the loop of one process works with, besides the state."""

    given: _Given
    log: RunLog
    stop: StopRequest
    validated: set[int]
    """Steps that an earlier part of the run has validated."""

    def agreed_signal(self, fabric: Any) -> int:
        """Returns the number of a signal that reached some process, or 0; all processes have to ask together."""
        return agree(fabric, 0.0, self.stop.signum)[1]


class _Outcome(NamedTuple):
    model: Path
    signum: int
    step: int


def _train(fabric: Any, given: _Given) -> _Outcome:
    """The life of one process of a run."""
    run, out = given.run, given.out
    gpu = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpu), deterministic_kernels(run.loop.deterministic):
        torch.manual_seed(run.loop.seed)
        state = build_state(fabric, run, given.inputs.perceptual, given.inputs.teacher)
        _, notice = choose_dtype(run.loop.precision, fabric.device)
        notices = [notice] if notice else []
        if given.resume:
            load_state(out / "state", state)
        elif given.init is not None:
            notices += start_from(state, given.init)
        # Before the barrier, behind which the first process writes to the log: all have to read the same.
        validated = validated_steps(out / "log.jsonl") if given.resume else set()
        fabric.barrier()
        if fabric.is_global_zero:
            begin(out, run, given.resume, len(given.inputs.train), len(given.inputs.val))
            truncate_log(out / "log.jsonl", state.step)
        with RunLog(out / "log.jsonl", _progress(state, run), fabric.is_global_zero) as log, StopRequest() as stop:
            for text in (_headline(state, given), *notices):
                log.say(text)
            signum = _loop(state, _Session(given, log, stop, validated))
            if signum:
                log.say(str(TrainingStopped(signum, state.step)))
    return _Outcome(out / "model.safetensors", signum, state.step)


def _loop(state: TrainState, session: _Session) -> int:
    """Trains to the end, or to a signal whose number it returns."""
    given, log, stop, validated = session
    run, loop, fabric, first = given.run, given.run.loop, state.fabric, state.fabric.is_global_zero
    batches = stream(run, given.inputs.train, fabric.global_rank, fabric.world_size, state.position)
    images_per_step = loop.batch_size * loop.accumulate * fabric.world_size
    done, signum = _progress(state, run), 0
    logged = state.step, state.elapsed
    if state.step > 0 and state.step not in validated and _validation_is_due(state, run):
        signum = _look(state, session)  # The state was saved, and the process died before it had validated.
    while done < 1 and not signum:
        started = time.perf_counter()
        batch = [fabric.to_device(next(batches)) for _ in range(loop.accumulate)]
        report = train_step(state, batch, run)
        state.position += loop.accumulate
        state.elapsed, signum = agree(fabric, state.elapsed + time.perf_counter() - started, stop.signum)
        done = _progress(state, run)
        last = done >= 1 or signum > 0
        rate = (state.step - logged[0]) * images_per_step / max(state.elapsed - logged[1], 1e-9)
        log.advance(state.step, loop.steps, done, rate)

        if state.step % loop.log_every == 0 or last:
            log.write(_train_record(state, report, rate), done)
            logged = state.step, state.elapsed

        if first and (state.step % loop.save_every == 0 or last):
            save_state(given.out / "state", state)

        if not signum and _validation_is_due(state, run):
            signum = _look(state, session)
            if signum and first:
                save_state(given.out / "state", state)
    _publish(state, given.out)
    fabric.barrier()
    return signum


def _validation_is_due(state: TrainState, run: TokenizerRun) -> bool:
    return state.step % run.loop.val_every == 0 or _progress(state, run) >= 1


def _look(state: TrainState, session: _Session) -> int:
    """Validates, draws held-out images and publishes; a signal ends that, and its number is returned.

    The log comes last: what it tells of is there.
    """
    given, fabric = session.given, state.fabric
    found = validate(state, given.inputs.val, given.run, lambda: session.agreed_signal(fabric) > 0)
    if found is None:
        return session.agreed_signal(fabric)
    if fabric.is_global_zero:
        draw_held_out(given.out / "images" / f"step_{state.step:07d}.png", state, given.inputs.val, given.run)
    _publish(state, given.out)
    for count, values in found.items():
        session.log.write(
            {"kind": "val", "step": state.step, "num_tokens": count, **values}, _progress(state, given.run)
        )
    return 0


def _publish(state: TrainState, out: Path) -> None:
    if state.fabric.is_global_zero:
        model: MergeVQ = state.ema.module  # type: ignore[assignment]
        model.save_pretrained(out / "model.safetensors", step=state.step, force=True)


def _progress(state: TrainState, run: TokenizerRun) -> float:
    return run_progress(state.step, state.elapsed, run.loop.steps, run.loop.minutes)


def _headline(state: TrainState, given: _Given) -> str:
    parameters = sum(p.numel() for p in state.model.parameters()) / 1e6
    limit = f" or {given.run.loop.minutes:g} minutes" if given.run.loop.minutes > 0 else ""
    return (
        f"{parameters:.1f} million parameters on {state.fabric.world_size} x {state.fabric.device.type}, "
        f"{len(given.inputs.train):,} images and {len(given.inputs.val):,} held out, "
        f"from step {state.step} to {given.run.loop.steps}{limit}, into {given.out}"
    )


def _train_record(state: TrainState, report: StepReport, rate: float) -> dict[str, Any]:
    record = {"kind": "train", "step": state.step, "num_tokens": report.num_tokens, **report.values, "lr": report.lr}
    if "disc_grad_norm" in report.values:
        record["disc_lr"] = report.disc_lr
    return {**record, "images_per_second": rate, "elapsed": state.elapsed}
