"""What fine-tuning works on: a tokenizer, labelled images, and what these decide about the run."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mergevq.data.augment import Views
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch, training_batches
from mergevq.data.sources import training_and_validation
from mergevq.errors import ConfigError, DataError
from mergevq.tokenizer.classifier_config import ClassifierConfig
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import check_num_tokens
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.inputs import open_tokenizer


class FinetuneInputs(NamedTuple):
    """A tokenizer and labelled images."""

    tok: MergeVQ
    """Never changed."""
    train: ImageFolder
    val: ImageFolder


def open_inputs(
    run: FinetuneRun,
    out: Path,
    tokenizer: str | Path | MergeVQ | None = None,
    train: ImageFolder | None = None,
    val: ImageFolder | None = None,
    world_size: int = 1,
) -> FinetuneInputs:
    """Returns what is given, and what the run names for what is not given.

    Args:
        run: names a tokenizer and images.
        out: folder that the run writes to.
        tokenizer: instead of `run.data.tokenizer`.
        train: instead of `run.data.train`.
        val: instead of `run.data.val`; needed with `train`.
        world_size: processes that share the held-out images.

    Raises:
        ConfigError: the tokenizer is neither given nor named, or lies in `out`, or `val` is missing.
        CheckpointError: there is no such tokenizer.
        DataError: images or labels are missing, or held-out images are too few or of classes that are not trained on.
    """
    tok = open_tokenizer(run.data.tokenizer if tokenizer is None else tokenizer, out, "whose encoder is fine-tuned")
    if train is None:
        train, held_out = training_and_validation(run.data.train, run.data.val, run.data.val_fraction)
        val = held_out if val is None else val
    elif val is None:
        raise ConfigError("expected val_data with train_data, got none")
    _check_labels(train, val)
    if min(len(val), run.loop.val_images) < world_size:
        raise DataError(f"expected a held-out image for each of {world_size} processes, got {len(val)}")
    return FinetuneInputs(tok, train, val)


def _check_labels(train: ImageFolder, val: ImageFolder) -> None:
    if not train.classes:
        raise DataError(
            f"{train.root}: expected images in a folder for each of at least two classes, got images without labels"
        )
    if val.classes != train.classes:
        raise DataError(
            f"expected held-out images with the {len(train.classes)} classes of the training images, got "
            f"{len(val.classes)} or others: open them with ImageFolder(..., classes=train_data.classes)"
        )
    for images, role in ((train, "training"), (val, "held-out")):
        if -1 in images.labels:
            name = images.name(images.labels.index(-1))
            raise DataError(
                f"{images.root}: expected one of the {len(train.classes)} training classes for every {role} image, got "
                f"none for {name}: move it to the folder of its class, or leave it out"
            )
    trained = set(train.labels)
    if len(trained) < 2:
        name = train.classes[train.labels[0]]
        raise DataError(f"{train.root}: expected training images of at least two classes, got {name} alone")
    missing = sorted(set(val.labels) - trained)
    if missing:
        raise DataError(
            f"{train.root}: expected training images of every held-out class, got none of {train.classes[missing[0]]}: "
            "add some, or leave its held-out ones out"
        )


def resolve(run: FinetuneRun, inputs: FinetuneInputs) -> FinetuneRun:
    """Returns the run with what tokenizer and images decide: size, K, classes, fingerprint. A run that was resolved
    before is returned as it is.

    Raises:
        ConfigError: the downsampling does not divide the size, or K is not in 1..L.
    """
    config = inputs.tok.config
    size = run.model.image_size or config.image_size
    step = config.downsampling
    if size % step:
        raise ConfigError(f"model.image_size must be a multiple of the tokenizer's downsampling {step}, got {size}")
    patches = (size // step) ** 2
    count = run.model.num_tokens or patches
    check_num_tokens("model.num_tokens", (count,), patches)
    model = replace(
        run.model,
        image_size=size,
        num_tokens=count,
        class_names=inputs.train.classes,
        tokenizer=inputs.tok.fingerprint(),
    )
    return replace(run, model=model)


def classifier_config(run: FinetuneRun, tokenizer: TokenizerConfig) -> ClassifierConfig:
    """Returns the configuration of the classifier that a run, as `resolve` returns it, trains.

    Args:
        run: what is trained.
        tokenizer: configuration of the tokenizer that it begins with.
    """
    model = run.model
    return ClassifierConfig(
        tokenizer, model.features, model.image_size, model.num_tokens, model.class_names, model.tokenizer
    )


def stream(run: FinetuneRun, images: ImageFolder, rank: int, world_size: int, start: int) -> Iterator[Batch]:
    """Yields the micro-batches of one process without end, from number `start` on."""
    data, loop = run.data, run.loop
    return training_batches(
        images,
        Views(run.model.image_size, data.crop, data.flip, data.rand_augment),
        batch_size=loop.batch_size,
        seed=loop.seed,
        rank=rank,
        world_size=world_size,
        workers=data.workers,
        start_batch=start,
    )
