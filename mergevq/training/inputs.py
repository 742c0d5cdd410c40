"""What a run is fed: images, their crops, and the outside networks."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from mergevq.data.augment import Views, alignment_views
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch, training_batches
from mergevq.data.sources import training_and_validation
from mergevq.errors import ConfigError, DataError
from mergevq.layers.teachers import load_teacher
from mergevq.losses.perceptual import build_perceptual
from mergevq.training.config import TokenizerRun


class Inputs(NamedTuple):
    """Images and networks of a run."""

    train: ImageFolder
    val: ImageFolder
    perceptual: nn.Module | None
    teacher: nn.Module | None


def open_inputs(
    run: TokenizerRun,
    train: ImageFolder | None,
    val: ImageFolder | None,
    perceptual: nn.Module | None,
    teacher: nn.Module | None,
    world_size: int,
) -> Inputs:
    """Returns what is given, and what the run names for what is not given. Networks whose loss is off are left out.

    Raises:
        DataError: images are missing, too few for the processes, or without the classes that are the target.
        ConfigError: the teacher's output has another width than the head.
        MissingDependencyError, CheckpointError: a network is not installed or cannot be had.
    """
    if train is None:
        train, held_out = training_and_validation(run.data.train, run.data.val, run.data.val_fraction)
        val = held_out if val is None else val
    elif val is None:
        raise ConfigError("expected val_data with train_data, got none")
    if min(len(val), run.loop.val_images) < world_size:
        raise DataError(f"expected a held-out image for each of {world_size} processes, got {len(val)}")

    weights, labels = run.loss.weights, run.loss.alignment == "labels"
    if weights.perceptual == 0:
        perceptual = None
    elif perceptual is None:
        perceptual = build_perceptual(run.loss.perceptual)
    if weights.alignment == 0 or labels:
        teacher = None
    elif teacher is None:
        teacher = load_teacher(run.loss.teacher, weights=run.loss.teacher_weights or None)

    if weights.alignment > 0:
        if labels and not train.classes:
            raise DataError("expected images in class folders for loss.alignment labels, got images without classes")
        if labels and -1 in train.labels:
            name = train.name(train.labels.index(-1))
            raise DataError(f"expected a class for every image for loss.alignment labels, got none for {name}")
        width = run.model.alignment.teacher_dim
        came = len(train.classes) if labels else getattr(teacher, "width", width)
        if came != width:
            what = "classes" if labels else "numbers from the teacher"
            raise ConfigError(f"expected {width} {what} (model.alignment.teacher_dim), got {came}: set it to {came}")
    return Inputs(train, val, perceptual, teacher)


def stream(run: TokenizerRun, images: ImageFolder, rank: int, world_size: int, start: int) -> Iterator[Batch]:
    """Yields the micro-batches of one process without end, from number `start` on."""
    model, data, loop = run.model, run.data, run.loop
    views = Views(model.image_size, data.crop, data.flip)
    if run.loss.weights.alignment > 0:
        views = alignment_views(model.image_size, model.downsampling, data.crop, data.flip)
        if run.loss.alignment == "labels":
            views = replace(views, teacher=0)
    return training_batches(
        images,
        views,
        batch_size=loop.batch_size,
        seed=loop.seed,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        start_batch=start,
    )
