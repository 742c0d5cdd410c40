"""Weighted k-nearest-neighbour classification of features, for any number of images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ConfigError, ShapeError
from mergevq.metrics.probe import TOP, check_labelled, check_pair, ranked

TEMPERATURE = 0.07

_QUERIES = 1024  # Images classified at a time.
_ENTRIES = 2**24  # Of the matrix of similarities that is held.


@torch.no_grad()
def knn_classify(
    train: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    *,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, Int[Tensor, "m A"]]:
    """Returns for each k the ranked answers of every test image, at most five, on the CPU.

    The k training images of highest cosine similarity s vote for their classes with weight exp(s / temperature). A
    class without a vote is no answer: -1 stands in its place, so k = 1 has one answer.

    Computed where `train` lies, block by block: memory beyond the features does not grow with n or m.

    Args:
        train: one row an image, of any length.
        labels: their classes.
        test: one row an image.
        num_classes: C.
        ks: numbers of neighbours.
        temperature: of the votes.

    Raises:
        ShapeError: a number is not finite, a label is missing, or there are fewer training images than k.
        ConfigError: a k or the temperature is out of range.

    Reference:
        Wu et al., Unsupervised feature learning via non-parametric instance discrimination (arXiv 1805.01978), section
        3.4; with temperature 0.07 as in DINO (arXiv 2104.14294).
    """
    check_labelled(train, labels, num_classes)
    check_pair(train, test)
    if not test.isfinite().all():
        raise ShapeError("expected finite test features, got NaN or infinity: look at the images or the model")
    if not ks or min(ks) < 1 or not temperature > 0:
        raise ConfigError(f"expected every k at least 1 and a temperature above 0, got {list(ks)} and {temperature}")
    if max(ks) > len(train):
        raise ShapeError(
            f"expected k of at most {len(train)}, the number of training images, got {max(ks)}: ask for a smaller k"
        )
    points, labels = F.normalize(train, dim=1), labels.to(train.device)
    answers: dict[int, list[Tensor]] = {k: [] for k in ks}
    for queries in F.normalize(test.to(train), dim=1).split(_QUERIES):
        similarity, index = _closest(queries, points, max(ks))
        for k, found in _vote(similarity, labels[index], num_classes, ks, temperature).items():
            answers[k].append(found.cpu())
    width = min(TOP, num_classes)
    return {k: torch.cat([torch.zeros(0, width, dtype=torch.int64), *found]) for k, found in answers.items()}


def _closest(queries: Tensor, points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Similarities and numbers of the most similar points, best first, both [m, count]."""
    values = queries.new_zeros(len(queries), 0)
    indices = torch.zeros(len(queries), 0, dtype=torch.int64, device=queries.device)
    start = 0
    for block in points.split(max(count, _ENTRIES // len(queries))):
        similarity, index = (queries @ block.T).topk(min(count, len(block)), dim=1)
        values, indices = torch.cat([values, similarity], 1), torch.cat([indices, index + start], 1)
        best = values.topk(min(count, values.shape[1]), dim=1)
        values, indices = best.values, indices.gather(1, best.indices)
        start += len(block)
    return values, indices


def _vote(
    similarity: Tensor, classes: Tensor, num_classes: int, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    # Votes relative to the best neighbour's: the same order, and no overflow at small temperatures.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    voted = torch.zeros_like(votes, dtype=torch.bool)
    answers = {}
    for i in range(max(ks)):
        # One neighbour at a time: additions in a fixed order, on a GPU too, and every k on the way.
        votes.scatter_add_(1, classes[:, i : i + 1], weights[:, i : i + 1])
        voted.scatter_(1, classes[:, i : i + 1], True)
        if i + 1 in ks:
            answers[i + 1] = ranked(votes, voted)
    return answers
