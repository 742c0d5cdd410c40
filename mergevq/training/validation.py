"""Looking at held-out images under the averaged weights: numbers, and a picture."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch, evaluation_batches
from mergevq.errors import DataError, ShapeError
from mergevq.evaluation.token_map import contact_sheet, draw_token_map
from mergevq.files import atomic_path
from mergevq.metrics.image import psnr
from mergevq.tokenizer.model import MergeVQ, TokenizerOutput
from mergevq.training.config import TokenizerRun
from mergevq.training.state import TrainState
from mergevq.training.steps import reconstruction_terms

_CELL = 192  # Side of each picture, in pixels.
_DRAWN = 4
"""Images in a picture."""


@torch.no_grad()
def validate(
    state: TrainState, images: ImageFolder, run: TokenizerRun, stop: Callable[[], bool] = lambda: False
) -> dict[int, dict[str, float]] | None:
    """Returns for each K of `run.loop.val_num_tokens` the mean losses and PSNR of the averaged weights, in float32.

    The processes share the images, and the means are over all of them. Draws no random numbers and leaves the
    discriminator and LeCam alone. The codebook entropy, no mean over images, is the mean over batches. Numbers may be
    infinite (PSNR of a perfect copy) or NaN.

    Args:
        state: read only.
        images: held-out images; `run.loop.val_images` of them are looked at, unreadable ones are left out.
        run: names K's and losses.
        stop: asked before each batch, as often on every process, which all have to get the same answer; if it is true,
            validation is given up and None returned.

    Raises:
        DataError: none of the images can be read, by any process; all processes raise it.
    """
    fabric, loop = state.fabric, run.loop
    sums: dict[int, dict[str, Tensor]] = {count: {} for count in loop.val_num_tokens}
    total, failure = 0, None
    batches = _shared_batches(state, images, run)
    # As many rounds on every process, though their shares may differ by an image, or by unreadable ones.
    largest_share = math.ceil(min(loop.val_images, len(images)) / fabric.world_size)
    for _ in range(math.ceil(largest_share / loop.batch_size)):
        if stop():
            return None
        try:
            batch = next(batches, None)
        except DataError as error:  # Perhaps other processes have readable images.
            batch, failure = None, error
        if batch is None:
            continue
        image = fabric.to_device(batch["image"])
        total += len(image)
        for count, means in sums.items():
            for name, value in _terms(state, image, count, run).items():
                means[name] = means.get(name, 0) + value.double() * len(image)
    if total == 0:
        # Nothing to add, but under the same names as the other processes.
        side = run.model.image_size
        nothing = torch.zeros(1, 3, side, side, device=fabric.device)
        sums = {k: {n: v.double().new_zeros(()) for n, v in _terms(state, nothing, k, run).items()} for k in sums}
    result = {}
    for count, means in sums.items():
        joined = torch.stack([*means.values(), torch.full((), total, dtype=torch.float64, device=fabric.device)])
        *values, number = fabric.all_reduce(joined, reduce_op="sum").tolist()
        if number == 0:
            raise failure or DataError(
                f"{images.root}: expected a readable held-out image, got none: look at the files"
            )
        result[count] = {name: value / number for name, value in zip(means, values, strict=True)}
    return result


def _shared_batches(state: TrainState, images: ImageFolder, run: TokenizerRun) -> Iterator[Batch]:
    return evaluation_batches(
        images,
        run.model.image_size,
        batch_size=run.loop.batch_size,
        rank=state.fabric.global_rank,
        world_size=state.fabric.world_size,
        limit=run.loop.val_images,
        workers=run.data.workers,
    )


def _terms(state: TrainState, image: Tensor, num_tokens: int, run: TokenizerRun) -> dict[str, Tensor]:
    out: TokenizerOutput = _averaged(state)(image, num_tokens)
    losses, metrics = reconstruction_terms(out, image, run.loss, state.perceptual)
    drawn = out.reconstruction
    # psnr() refuses what is not finite, which here is a result to be told and no end of the training.
    quality = psnr(drawn, image).mean() if bool(drawn.isfinite().all()) else drawn.new_tensor(math.nan)
    return {**losses, **metrics, "psnr": quality}


@torch.no_grad()
def draw_held_out(path: Path, state: TrainState, images: ImageFolder, run: TokenizerRun) -> None:
    """Writes a picture with a row for each of a few held-out images: image, token map, reconstruction at each K.

    Unreadable images are left out. Without a readable one, or if a reconstruction is not finite, nothing is written.

    Args:
        path: PNG file, replaced.
        state: its averaged weights draw.
        images: held-out images.
        run: names K's; the map shows the middle one.
    """
    batch = _few(images, run)
    if batch is None:
        return
    try:
        sheet = _sheet(_averaged(state), state.fabric.to_device(batch["image"]), run.loop.val_num_tokens)
    except ShapeError:  # Not finite, which the log tells.
        return
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _sheet(model: MergeVQ, image: Tensor, counts: Sequence[int]) -> Image.Image:
    shown = counts[len(counts) // 2]
    tokens = model.encode(image, shown)
    assert tokens.source is not None
    scale = -(-_CELL // image.shape[-1])  # Enlarged before the outlines are drawn, not with them.
    sources = tokens.source.index
    maps = [draw_token_map(one, at, tokens.grid, scale=scale) for one, at in zip(image, sources, strict=True)]
    columns: list[Tensor] = [image, torch.stack(maps), *(model.reconstruct(image, count) for count in counts)]
    rows = [[column[i].cpu() for column in columns] for i in range(len(image))]
    return contact_sheet(rows, ["image", f"tokens, K = {shown}", *(f"K = {count}" for count in counts)], cell=_CELL)


def _few(images: ImageFolder, run: TokenizerRun) -> Batch | None:
    """Returns images to draw: a few evenly spread ones, or the first readable ones of those that were measured."""
    for limit in (_DRAWN, run.loop.val_images):
        try:
            return next(evaluation_batches(images, run.model.image_size, batch_size=_DRAWN, limit=limit))
        except DataError:
            continue
    return None


def _averaged(state: TrainState) -> MergeVQ:
    model: MergeVQ = state.ema.module  # type: ignore[assignment]
    return model
