"""What a run is fed: images, their crops, and the outside networks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from mergevq.data.augment import Views, alignment_views
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch, training_batches
from mergevq.data.sources import training_and_validation
from mergevq.data.teacher_cache import TeacherCache
from mergevq.errors import ConfigError, DataError
from mergevq.layers.teachers import load_teacher
from mergevq.losses.perceptual import build_perceptual
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import TokenizerRun


class Inputs(NamedTuple):
    """Images and networks of a run."""

    train: ImageFolder
    val: ImageFolder
    perceptual: nn.Module | None
    teacher: nn.Module | None
    teacher_cache: TeacherCache | None = None
    """What the teacher makes of the training images, where it is not run."""


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
        DataError: images are missing, too few for the processes, or without the classes that are the target; or the
            cached features are of others.
        ConfigError: the teacher's output has another width than the head, or another teacher's features are cached.
        TokenFileError: there are no cached features where the run names some.
        MissingDependencyError, CheckpointError: a network is not installed or cannot be had.
    """
    train, val = open_images(run, train, val, world_size)
    weights, labels = run.loss.weights, run.loss.alignment == "labels"
    if weights.perceptual == 0:
        perceptual = None
    elif perceptual is None:
        perceptual = build_perceptual(run.loss.perceptual)
    cache = None
    if weights.alignment == 0 or labels:
        teacher = None
    elif run.data.teacher_cache:
        cache = TeacherCache(run.data.teacher_cache)
        named, weights_file = run.loss.teacher, run.loss.teacher_weights
        if teacher is not None or weights_file:
            # Of given weights only reading them tells whether the cached features are theirs.
            teacher = load_teacher(named, weights=weights_file) if teacher is None else load_teacher(teacher)
        cache.check_fits(train, run.model.image_size, named if teacher is None else teacher)
        teacher = None
    elif teacher is None:
        teacher = load_teacher(run.loss.teacher, weights=run.loss.teacher_weights or None)
    else:
        teacher = load_teacher(teacher)

    if weights.alignment > 0:
        if labels and not train.classes:
            raise DataError("expected images in class folders for loss.alignment labels, got images without classes")
        if labels and -1 in train.labels:
            name = train.name(train.labels.index(-1))
            raise DataError(f"expected a class for every image for loss.alignment labels, got none for {name}")
        width = run.model.alignment.teacher_dim
        seen = cache.settings.width if cache is not None else getattr(teacher, "width", None)
        came = len(train.classes) if labels else seen or width
        if came != width:
            what = "classes" if labels else "numbers from the teacher"
            raise ConfigError(f"expected {width} {what} (model.alignment.teacher_dim), got {came}: set it to {came}")
    return Inputs(train, val, perceptual, teacher, cache)


def open_images(
    run: TokenizerRun, train: ImageFolder | None = None, val: ImageFolder | None = None, world_size: int = 1
) -> tuple[ImageFolder, ImageFolder]:
    """Returns the images to train on and the held-out ones: what is given, or what the run names.

    Raises:
        DataError: images are missing or too few for the processes.
        ConfigError: `train` is given and `val` is not.
    """
    if train is None:
        train, held_out = training_and_validation(run.data.train, run.data.val, run.data.val_fraction)
        val = held_out if val is None else val
    elif val is None:
        raise ConfigError("expected val_data with train_data, got none")
    if min(len(val), run.loop.val_images) < world_size:
        raise DataError(f"expected a held-out image for each of {world_size} processes, got {len(val)}")
    return train, val


def open_tokenizer(name: str | Path | MergeVQ, out: Path, role: str) -> MergeVQ:
    """Returns the tokenizer that another training begins with.

    Args:
        name: a file, a folder, a hub id, or the model itself.
        out: folder that the run writes to.
        role: which model that is, for the message: "whose recovery is trained".

    Raises:
        ConfigError: the name is empty, or the tokenizer lies in `out`, where it would be replaced.
        CheckpointError: there is no such tokenizer.
    """
    if isinstance(name, MergeVQ):
        return name
    if not str(name):
        raise ConfigError(f"expected data.tokenizer, the model {role}, got none")
    if out.resolve() in (Path(name).resolve(), *Path(name).resolve().parents):
        raise ConfigError(f"expected a tokenizer outside of {out}, where the new one is written to, got {name}")
    return MergeVQ.from_pretrained(name)


def stream(
    run: TokenizerRun,
    images: ImageFolder,
    rank: int,
    world_size: int,
    start: int,
    teacher_cache: TeacherCache | None = None,
) -> Iterator[Batch]:
    """Yields the micro-batches of one process without end, from number `start` on.

    Cached features are their `teacher` [B, Dt], in place of a view for the teacher. No other draw changes.
    """
    model, data, loop = run.model, run.data, run.loop
    views = Views(model.image_size, data.crop, data.flip)
    if run.loss.weights.alignment > 0:
        views = alignment_views(model.image_size, model.downsampling, data.crop, data.flip)
        if run.loss.alignment == "labels" or teacher_cache is not None:
            views = replace(views, teacher=0)
    batches = training_batches(
        images,
        views,
        batch_size=loop.batch_size,
        seed=loop.seed,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        start_batch=start,
    )
    if teacher_cache is None:
        return batches
    return ({**batch, "teacher": teacher_cache.features(batch["number"])} for batch in batches)
