"""Training recovery on cached tokens, the tokenizer frozen: it learns which kept token each patch belongs to."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mergevq.configuration import check_is
from mergevq.data.token_batches import token_batches
from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.errors import CheckpointError, ConfigError
from mergevq.files import load_strict, read_header
from mergevq.losses.recovery import RecoveryLoss, recovery_loss
from mergevq.model_files import find_model_file
from mergevq.quantize import index_to_codes
from mergevq.tokenizer.config import RecoveryConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.model_file import read_config
from mergevq.tokenizer.recovery import SourceRecovery, fit_queries
from mergevq.training.config import HardwareConfig
from mergevq.training.loop import Plan, check_start, run_training
from mergevq.training.optim import (
    average_weights,
    build_adamw,
    clip_gradients,
    gradient_norm,
    lr_factor,
    run_progress,
    set_lr,
)
from mergevq.training.precision import autocast, choose_dtype
from mergevq.training.processes import agreed_values, build_fabric
from mergevq.training.recovery_config import RecoveryRun
from mergevq.training.recovery_inputs import RecoveryInputs, goes_on, open_inputs, resolve
from mergevq.training.recovery_validation import draw_held_out, validate


class RecoveryStep(nn.Module):
    """Everything recovery minimises, in one forward.

    Args:
        recovery: what is trained.
        num_bits: of a codebook index.
        grid: rows and columns of patches.
        dtype: arithmetic of the network; the logits' softmax is float32.
    """

    def __init__(
        self, recovery: SourceRecovery, num_bits: int, grid: tuple[int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.recovery = recovery
        self.num_bits, self.grid, self.dtype = num_bits, grid, dtype

    def forward(self, batch: TokenBatch) -> RecoveryLoss:
        """Returns the loss of one micro-batch of any mix of K."""
        with autocast(batch["index"].device, self.dtype):
            logits = self.recovery(index_to_codes(batch["index"], self.num_bits), batch["num_tokens"], self.grid)
        return recovery_loss(logits, batch["source"], batch["index"])


@dataclass
class RecoveryState:
    """The training of a recovery between two optimizer steps."""

    fabric: Any
    """The lightning.Fabric that wrapped the modules."""
    model: SourceRecovery
    """The weights being trained."""
    ema: AveragedModel
    """Their average; `ema.module` is what is validated and published."""
    wrapped: nn.Module
    """The wrapped `RecoveryStep` around `model`."""
    optimizer: torch.optim.Optimizer
    rng: torch.Generator
    """Draws nothing: the order of the tokens depends on the seed alone."""
    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Micro-batches that each process has taken from its data since the beginning."""
    elapsed: float = 0.0
    """Seconds spent in training steps, the same on all processes."""

    def modules(self) -> dict[str, nn.Module]:
        """Returns everything with weights that change, by the name it has in the file."""
        return {"model": self.model, "ema": self.ema}

    def optimizers(self) -> dict[str, tuple[Any, nn.Module]]:
        """Returns the optimizer with the module whose parameters it moves."""
        return {"optimizer": (self.optimizer, self.model)}


