"""Few-shot classification: what features are worth with k labelled images of each class."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ConfigError, ShapeError
from mergevq.metrics.intervals import mean_half_width
from mergevq.metrics.probe import by_class, check_every_class, check_labelled, check_pair


@dataclass(frozen=True)
class FewShot:
    """Accuracy with so many labelled images of each class."""

    shots: int
    top1: float
    """Mean over draws."""
    half_width: float | None
    """Of the 95 % interval of that mean (Student's t): by the draw of the labelled images, not of the test images. None
    of one draw."""
    draws: tuple[float, ...]
    """Top-1 of each draw."""
    all_images: bool = False
    """Every class has exactly so many images, so that there is one draw only."""


@torch.no_grad()
def few_shot(
    train: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m D"],
    test_labels: Int[Tensor, " m"],
    *,
    num_classes: int,
    shots: Sequence[int],
    draws: int = 10,
    seed: int = 0,
) -> tuple[FewShot, ...]:
    """Returns the accuracy of the nearest class mean for each number of labelled images.

    In every draw, k images of each class are taken from the training images. Their mean is subtracted from all
    features, which are then scaled to length 1; an image gets the class whose mean is most similar by cosine. So
    nothing is tuned, and no other image is looked at. The images of fewer shots are among those of more shots of the
    same draw. Where every class has exactly k images, all draws are the same one, and it is made once.

    Args:
        train: one row an image.
        labels: their classes.
        test: one row an image.
        test_labels: their classes.
        num_classes: C.
        shots: each k.
        draws: how many.
        seed: of the draws.

    Raises:
        ShapeError: features or labels are not as described, or a class has fewer than k training images.
        ConfigError: a number is out of range.

    Reference:
        Wang et al., SimpleShot: revisiting nearest-neighbor classification for few-shot learning (arXiv 1911.04623),
        with the mean of the drawn images in place of that of base classes.
    """
    for features, classes, what in ((train, labels, "training"), (test, test_labels, "test")):
        check_labelled(features, classes, num_classes, what)
    check_pair(train, test)
    check_every_class(labels, num_classes)
    if not shots or min(shots) < 1 or draws < 1:
        raise ConfigError(f"expected shots and draws of at least 1, got {list(shots)} and {draws}")
    labels, test, truth = labels.cpu(), test.to(train), test_labels.to(train.device)
    counts = torch.bincount(labels, minlength=num_classes)
    if max(shots) > int(counts.min()):
        smallest = int(counts.argmin())
        raise ShapeError(
            f"expected at least {max(shots)} training images of every class for {max(shots)} shots, got "
            f"{int(counts[smallest])} of class {smallest}: ask for fewer shots"
        )
    whole = {k for k in shots if bool((counts == k).all())}
    right: dict[int, list[Tensor]] = {k: [] for k in shots}
    for draw in range(draws):
        order, _, _ = by_class(labels, torch.Generator().manual_seed((seed * draws + draw) % 2**64))
        starts = counts.cumsum(0) - counts
        for k in shots:
            if draw and k in whole:
                continue
            chosen = order[starts[:, None] + torch.arange(k)].to(train.device)
            right[k].append((_nearest_mean(train[chosen], test) == truth).double().mean())
    found = []
    for k in shots:
        accuracies = tuple(torch.stack(right[k]).tolist())
        found.append(FewShot(k, fmean(accuracies), mean_half_width(accuracies), accuracies, k in whole))
    return tuple(found)


def _nearest_mean(support: Float[Tensor, "C k D"], test: Float[Tensor, "m D"]) -> Int[Tensor, " m"]:
    middle = support.mean((0, 1))
    means = F.normalize(F.normalize(support - middle, dim=2).mean(1), dim=1)
    # The length of a test feature changes no comparison.
    return ((test - middle) @ means.T).argmax(1)
