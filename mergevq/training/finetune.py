"""Fine-tuning: the encoder of a tokenizer and a linear head, trained together to classify labelled images."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergevq.configuration import check_is
from mergevq.data.augment import sample_rng
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch
from mergevq.files import write_json
from mergevq.tokenizer.classifier import Classifier
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import HardwareConfig
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.finetune_inputs import FinetuneInputs, classifier_config, open_inputs, resolve, stream
from mergevq.training.finetune_noise import draw_branch_scales, drop_path_rates, mix
from mergevq.training.finetune_result import fingerprints, log_record, to_json
from mergevq.training.finetune_state import ClassifierLoss, FinetuneState, build_state, check_init, start_from
from mergevq.training.finetune_validation import Accuracy, validate
from mergevq.training.loop import Plan, check_start, run_training
from mergevq.training.optim import clip_gradients, gradient_norm, lr_factor, run_progress, set_lr
from mergevq.training.processes import agreed_values, build_fabric


def train_step(state: FinetuneState, batch: Sequence[Batch], run: FinetuneRun) -> dict[str, float]:
    """Takes one optimizer step and returns loss, accuracy, gradient norm and the head's learning rate.

    What is left out and mixed depends on the seed, the step and the place in it alone: which branches of an image, on
    its place in the step however its images are spread over micro-batches and processes; what is mixed, on the
    micro-batch.

    Args:
        state: changed in place.
        batch: the micro-batches of this process, on its device, all of one size. Losses are divided by their number.
        run: how to step, as `resolve` returns it.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite on some process; all processes raise it, and no weight
            has changed.
    """
    fabric, size = state.fabric, len(batch[0]["image"])
    seed = int(torch.randint(2**62, (), generator=state.rng))
    scales = None
    if run.model.drop_path > 0:
        rates = drop_path_rates(run.model.drop_path, len(state.model.encoder.blocks))
        scales = draw_branch_scales(rates, len(batch) * fabric.world_size * size, sample_rng(seed, 0, 0))

    state.optimizer.zero_grad()
    found = []
    for i, micro in enumerate(batch):
        part = i * fabric.world_size + fabric.global_rank
        rng = sample_rng(seed, 1, part)
        images, targets = mix(micro["image"], micro["label"], len(run.model.class_names), run.loss, rng)
        scale = None
        if scales is not None:
            scale = scales[part * size : (part + 1) * size].permute(1, 2, 0).to(images.device)
        # Forward and backward both belong inside: processes average their gradients once, at the last micro-batch.
        with fabric.no_backward_sync(state.wrapped, enabled=i + 1 < len(batch)):
            out: ClassifierLoss = state.wrapped(images, targets, scale)
            fabric.backward(out.loss / len(batch))
        found.append(torch.stack([out.loss.detach().double(), out.accuracy.double()]))
    loss, accuracy = torch.stack(found).mean(0)
    norm = gradient_norm(state.model.parameters())
    means = {"loss": loss, "accuracy": accuracy, "grad_norm": norm}
    values = agreed_values(fabric, means, f"optimizer step {state.step}")

    # From here on the weights change.
    progress = run_progress(state.step, state.elapsed, run.loop.steps, run.loop.minutes)
    lr = run.optim.lr * lr_factor(progress, state.step, run.optim)
    set_lr(state.optimizer, lr)
    clip_gradients(state.model.parameters(), run.optim.clip_norm, norm)
    state.optimizer.step()
    state.ema.update_parameters(state.model)
    state.step += 1
    return {**values, "lr": lr}


def finetune(
    run: FinetuneRun,
    out: str | Path,
    *,
    tokenizer: str | Path | MergeVQ | None = None,
    train_data: ImageFolder | None = None,
    val_data: ImageFolder | None = None,
    resume: bool = False,
    init: str | Path | None = None,
    force: bool = False,
    hardware: HardwareConfig | None = None,
) -> Path:
    """Fine-tunes a tokenizer's encoder to classify images, and returns `out/model.safetensors`: a `Classifier` of the
    averaged weights.

    Also in `out`: `result.json` (what that model gets right of the held-out images, and the whole protocol),
    `run.json`, `log.jsonl` and `state/`. Validation looks at `run.loop.val_images` held-out images, the last one at
    all. Resuming and signals are as in `train_tokenizer`. The tokenizer is not changed.

    Args:
        run: what to train; see `mergevq.presets.finetune`.
        out: a folder for the run, new or empty.
        tokenizer: a file, a folder, a hub id or a model, instead of `run.data.tokenizer`.
        train_data: labelled images, instead of `run.data.train`.
        val_data: held-out images of the same classes, instead of `run.data.val`; needed with `train_data`.
        resume: go on with the run in `out`.
        init: start from this classifier (a file, a folder or a hub id) instead of the tokenizer and a new head.
        force: start anew in a folder that holds something; an earlier run's files are removed.
        hardware: devices; by default one GPU, or the CPU.

    Raises:
        OutputExistsError: `out` is not empty, and neither `resume` nor `force` is given.
        ConfigError: the run does not make sense, K is not in 1..L, or `resume` with another configuration.
        DataError: images or labels are missing, there is one class only, or held-out images are of a class that is not
            trained on; or `resume` with other images.
        CheckpointError: there is no such tokenizer, nothing to resume, or what is there does not fit.
        MissingDependencyError: mergevq was installed without its train extra.
        NonFiniteLossError: a loss became NaN or infinite; the last saved state is whole.
        TrainingStopped: a signal stopped the run and its state was saved; a SystemExit with 128 + the signal's number.

    Reference: appendix A.4 of the paper.
    """
    check_is(run, FinetuneRun, "presets.finetune(name) is one")
    out = Path(out)
    fabric = build_fabric(hardware or HardwareConfig())
    inputs = open_inputs(run, out, tokenizer, train_data, val_data, fabric.world_size)
    run = resolve(run, inputs)
    fits, first = partial(check_init, classifier_config(run, inputs.tok.config)), fabric.is_global_zero
    check_start(out, run, resume=resume, init=init, force=force, check_init=fits, first=first)
    images = {"train": len(inputs.train), "val": len(inputs.val)}
    model = run.model
    merged = "" if model.num_tokens < _patches(run, inputs) else ", nothing merged"
    notice = f"{len(model.class_names)} classes by {model.features} features at K = {model.num_tokens}{merged}"
    build = partial(_Finetuning, run, inputs)
    return run_training(fabric, Plan(run, out, build, images, resume, init, (notice,)))


def _patches(run: FinetuneRun, inputs: FinetuneInputs) -> int:
    return int((run.model.image_size // inputs.tok.config.downsampling) ** 2)


class _Finetuning:
    """What the loop asks of fine-tuning."""

    def __init__(self, run: FinetuneRun, inputs: FinetuneInputs, fabric: Any) -> None:
        self.run = run
        self.inputs = inputs
        self.state = build_state(fabric, run, inputs.tok)
        # Once and first, as it takes a while on many images, and a file may be gone later.
        self._prints = fingerprints(inputs) if fabric.is_global_zero else {}
        self._found: tuple[int, Accuracy] | None = None
        """The last validation, and the step it was made at."""

    @property
    def _averaged(self) -> Classifier:
        model: Classifier = self.state.ema.module  # type: ignore[assignment]
        return model

    def start_from(self, name: str | Path) -> list[str]:
        start_from(self.state, name)
        return []

    def batches(self) -> Iterator[Batch]:
        fabric = self.state.fabric
        return stream(self.run, self.inputs.train, fabric.global_rank, fabric.world_size, self.state.position)

    def step(self, batch: list[Batch]) -> dict[str, Any]:
        return dict(train_step(self.state, batch, self.run))

    def validate(self, stop: Callable[[], bool]) -> list[dict[str, Any]] | None:
        state, loop = self.state, self.run.loop
        last = run_progress(state.step, state.elapsed, loop.steps, loop.minutes) >= 1
        limit = len(self.inputs.val) if last else loop.val_images
        found = validate(state.fabric, self._averaged, self.inputs.val, self.run, limit, stop)
        if found is None:
            return None
        self._found = state.step, found
        return [log_record(found)]

    def draw(self, path: Path) -> None:
        """Draws nothing: a classifier makes no images."""

    def publish(self, path: Path) -> None:
        self._averaged.save_pretrained(path, step=self.state.step, force=True)
        if self._found is not None and self._found[0] == self.state.step:
            result = to_json(self.run, self.inputs, self.state, self._found[1], self._prints)
            write_json(path.with_name("result.json"), result)
