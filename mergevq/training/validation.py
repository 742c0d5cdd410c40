"""Looking at held-out images under the averaged weights: numbers, and a picture."""

from pathlib import Path

import torch
from torch import Tensor

from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
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
def validate(state: TrainState, images: ImageFolder, run: TokenizerRun) -> dict[int, dict[str, float]]:
    """Returns for each K of `run.loop.val_num_tokens` the mean losses and PSNR of the averaged weights, in float32.

    The processes share the images, and the means are over all of them. Draws no random numbers and leaves the
    discriminator and LeCam alone. The codebook entropy, no mean over images, is the mean over batches.

    Args:
        state: read only.
        images: held-out images; `run.loop.val_images` of them are looked at.
        run: names K's and losses.
    """
    fabric, model = state.fabric, _averaged(state)
    sums: dict[int, dict[str, Tensor]] = {count: {} for count in run.loop.val_num_tokens}
    total = 0
    for batch in evaluation_batches(
        images,
        run.model.image_size,
        batch_size=run.loop.batch_size,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        limit=run.loop.val_images,
        workers=run.data.workers,
    ):
        image = fabric.to_device(batch["image"])
        total += len(image)
        for count, means in sums.items():
            out: TokenizerOutput = model(image, count)
            losses, metrics = reconstruction_terms(out, image, run.loss, state.perceptual)
            terms = {**losses, **metrics, "psnr": psnr(out.reconstruction, image).mean()}
            for name, value in terms.items():
                means[name] = means.get(name, 0) + value.double() * len(image)
    result = {}
    for count, means in sums.items():
        joined = torch.stack([*means.values(), torch.full((), total, dtype=torch.float64, device=fabric.device)])
        *values, number = fabric.all_reduce(joined, reduce_op="sum").tolist()
        result[count] = {name: value / number for name, value in zip(means, values, strict=True)}
    return result


@torch.no_grad()
def draw_held_out(path: Path, state: TrainState, images: ImageFolder, run: TokenizerRun) -> None:
    """Writes a picture with a row for each of a few held-out images: image, token map, reconstruction at each K.

    Args:
        path: PNG file, replaced.
        state: its averaged weights draw.
        images: held-out images.
        run: names K's; the map shows the middle one.
    """
    model, counts = _averaged(state), run.loop.val_num_tokens
    shown = counts[len(counts) // 2]
    batch = next(evaluation_batches(images, run.model.image_size, batch_size=_DRAWN, limit=_DRAWN))
    image = state.fabric.to_device(batch["image"])
    tokens = model.encode(image, shown)
    assert tokens.source is not None
    scale = -(-_CELL // image.shape[-1])  # Enlarged before the outlines are drawn, not with them.
    sources = tokens.source.index
    maps = [draw_token_map(one, at, tokens.grid, scale=scale) for one, at in zip(image, sources, strict=True)]
    columns: list[Tensor] = [image, torch.stack(maps), *(model.reconstruct(image, count) for count in counts)]
    rows = [[column[i].cpu() for column in columns] for i in range(len(image))]
    sheet = contact_sheet(rows, ["image", f"tokens, K = {shown}", *(f"K = {count}" for count in counts)], cell=_CELL)
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _averaged(state: TrainState) -> MergeVQ:
    model: MergeVQ = state.ema.module  # type: ignore[assignment]
    return model