def build_state(fabric: Any, run: RecoveryRun, inputs: RecoveryInputs) -> RecoveryState:
    """Returns a training at step 0: from the tokenizer's own recovery, or from weights that depend on `run.loop.seed`.

    Args:
        fabric: a launched lightning.Fabric.
        run: what to build, as `resolve` returns it.
        inputs: tokenizer and tokens.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the GPUs too, which fork_rng does not put back here.
        torch.default_generator.manual_seed(run.loop.seed)
        model = SourceRecovery(replace(inputs.tok.config, recovery=run.recovery))
    if inputs.tok.recovery is not None and goes_on(run, inputs.tok):
        model.load_state_dict(inputs.tok.recovery.state_dict())
    dtype, _ = choose_dtype(run.loop.precision, fabric.device)
    step = RecoveryStep(model, inputs.train.num_bits, inputs.train.grid, dtype)
    fabric.to_device(step)
    ema = average_weights(model, run.optim.ema_decay)
    wrapped, optimizer = fabric.setup(step, build_adamw(model, run.optim.lr, run.optim))
    return RecoveryState(fabric, model, ema, wrapped, optimizer, torch.Generator().manual_seed(run.loop.seed))


def train_step(state: RecoveryState, batch: Sequence[TokenBatch], run: RecoveryRun) -> dict[str, float]:
    """Takes one optimizer step and returns loss, accuracy, gradient norm and learning rate.

    Args:
        state: changed in place.
        batch: the micro-batches of this process, on its device. Losses are divided by their number.
        run: how to step.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite on some process; all processes raise it, and no weight
            has changed.
    """
    state.optimizer.zero_grad()
    found = []
    for i, micro in enumerate(batch):
        # Forward and backward both belong inside: processes average their gradients once, at the last micro-batch.
        with state.fabric.no_backward_sync(state.wrapped, enabled=i + 1 < len(batch)):
            out: RecoveryLoss = state.wrapped(micro)
            state.fabric.backward(out.loss / len(batch))
        found.append(torch.stack([out.loss.detach().double(), out.accuracy.double()]))
    loss, accuracy = torch.stack(found).mean(0)
    norm = gradient_norm(state.model.parameters())
    means = {"recovery": loss, "recovery_accuracy": accuracy, "grad_norm": norm}
    values = agreed_values(state.fabric, means, f"optimizer step {state.step}")

    # From here on the weights change.
    progress = run_progress(state.step, state.elapsed, run.loop.steps, run.loop.minutes)
    lr = run.optim.lr * lr_factor(progress, state.step, run.optim)
    set_lr(state.optimizer, lr)
    clip_gradients(state.model.parameters(), run.optim.clip_norm, norm)
    state.optimizer.step()
    state.ema.update_parameters(state.model)
    state.step += 1
    return {**values, "lr": lr}


def train_recovery(
    run: RecoveryRun,
    out: str | Path,
    *,
    tokenizer: str | Path | MergeVQ | None = None,
    cache: str | Path | TokenCache | None = None,
    val_cache: str | Path | TokenCache | None = None,
    resume: bool = False,
    init: str | Path | None = None,
    force: bool = False,
    hardware: HardwareConfig | None = None,
) -> Path:
    """Trains a tokenizer's recovery and returns `out/model.safetensors`: the tokenizer with the averaged recovery.

    Its other weights and its fingerprint are those of the tokenizer that was given, which is not changed. If that has
    no recovery, it gets a new one of the shape of `run.recovery`; if it has one, that is trained further (unless
    `run.fine_tune` is off) and keeps its shape. What else is in `out`, resuming and signals are as in
    `train_tokenizer`.

    Args:
        run: what to train; see `mergevq.presets.recovery`.
        out: a folder for the run, new or empty.
        tokenizer: a file, a folder, a hub id or a model, instead of `run.data.tokenizer`.
        cache: folder of the tokens to train on, or the cache itself, instead of `run.data.tokens`.
        val_cache: the same of held-out images, instead of `run.data.val_tokens`.
        resume: go on with the run in `out`.
        init: start from the recovery of this tokenizer (a file, a folder or a hub id) instead.
        force: start anew in a folder that holds something; an earlier run's files are removed.
        hardware: devices; by default one GPU, or the CPU.

    Raises:
        OutputExistsError: `out` is not empty, and neither `resume` nor `force` is given.
        ConfigError: the run does not make sense, nothing was merged in the cached tokens, or `resume` with another
            configuration.
        TokenFileError: a cache is missing or damaged, or another tokenizer made it.
        DataError: there are fewer held-out images than processes, or `resume` with other tokens.
        CheckpointError: there is no such tokenizer, nothing to resume, or what is there does not fit.
        MissingDependencyError: mergevq was installed without its train extra.
        NonFiniteLossError: a loss became NaN or infinite; the last saved state is whole.
        TrainingStopped: a signal stopped the run and its state was saved; a SystemExit with 128 + the signal's number.
    """
    check_is(run, RecoveryRun, "presets.recovery(name) is one")
    out = Path(out)
    fabric = build_fabric(hardware or HardwareConfig())
    inputs = open_inputs(run, out, tokenizer, cache, val_cache, fabric.world_size)
    run = resolve(run, inputs)
    fits, first = partial(check_init, run.recovery), fabric.is_global_zero
    check_start(out, run, resume=resume, init=init, force=force, check_init=fits, first=first)
    images = {"train": len(inputs.train), "val": len(inputs.val)}
    start = "the recovery that the tokenizer has, trained further" if goes_on(run, inputs.tok) else "a new recovery"
    build = partial(_RecoveryTraining, run, inputs)
    notices = (f"{start}: {run.recovery}",)
    caches = {"tokens": inputs.train.fingerprint}
    return run_training(fabric, Plan(run, out, build, images, resume, init, notices, caches))


def check_init(wanted: RecoveryConfig, name: str | Path) -> None:
    """Checks that a run may start from the recovery of a tokenizer. Reads the header of its file only.

    Raises:
        CheckpointError: there is no such tokenizer, or it has no recovery.
        ConfigError: its recovery has another shape than `wanted`.
    """
    path = find_model_file(name)
    given = read_config(read_header(path), path).recovery
    if not given.enabled:
        raise CheckpointError(f"expected a tokenizer with a recovery model in {name}, it has none: start without it")
    if given != wanted:
        raise ConfigError(f"expected a recovery of this run's shape in {name} ({wanted}), got {given}")


class _RecoveryTraining:
    """What the loop asks of the training of a recovery."""

    def __init__(self, run: RecoveryRun, inputs: RecoveryInputs, fabric: Any) -> None:
        self.run = run
        self.inputs = inputs
        self.state = build_state(fabric, run, inputs)

    @property
    def _averaged(self) -> SourceRecovery:
        model: SourceRecovery = self.state.ema.module  # type: ignore[assignment]
        return model

    def start_from(self, name: str | Path) -> list[str]:
        check_init(self.run.recovery, name)
        given = MergeVQ.from_pretrained(name)
        assert given.recovery is not None
        rows, columns = self.state.model.queries.shape[-2:]
        tensors, notices = fit_queries(given.recovery, (rows, columns), str(name))
        for model in (self.state.model, self.state.ema.module):
            load_strict(model, tensors, str(name))
        return notices

    def batches(self) -> Iterator[TokenBatch]:
        fabric, loop = self.state.fabric, self.run.loop
        return token_batches(
            self.inputs.train,
            batch_size=loop.batch_size,
            seed=loop.seed,
            num_tokens=loop.num_tokens,
            num_tokens_probs=loop.num_tokens_probs,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            start_batch=self.state.position,
        )

    def step(self, batch: list[TokenBatch]) -> dict[str, Any]:
        return dict(train_step(self.state, batch, self.run))

    def validate(self, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        return validate(self.state.fabric, self._averaged, self.inputs.val, self.run.loop, stop)

    def draw(self, path: Path) -> None:
        draw_held_out(path, self.inputs.tok, self._averaged, self.inputs.val, self.run.loop.val_num_tokens)

    def publish(self, path: Path) -> None:
        tok = with_recovery(self.inputs.tok, self._averaged, self.run)
        tok.save_pretrained(path, step=self.state.step, force=True)


def with_recovery(tok: MergeVQ, recovery: SourceRecovery, run: RecoveryRun) -> MergeVQ:
    """Returns a tokenizer that shares all modules with `tok` but has a copy of `recovery`, built as `run` says."""
    with torch.device("meta"):
        model = MergeVQ(replace(tok.config, recovery=run.recovery))
    for name, module in tok.named_children():
        setattr(model, name, module)
    model.recovery = copy.deepcopy(recovery).to(tok.encoder.class_token.device)
    return model
