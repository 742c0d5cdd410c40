"""Training a generator: `train_step` is the mathematics, `train_generator` the run around it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergevq.configuration import check_is
from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import HardwareConfig
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_loss import draw_noise, real_tokens
from mergevq.training.generator_state import GeneratorState, build_state, check_init, start_from
from mergevq.training.generator_validation import draw_samples, validate
from mergevq.training.loop import Plan, check_start, run_training
from mergevq.training.optim import clip_gradients, gradient_norm, lr_factor, run_progress, set_lr
from mergevq.training.processes import agreed_values, build_fabric
from mergevq.training.token_inputs import TokenInputs, open_tokens, token_stream


class StepReport(NamedTuple):
    """What one optimizer step did."""

    lr: float
    """Learning rate."""
    values: dict[str, float]
    """Loss, cross-entropy of each bit group in nats a token, gradient norm: over all micro-batches and processes."""


def train_step(state: GeneratorState, batch: Sequence[TokenBatch], run: GeneratorRun) -> StepReport:
    """Takes one optimizer step. Every token counts the same, whatever micro-batch or process it is in.

    The weights and their average change at the end, or not at all if any number is not finite. Dropout, dropped classes
    and random orders depend on the seed, the step and the process alone; global random state is put back.

    Args:
        state: changed in place.
        batch: the micro-batches of this process, on its device.
        run: what to minimise.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite on some process; all processes raise it.
    """
    fabric, optim = state.fabric, run.optim
    progress = run_progress(state.step, state.elapsed, run.loop.steps, run.loop.minutes)
    lr = optim.lr * lr_factor(progress, state.step, optim)
    seed = int(torch.randint(2**62, (), generator=state.rng))
    total = _tokens_of_each_process(fabric, batch, run)
    means: dict[str, Tensor] = {}

    state.optimizer.zero_grad()
    gpu = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpu):
        _seed_dropout(seed + fabric.global_rank, fabric.device)
        for i, micro in enumerate(batch):
            classes, order = draw_noise(micro, run.model, seed, i * fabric.world_size + fabric.global_rank)
            # Forward and backward both belong inside: processes average their gradients once, at the last micro-batch.
            with fabric.no_backward_sync(state.step_module, enabled=i + 1 < len(batch)):
                terms = state.step_module(micro, classes, order, total)
                fabric.backward(terms["loss"])
            for name, value in terms.items():
                part = value.detach().double()
                means[name] = means[name] + part if name in means else part
    means["grad_norm"] = gradient_norm(state.model.parameters())
    values = agreed_values(fabric, means, f"optimizer step {state.step}")

    # From here on the weights change.
    set_lr(state.optimizer, lr)
    clip_gradients(state.model.parameters(), optim.clip_norm, means["grad_norm"])
    state.optimizer.step()
    state.ema.update_parameters(state.model)
    state.step += 1
    return StepReport(lr, values)


def _seed_dropout(seed: int, device: torch.device) -> None:
    # Not torch.manual_seed: that would seed all GPUs.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _tokens_of_each_process(fabric: Any, batch: Sequence[TokenBatch], run: GeneratorRun) -> Tensor:
    """Returns how many tokens are predicted in the step, a mean over the processes, which average their gradients."""
    if run.model.order == "raster":
        return torch.tensor(float(sum(micro["source"].numel() for micro in batch)), device=fabric.device)
    count = torch.stack([real_tokens(micro).sum() for micro in batch]).sum().float()
    total: Tensor = fabric.all_reduce(count, reduce_op="mean")
    return total


def train_generator(
    run: GeneratorRun,
    out: str | Path,
    *,
    resume: bool = False,
    init: str | Path | None = None,
    force: bool = False,
    tokenizer: MergeVQ | str | Path | None = None,
    cache: TokenCache | None = None,
    val_cache: TokenCache | None = None,
    hardware: HardwareConfig | None = None,
) -> Path:
    """Trains a generator and returns its file, `out/model.safetensors`: the averaged weights.

    Also in `out`: `run.json` (the configuration, with what the tokens decide), `log.jsonl`, `images/` (samples, if
    there is a tokenizer to draw them), and `state/`, from which `resume` goes on as if nothing had happened. SIGTERM
    and Ctrl-C finish the optimizer step, save and stop.

    Args:
        run: what to train; see `mergevq.presets.generator`. Grid, bits, classes and numbers of kept tokens come from
            the tokens.
        out: a folder for the run, new or empty.
        resume: go on with the run in `out`.
        init: start from the weights of this generator (a file, a folder or a hub id).
        force: start anew in a folder that holds something; an earlier run's files are removed.
        tokenizer: the one that made the tokens, instead of `run.data.tokenizer`; a model, or the name of one.
        cache: tokens to train on, instead of `run.data.tokens`.
        val_cache: held-out tokens, instead of `run.data.val_tokens`.
        hardware: devices; by default one GPU, or the CPU.

    Raises:
        OutputExistsError: `out` is not empty, and neither `resume` nor `force` is given.
        ConfigError: the run does not make sense, or `resume` with another configuration.
        TokenFileError: a cache is missing, empty or damaged, or another tokenizer made it.
        DataError: held-out tokens of another kind or too few, no images, or `resume` with other ones or other tokens.
        CheckpointError: nothing to resume, or what is there does not fit; or there is no such tokenizer or generator.
        MissingDependencyError: mergevq was installed without its train extra.
        NonFiniteLossError: a loss became NaN or infinite; the last saved state is whole.
        TrainingStopped: a signal stopped the run and its state was saved; a SystemExit with 128 + the signal's number.
    """
    check_is(run, GeneratorRun, "presets.generator(name) is one")
    out = Path(out)
    fabric = build_fabric(hardware or HardwareConfig())
    run, inputs = open_tokens(run, cache, val_cache, tokenizer, fabric.world_size)
    fits, first = partial(check_init, run.model), fabric.is_global_zero
    check_start(out, run, resume=resume, init=init, force=force, check_init=fits, first=first)
    images = {"train": len(inputs.train), "val": len(inputs.val)}
    notices: tuple[str, ...] = ()
    if run.model.order == "random" and inputs.tokenizer is not None and inputs.tokenizer.recovery is None:
        notices = ("no pictures of samples: this tokenizer has no recovery, which random order needs",)
    build = partial(_GeneratorTraining, run, inputs)
    caches = {"tokens": inputs.train.fingerprint} if isinstance(inputs.train, TokenCache) else {}
    return run_training(fabric, Plan(run, out, build, images, resume, init, notices, caches))


class _GeneratorTraining:
    """What the loop asks of the training of a generator."""

    def __init__(self, run: GeneratorRun, inputs: TokenInputs, fabric: Any) -> None:
        self.run = run
        self.inputs = inputs.on(fabric.device)
        self.state = build_state(fabric, run)

    def start_from(self, name: str | Path) -> list[str]:
        return start_from(self.state, name)

    def batches(self) -> Iterator[TokenBatch]:
        fabric = self.state.fabric
        return token_stream(self.run, self.inputs, fabric.global_rank, fabric.world_size, self.state.position)

    def step(self, batch: list[TokenBatch]) -> dict[str, Any]:
        report = train_step(self.state, batch, self.run)
        return {**report.values, "lr": report.lr}

    def validate(self, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        found = validate(self.state, self.inputs, self.run, stop)
        return None if found is None else [{"num_tokens": count, **values} for count, values in found.items()]

    def draw(self, path: Path) -> None:
        draw_samples(path, self.state, self.inputs.tokenizer, self.run)

    def publish(self, path: Path) -> None:
        model: Any = self.state.ema.module
        model.save_pretrained(path, step=self.state.step, force=True)
