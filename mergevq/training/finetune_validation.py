"""Looking at held-out images under the averaged weights of a classifier."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
from mergevq.errors import DataError
from mergevq.tokenizer.classifier import Classifier
from mergevq.training.finetune_config import FinetuneRun

_TOP = 5


class Accuracy(NamedTuple):
    """What a classifier gets right."""

    loss: float
    """Cross-entropy with the labels, in nats an image."""
    top1: float
    """Share of images whose largest logit is the label's."""
    top5: float | None
    """Share of images whose label has one of the five largest logits; None where there are no more than five."""
    images: int
    """That were looked at."""
    unreadable: int
    """That were left out, as they could not be read."""
    class_images: tuple[int, ...]
    """Of each class."""
    class_top1: tuple[float | None, ...]
    """Share of each class; None of a class without images."""


@torch.no_grad()
def validate(
    fabric: Any,
    classifier: Classifier,
    images: ImageFolder,
    run: FinetuneRun,
    limit: int,
    stop: Callable[[], bool] = lambda: False,
) -> Accuracy | None:
    """Returns what a classifier gets right of held-out images, in float32, over all processes.

    Args:
        fabric: the lightning.Fabric of the run.
        classifier: in evaluation mode, on the process's device.
        images: labelled with the classes of the classifier; unreadable ones are left out.
        run: names size, K and batch size.
        limit: look at so many images, evenly spread; the processes share them.
        stop: asked before each batch, as often on every process, which all have to get the same answer; if it is true,
            validation is given up and None returned.

    Raises:
        DataError: none of the images can be read, by any process; all processes raise it.
    """
    classes = len(run.model.class_names)
    seen = torch.zeros(classes, dtype=torch.float64, device=fabric.device)
    right, among, loss = torch.zeros_like(seen), torch.zeros_like(seen[:1]), torch.zeros_like(seen[:1])
    failure: DataError | None = None
    batches = evaluation_batches(
        images,
        run.model.image_size,
        batch_size=run.loop.batch_size,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        limit=limit,
        workers=run.data.workers,
    )
    # As many rounds on every process, though their shares may differ by an image, or by unreadable ones.
    largest_share = math.ceil(min(limit, len(images)) / fabric.world_size)
    for _ in range(math.ceil(largest_share / run.loop.batch_size)):
        if stop():
            return None
        try:
            batch = next(batches, None)
        except DataError as error:  # Perhaps other processes have readable images.
            batch, failure = None, error
        if batch is None:
            continue
        image, label = fabric.to_device(batch["image"]), fabric.to_device(batch["label"])
        logits: Tensor = classifier(image, run.model.num_tokens)
        hits = _hits(logits, label)
        truth = one_hot(label, classes).double()
        seen += truth.sum(0)
        right += (truth * hits[:, :1]).sum(0)
        among += hits.any(1).sum()
        loss += cross_entropy(logits, label, reduction="sum").double()
    total = fabric.all_reduce(torch.cat([loss, among, seen, right]), reduce_op="sum")
    count = int(total[2 : 2 + classes].sum())
    if count == 0:
        raise failure or DataError(f"{images.root}: expected a readable held-out image, got none: look at the files")
    loss_sum, among_sum = total[:2].tolist()
    class_images, class_right = total[2:].view(2, classes).tolist()
    return Accuracy(
        loss=loss_sum / count,
        top1=sum(class_right) / count,
        top5=among_sum / count if classes > _TOP else None,
        images=count,
        unreadable=min(limit, len(images)) - count,
        class_images=tuple(int(n) for n in class_images),
        class_top1=tuple(hit / n if n else None for hit, n in zip(class_right, class_images, strict=True)),
    )


def _hits(logits: Float[Tensor, "B classes"], label: Int[Tensor, " B"]) -> Tensor:
    """Returns for each image whether its largest, second largest, ... logit is the label's; for the five largest."""
    best = logits.topk(min(_TOP, logits.shape[1]), dim=1).indices
    return best == label[:, None]
