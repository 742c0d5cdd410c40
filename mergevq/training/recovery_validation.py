"""Looking at held-out tokens under the averaged weights of recovery: numbers, and a picture."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mergevq.data.token_batches import evaluation_token_batches
from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.errors import ShapeError
from mergevq.evaluation.token_map import contact_sheet, draw_token_map
from mergevq.files import atomic_path
from mergevq.losses.recovery import recovery_loss
from mergevq.merging import SourceMap
from mergevq.quantize import index_to_codes
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.recovery import SourceRecovery
from mergevq.tokens import MergedTokens
from mergevq.training.recovery_config import RecoveryLoopConfig

_CELL = 192  # Side of each picture, in pixels.
_DRAWN = 4
"""Images in a picture."""
_DRAWN_K = 3


@torch.no_grad()
def validate(
    fabric: Any,
    recovery: SourceRecovery,
    cache: TokenCache,
    loop: RecoveryLoopConfig,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Returns for each K of `loop.val_num_tokens` the mean loss and accuracy over patches, in float32.

    The processes share the images, and the means are over all of them.

    Args:
        fabric: the lightning.Fabric of the run.
        recovery: in evaluation mode, on the process's device.
        cache: held-out tokens; `loop.val_images` of the images are looked at.
        loop: names K's and the batch size.
        stop: asked before each batch, as often on every process, which all have to get the same answer; if it is true,
            validation is given up and None returned.
    """
    records = []
    largest_share = math.ceil(min(loop.val_images, len(cache)) / fabric.world_size)
    for count in loop.val_num_tokens:
        batches = _shared_batches(fabric, cache, loop, count)
        total = torch.zeros(3, dtype=torch.float64, device=fabric.device)
        # As many rounds on every process, though their shares may differ by an image.
        for _ in range(math.ceil(largest_share / loop.batch_size)):
            if stop():
                return None
            batch = next(batches, None)
            if batch is None:
                continue
            batch = fabric.to_device(batch)
            logits = recovery(index_to_codes(batch["index"], cache.num_bits), batch["num_tokens"], cache.grid)
            out = recovery_loss(logits, batch["source"], batch["index"])
            images = len(batch["index"])
            total += torch.stack([out.loss, out.accuracy, torch.ones_like(out.loss)]).double() * images
        loss, accuracy, images = fabric.all_reduce(total, reduce_op="sum").tolist()
        records.append({"num_tokens": count, "recovery": loss / images, "recovery_accuracy": accuracy / images})
    return records


def _shared_batches(fabric: Any, cache: TokenCache, loop: RecoveryLoopConfig, count: int) -> Iterator[TokenBatch]:
    return evaluation_token_batches(
        cache,
        batch_size=loop.batch_size,
        num_tokens=count,
        view=cache.views[0],
        limit=loop.val_images,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
    )


@torch.no_grad()
def draw_held_out(
    path: Path, tok: MergeVQ, recovery: SourceRecovery, cache: TokenCache, num_tokens: Sequence[int]
) -> None:
    """Writes a picture with a row for each of a few held-out images: at each K what the tokens decode to with their
    true source and with the predicted one, and both maps at the middle K.

    If a decoded image is not finite, nothing is written.

    Args:
        path: PNG file, replaced.
        tok: decodes; on any device.
        recovery: predicts; in evaluation mode, on any device.
        cache: held-out tokens.
        num_tokens: K's.
    """
    total = len(cache)
    rows = [i * total // _DRAWN for i in range(_DRAWN)] if total > _DRAWN else list(range(total))
    try:
        sheet = _sheet(tok, recovery, cache, rows, num_tokens)
    except ShapeError:  # Not finite, which the log tells.
        return
    with atomic_path(path) as temporary:
        sheet.save(temporary)


def _sheet(
    tok: MergeVQ, recovery: SourceRecovery, cache: TokenCache, rows: Sequence[int], num_tokens: Sequence[int]
) -> Image.Image:
    columns: list[tuple[str, Tensor]] = []
    middle = len(num_tokens) // 2
    shown = num_tokens if len(num_tokens) <= _DRAWN_K else [num_tokens[0], num_tokens[middle], num_tokens[-1]]
    for count in shown:
        true = cache.tokens(rows, count, cache.views[0])
        guess = _predict(recovery, true)
        known = tok.decode(true).cpu()
        columns += [(f"K = {count}", known), (f"K = {count}\nsource predicted", tok.decode(guess).cpu())]
        if count == num_tokens[middle]:
            scale = -(-_CELL // known.shape[-1])  # Enlarged before the outlines are drawn, not with them.
            for title, tokens in ((f"tokens, K = {count}", true), ("tokens\nas predicted", guess)):
                assert tokens.source is not None
                maps = [
                    draw_token_map(image, source.cpu(), tokens.grid, scale=scale)
                    for image, source in zip(known, tokens.source.index, strict=True)
                ]
                columns.append((title, torch.stack(maps)))
    return contact_sheet(
        [[column[i] for _, column in columns] for i in range(len(rows))], [title for title, _ in columns], cell=_CELL
    )


def _predict(recovery: SourceRecovery, tokens: MergedTokens) -> MergedTokens:
    device = recovery.queries.device
    codes = index_to_codes(tokens.index.to(device), tokens.num_bits)
    source = recovery(codes, tokens.num_tokens.to(device), tokens.grid).argmax(-1).to(tokens.index.device)
    return replace(tokens, source=SourceMap(source, tokens.num_tokens))
