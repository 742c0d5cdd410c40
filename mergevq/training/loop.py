"""The loop of a run, whatever is trained: folder, processes, resuming, signals, log, saving, validating, publishing."""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from mergevq.errors import ConfigError
from mergevq.training.checkpoint import SavedState, load_state, save_state
from mergevq.training.config import Run
from mergevq.training.log import RunLog, truncate_log, validated_steps
from mergevq.training.optim import run_progress
from mergevq.training.precision import choose_dtype
from mergevq.training.processes import agree, deterministic_kernels
from mergevq.training.run_folder import begin, check_folder, check_images
from mergevq.training.signals import StopRequest, TrainingStopped


@runtime_checkable
class Training(Protocol):
    """What the loop asks of a training; each process has one, and all are asked the same together but for `draw` and
    `publish`, which are the first process's.
    """

    @property
    def state(self) -> SavedState:
        """What is saved, and what resuming puts back."""
        ...

    def start_from(self, name: str | Path) -> list[str]:
        """Takes the weights of a model that was trained before; returns notices for the user."""
        ...

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Returns the micro-batches of this process without end, from number `state.position` on."""
        ...

    def step(self, batch: list[dict[str, Tensor]]) -> dict[str, Any]:
        """Takes one optimizer step and returns its log record, but for kind, step, rate and time."""
        ...

    def validate(self, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        """Returns log records of held-out samples, but for kind and step; None if `stop` became true on the way."""
        ...

    def draw(self, path: Path) -> None:
        """Writes a picture of what the averaged weights do to a PNG file; or nothing, if there is nothing to see."""
        ...

    def publish(self, path: Path) -> None:
        """Writes the averaged weights as a model file."""
        ...


class Plan(NamedTuple):
    """What each process of a run is started with."""

    run: Run
    out: Path
    build: Callable[[Any], Training]
    """Makes the training at step 0 from the launched lightning.Fabric; picklable, if processes are spawned."""
    images: dict[str, int]
    """Numbers of samples, "train" and "val"."""
    resume: bool
    init: str | Path | None
    notices: tuple[str, ...] = ()
    """What the user is told at the start."""
    caches: Mapping[str, str] = {}
    """Fingerprint of each cache that is trained on, by its name in the run's `data`: tokens, teacher_cache."""


def check_start(
    out: Path,
    run: Run,
    *,
    resume: bool,
    init: str | Path | None,
    force: bool,
    check_init: Callable[[str | Path], object],
    first: bool = True,
) -> None:
    """Checks, before any work is done, that a run may begin in `out`, or go on there. Writes nothing.

    Args:
        out: folder of the run.
        run: its configuration.
        resume: whether it goes on there.
        init: the model whose weights it starts from.
        force: whether it may replace what is there.
        check_init: raises if it cannot start from that model.
        first: whether this process is the one that looks.

    Raises:
        OutputExistsError, CheckpointError, ConfigError: it may not; see `check_folder`.
    """
    if resume and init is not None:
        raise ConfigError("expected one of --resume (go on) and --init (start from a model), got both")
    if first:
        check_folder(out, run, resume, force)
        if init is not None:
            check_init(init)


def run_training(fabric: Any, plan: Plan) -> Path:
    """Starts the processes, trains to the end, and returns the model's file.

    Raises:
        DataError: the run goes on with other images, tokens or teacher's features.
        CheckpointError: the state to resume from does not fit.
        NonFiniteLossError: a loss became NaN or infinite; the last saved state is whole.
        TrainingStopped: a signal stopped the run and its state was saved.
    """
    if plan.resume:
        check_images(plan.out, plan.run, plan.caches, **plan.images)
    outcome: _Outcome = fabric.launch(_train, plan)
    if outcome.signum:
        # Other processes end well: their launcher kills the first one if they do not.
        raise TrainingStopped(outcome.signum, outcome.step, quiet=not fabric.is_global_zero)
    return outcome.model


class _Session(NamedTuple):
    """What the loop of one process works with."""

    plan: Plan
    training: Training
    log: RunLog
    stop: StopRequest
    validated: set[int]
    """Steps that an earlier part of the run has validated."""

    def agreed_signal(self) -> int:
        """Returns the number of a signal that reached some process, or 0; all processes have to ask together."""
        return agree(self.training.state.fabric, 0.0, self.stop.signum)[1]

    def progress(self) -> float:
        """Returns how much of the run is done, 0 to 1."""
        return _progress(self.training.state, self.plan.run)


class _Outcome(NamedTuple):
    model: Path
    signum: int
    step: int


