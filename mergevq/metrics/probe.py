"""What every probe is given and gives: features with labels, a held-out part of them, and how right answers are."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergevq.errors import ConfigError, ShapeError
from mergevq.metrics.intervals import share_interval

TOP = 5
"""Answers of an image that top-5 looks at."""


@dataclass(frozen=True, eq=False)
class Score:
    """How often a probe is right."""

    images: int
    top1: float
    """Share of images whose first answer is their class."""
    top1_interval: tuple[float, float]
    """95 % Wilson interval: by the number of test images alone."""
    top5: float | None
    """Share of images whose class is among the first five answers; None with five classes or fewer."""
    mean_class: float
    """Mean of the classes' own accuracies: every class counts the same."""
    per_class: tuple[float | None, ...]
    """Share of right first answers among the images of each class; None without images."""
    confusion: Int[Tensor, "C C"]
    """Images of class (row) that were given the first answer (column)."""


def score_answers(answers: Int[Tensor, "m A"], labels: Int[Tensor, " m"], num_classes: int) -> Score:
    """Returns how often ranked answers are right.

    Args:
        answers: classes, the most likely first, at least five if there are as many; -1 is no answer, never the first.
        labels: the true classes.
        num_classes: C.

    Raises:
        ShapeError: there are no images.
    """
    labels, answers = labels.cpu(), answers.cpu()
    if not len(labels):
        raise ShapeError("expected at least 1 image to test on, got none")
    right = answers == labels[:, None]
    first = int(right[:, 0].sum())
    confusion = torch.bincount(labels * num_classes + answers[:, 0], minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes)
    counts, hits = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    per_class = tuple(hit / count if count else None for hit, count in zip(hits, counts, strict=True))
    known = [share for share in per_class if share is not None]
    return Score(
        images=len(labels),
        top1=first / len(labels),
        top1_interval=share_interval(first, len(labels)),
        top5=None if num_classes <= TOP else float(right[:, :TOP].any(1).double().mean()),
        mean_class=sum(known) / len(known),
        per_class=per_class,
        confusion=confusion,
    )


def ranked(scores: Float[Tensor, "m C"], allowed: Bool[Tensor, "m C"] | None = None) -> Int[Tensor, "m A"]:
    """Returns the five (or C) classes of highest score, the highest first; of equals the lower number comes first.

    Args:
        scores: of each class.
        allowed: classes that may be an answer; in place of others comes -1.
    """
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    return best if allowed is None else best.where(allowed.gather(1, best), -1)


def check_labelled(
    features: Float[Tensor, "n D"], labels: Int[Tensor, " n"], num_classes: int, what: str = "training"
) -> None:
    """Checks that there is a finite feature and a class for every image.

    Args:
        features: one row an image.
        labels: 0 .. num_classes - 1.
        num_classes: C.
        what: the images, for the message: "training" or "test".

    Raises:
        ShapeError: they are not as described.
    """
    if features.ndim != 2 or len(features) != len(labels):
        raise ShapeError(
            f"expected {what} features [n, D] and n labels, got {list(features.shape)} and {len(labels)} labels"
        )
    if num_classes < 2:
        raise ShapeError(f"expected at least 2 classes to tell apart, got {num_classes}")
    broken = len(features) - int(features.isfinite().all(1).sum())
    if broken:
        raise ShapeError(
            f"expected finite {what} features, got NaN or infinity for {broken} of {len(features)} images: look at the "
            "images or the model"
        )
    unknown = int(((labels < 0) | (labels >= num_classes)).sum())
    if unknown:
        raise ShapeError(
            f"expected {what} labels in 0..{num_classes - 1}, got others for {unknown} of {len(labels)} images: give "
            "every image a class"
        )


def check_every_class(labels: Int[Tensor, " n"], num_classes: int, what: str = "training") -> None:
    """Checks that every class has an image.

    Raises:
        ShapeError: one has none.
    """
    if len(labels) < num_classes:
        raise ShapeError(
            f"expected at least as many {what} images as classes ({num_classes}), got {len(labels)}: take more images"
        )
    counts = torch.bincount(labels.cpu(), minlength=num_classes)
    if not counts.all():
        missing = int((counts == 0).nonzero()[0])
        raise ShapeError(f"expected {what} images of every class, got none of class {missing}: add some")


def check_pair(train: Float[Tensor, "n D"], test: Float[Tensor, "m E"]) -> None:
    """Checks that features of two sets are of one kind.

    Raises:
        ShapeError: they are not equally wide.
    """
    if train.shape[1] != test.shape[1]:
        raise ShapeError(f"expected training and test features of one width, got {train.shape[1]} and {test.shape[1]}")


def hold_out(labels: Int[Tensor, " n"], fraction: float, seed: int) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Divides training images in those to fit on and those held out, on which settings are chosen.

    Of every class about `fraction` is held out, at least one image if it has two. A class of one image is not held out.

    Args:
        labels: of the training images.
        fraction: between 0 and 1.
        seed: of the draw.

    Returns:
        Numbers of the images to fit on and of those held out, ascending.

    Raises:
        ConfigError: the fraction is not inside 0..1.
        ShapeError: no class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"expected a held-out fraction between 0 and 1, got {fraction}")
    labels = labels.cpu()
    order, place, counts = by_class(labels, torch.Generator().manual_seed(seed))
    wanted = (counts * fraction).round().long().clamp(min=1).minimum(counts - 1)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order] = place < wanted[labels[order]]
    if not held.any():
        raise ShapeError(
            "expected a class with at least 2 training images, got 1 of each, so none can be held out to choose on: "
            "ask for one k, one learning rate and one weight decay"
        )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def by_class(
    labels: Int[Tensor, " n"], rng: torch.Generator
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " C"]]:
    """Returns image numbers class by class, in random order within each, their places within it, and the class sizes.

    Args:
        labels: 0 .. C - 1, on the CPU.
        rng: on the CPU.
    """
    shuffled = torch.randperm(len(labels), generator=rng)
    order = shuffled[labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(labels)
    starts = counts.cumsum(0) - counts
    return order, torch.arange(len(labels)) - starts[labels[order]], counts
