"""Looking at a generator under the averaged weights: cross-entropies of held-out tokens, and a picture of samples."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergevq.data.augment import sample_rng
from mergevq.data.token_cache import TokenBatch
from mergevq.errors import DataError, ShapeError
from mergevq.evaluation.token_map import contact_sheet
from mergevq.files import atomic_path
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.quantize import split_index
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.generator_config import GeneratorRun
from mergevq.training.generator_loss import group_losses, known_classes, predict, random_order
from mergevq.training.generator_state import GeneratorState
from mergevq.training.token_inputs import TokenInputs, held_out_tokens

_CELL = 96  # Side of each picture, in pixels.


@torch.no_grad()
def validate(
    state: GeneratorState, inputs: TokenInputs, run: GeneratorRun, stop: Callable[[], bool] = lambda: False
) -> dict[int, dict[str, float]] | None:
    """Returns for each K of `run.loop.val_num_tokens` the cross-entropies of the averaged weights, in float32.

    In nats a token, without label smoothing: "loss", its part in each bit group ("group_0" ...); in raster order also
    "first" and "duplicate", the loss at tokens whose index is new in the image and at the others, and "duplicates",
    the share of those; and "accuracy", how often the most probable values of all bit groups are right. The processes
    share the images; random orders are the same in every validation.

    Args:
        state: read only.
        inputs: held-out tokens; `run.loop.val_images` images are looked at.
        run: names K's.
        stop: asked before each batch, as often on every process, which all have to get the same answer; if it is true,
            validation is given up and None returned.

    Raises:
        DataError: none of the images can be read, by any process; all processes raise it.
    """
    fabric, loop = state.fabric, run.loop
    model = _averaged(state)
    groups = len(model.config.groups)
    largest_share = math.ceil(min(loop.val_images, len(inputs.val)) / fabric.world_size)
    result = {}
    for count in loop.val_num_tokens:
        batches = held_out_tokens(run, inputs, count, fabric.global_rank, fabric.world_size)
        sums, failure = torch.zeros(2, groups + 2, dtype=torch.float64, device=fabric.device), None
        # As many rounds on every process, though their shares may differ by an image, or by unreadable ones.
        for _ in range(math.ceil(largest_share / loop.batch_size)):
            if stop():
                return None
            try:
                batch = next(batches, None)
            except DataError as error:  # Perhaps other processes have readable images.
                batch, failure, batches = None, error, iter(())
            if batch is not None:
                sums += _sums(model, {name: fabric.to_device(tensor) for name, tensor in batch.items()}, count)
        sums = fabric.all_reduce(sums, reduce_op="sum").cpu()
        if sums[:, 0].sum() == 0:
            raise failure or DataError("expected a readable held-out image, got none: look at the files")
        result[count] = _named(sums, model.config.order == "raster")
    return result


def _sums(model: MergeAR | RandomAR, batch: TokenBatch, count: int) -> Float[Tensor, "2 n"]:
    """Returns sums over tokens that are the first of their kind, and over duplicates: 1, right, loss of each group."""
    order = None
    if isinstance(model, RandomAR):
        rngs = [sample_rng(0, count, number) for number in batch["number"].tolist()]
        order = random_order(batch, rngs, model.config)
    logits, index, counted = predict(model, batch, known_classes(batch, model.config), order)
    truth, _ = group_losses(logits, index, model.config.groups)
    parts = split_index(index, model.config.groups)
    right = torch.stack([values.argmax(-1) for values in logits], -1).eq(parts).all(-1)
    columns = torch.cat([torch.ones_like(truth[..., :1]), right[..., None], truth], -1).double()
    first = _is_first(index)
    return torch.stack([(columns * (kind & counted)[..., None]).sum((0, 1)) for kind in (first, ~first)])


def _is_first(index: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Returns which tokens have an index that no earlier one of the image has."""
    return ~(index[:, :, None] == index[:, None]).tril(-1).any(2)


def _named(sums: Float[Tensor, "2 n"], kinds: bool) -> dict[str, float]:
    number, right, *groups = (sums.sum(0) / sums[:, 0].sum()).tolist()
    assert number == 1
    result = {"loss": sum(groups), **{f"group_{i}": value for i, value in enumerate(groups)}, "accuracy": right}
    if kinds:
        for name, row in (("first", sums[0]), ("duplicate", sums[1])):
            if row[0] > 0:
                result[name] = float(row[2:].sum() / row[0])
        result["duplicates"] = float(sums[1, 0] / sums[:, 0].sum())
    return result


@torch.no_grad()
def draw_samples(path: Path, state: GeneratorState, tok: MergeVQ | None, run: GeneratorRun) -> None:
    """Writes a picture with a row of samples for each of a few classes; the noise is the same in every picture.

    Nothing is written without a tokenizer, with `run.loop.sample_classes` 0, or if the network's numbers are not
    finite.

    Args:
        path: PNG file, replaced.
        state: its averaged weights draw.
        tok: decodes the tokens; needs recovery for random order.
        run: says how many and of what guidance.
    """
    if not draws_samples(tok, run):
        return
    assert tok is not None
    model, loop = _averaged(state), run.loop
    names, classes = _rows(model, loop.sample_classes)
    each = [c for c in classes for _ in range(loop.sample_images)]
    try:
        tokens = model.generate(
            each if model.config.num_classes else None,
            num_images=len(each),
            guidance=loop.sample_guidance if model.config.num_classes else 1.0,
            seeds=range(len(each)),
        )
        images = tok.decode(tokens).cpu()
    except ShapeError:  # Not finite, which the log tells.
        return
    rows = [list(row) for row in images.split(loop.sample_images)]
    sheet = contact_sheet(rows, row_titles=names, cell=max(_CELL, images.shape[-1]))
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def draws_samples(tok: MergeVQ | None, run: GeneratorRun) -> bool:
    """Whether there are pictures of samples: they need a tokenizer, for random order one that predicts sources."""
    wanted = run.loop.sample_classes > 0 and run.loop.sample_images > 0
    return wanted and tok is not None and (run.model.order == "raster" or tok.recovery is not None)


def _rows(model: MergeAR | RandomAR, most: int) -> tuple[list[str], list[int]]:
    """Returns names and numbers of some classes, evenly spread; one row without a name if there are none."""
    config = model.config
    if config.num_classes == 0:
        return [""], [0]
    count = min(most, config.num_classes)
    classes = [i * config.num_classes // count for i in range(count)]
    return [config.class_names[c] if config.class_names else str(c) for c in classes], classes


def _averaged(state: GeneratorState) -> MergeAR | RandomAR:
    model: MergeAR | RandomAR = state.ema.module  # type: ignore[assignment]
    return model