def _train(fabric: Any, plan: Plan) -> _Outcome:
    """The life of one process of a run."""
    run, out = plan.run, plan.out
    gpu = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpu), deterministic_kernels(run.loop.deterministic):
        torch.manual_seed(run.loop.seed)
        training = plan.build(fabric)
        state = training.state
        _, notice = choose_dtype(run.loop.precision, fabric.device)
        notices = [*plan.notices, *([notice] if notice else [])]
        if plan.resume:
            load_state(out / "state", state)
        elif plan.init is not None:
            notices += training.start_from(plan.init)
        # Before the barrier, behind which the first process writes to the log: all have to read the same.
        validated = validated_steps(out / "log.jsonl") if plan.resume else set()
        fabric.barrier()
        if fabric.is_global_zero:
            begin(out, run, plan.resume, plan.caches, **plan.images)
            truncate_log(out / "log.jsonl", state.step)
        with RunLog(out / "log.jsonl", _progress(state, run), fabric.is_global_zero) as log, StopRequest() as stop:
            for text in (_headline(state, plan), *notices):
                log.say(text)
            signum = _loop(_Session(plan, training, log, stop, validated))
            if signum:
                log.say(str(TrainingStopped(signum, state.step)))
    return _Outcome(out / "model.safetensors", signum, state.step)


def _loop(session: _Session) -> int:
    """Trains to the end, or to a signal whose number it returns."""
    plan, training, log, stop, validated = session
    state, loop = training.state, plan.run.loop
    fabric, first = state.fabric, state.fabric.is_global_zero
    batches = training.batches()
    images_per_step = loop.batch_size * loop.accumulate * fabric.world_size
    done, signum = session.progress(), 0
    logged = state.step, state.elapsed
    if state.step > 0 and state.step not in validated and _validation_is_due(session):
        signum = _look(session)  # The state was saved, and the process died before it had validated.
    while done < 1 and not signum:
        started = time.perf_counter()
        batch = [fabric.to_device(next(batches)) for _ in range(loop.accumulate)]
        record = training.step(batch)
        state.position += loop.accumulate
        state.elapsed, signum = agree(fabric, state.elapsed + time.perf_counter() - started, stop.signum)
        done = session.progress()
        last = done >= 1 or signum > 0
        rate = (state.step - logged[0]) * images_per_step / max(state.elapsed - logged[1], 1e-9)
        log.advance(state.step, loop.steps, done, rate)

        if state.step % loop.log_every == 0 or last:
            record = {"kind": "train", "step": state.step, **record}
            log.write({**record, "images_per_second": rate, "elapsed": state.elapsed}, done)
            logged = state.step, state.elapsed

        if first and (state.step % loop.save_every == 0 or last):
            save_state(plan.out / "state", state)

        if not signum and _validation_is_due(session):
            signum = _look(session)
            if signum and first:
                save_state(plan.out / "state", state)
    _publish(session)
    fabric.barrier()
    return signum


def _validation_is_due(session: _Session) -> bool:
    return session.training.state.step % session.plan.run.loop.val_every == 0 or session.progress() >= 1


def _look(session: _Session) -> int:
    """Validates, draws and publishes; a signal ends that, and its number is returned.

    The log comes last: what it tells of is there.
    """
    plan, training, step = session.plan, session.training, session.training.state.step
    found = training.validate(lambda: session.agreed_signal() > 0)
    if found is None:
        return session.agreed_signal()
    if training.state.fabric.is_global_zero:
        training.draw(plan.out / "images" / f"step_{step:07d}.png")
    _publish(session)
    for record in found:
        session.log.write({"kind": "val", "step": step, **record}, session.progress())
    return 0


def _publish(session: _Session) -> None:
    if session.training.state.fabric.is_global_zero:
        session.training.publish(session.plan.out / "model.safetensors")


def _progress(state: SavedState, run: Run) -> float:
    return run_progress(state.step, state.elapsed, run.loop.steps, run.loop.minutes)


def _headline(state: SavedState, plan: Plan) -> str:
    parameters = sum(p.numel() for p in state.model.parameters()) / 1e6
    limit = f" or {plan.run.loop.minutes:g} minutes" if plan.run.loop.minutes > 0 else ""
    return (
        f"{parameters:.1f} million parameters on {state.fabric.world_size} x {state.fabric.device.type}, "
        f"{plan.images['train']:,} images and {plan.images['val']:,} held out, "
        f"from step {state.step} to {plan.run.loop.steps}{limit}, into {plan.out}"
    )
