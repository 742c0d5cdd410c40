"""The images that probes train and are tested on: the same classes in both, and every class in each."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mergevq.data.class_folders import empty_class_folders
from mergevq.data.folder import ImageFolder
from mergevq.data.sources import evaluation_images, training_and_validation, training_images
from mergevq.errors import ConfigError, DataError
from mergevq.metrics.probe_config import ProbeConfig

_NAMED = 3  # Classes in a message.


def probe_images(
    train: str | Path | ImageFolder,
    test: str | Path | ImageFolder | None = None,
    *,
    test_fraction: float = 0.2,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> tuple[ImageFolder, ImageFolder]:
    """Returns training and test images, both labelled by the classes of the training images.

    Args:
        train: a folder, a .zip, a pattern that names several .zip files, "embedded", or a data set. Of a source with
            parts, its part train.
        test: likewise; of a source with parts, its held-out part. None takes the held-out part of `train`, or, where
            there is none, a share of its images.
        test_fraction: that share; a hash of each image's name chooses it.
        train_limit: take so many training images, evenly spread; None takes all.
        test_limit: likewise of the test images.

    Raises:
        DataError: there are no classes, a class has no image in one of the sets, its folder is empty, or a test image
            is of no class.
        ConfigError: a limit is out of range, or a data set is given without another to test on.
    """
    if isinstance(train, ImageFolder) or isinstance(test, ImageFolder):
        if test is None:
            raise ConfigError("expected a data set to test on beside the one to train on, got none: give test=")
        first = training_images(train)
        second = evaluation_images(test, first.classes)
    else:
        first, second = training_and_validation(train, test or "", test_fraction)
    _check_folders(first)
    _check_folders(second)
    if not first.classes:
        raise DataError(
            f"expected training images in class folders, got images without classes in {first.root}: put the images of "
            "each class in a folder of its own"
        )
    _check_same(first, second)
    first, second = _limited(first, train_limit), _limited(second, test_limit)
    for images, what in ((first, "training"), (second, "test")):
        check_labels(images.labels, first.classes, what)
    return first, second


def check_labels(labels: Sequence[int], classes: Sequence[str], what: str) -> None:
    """Checks that every image has a class and every class an image.

    Args:
        labels: of the images.
        classes: their names.
        what: which images: "training" or "test".

    Raises:
        DataError: they have not.
    """
    unknown = sum(label < 0 for label in labels)
    if unknown:
        raise DataError(
            f"expected {what} images of known classes ({_some(classes)}), got {unknown} of {len(labels)} without: put "
            "the images of each class in a folder of its own, named as in the training images"
        )
    if len(labels) < len(classes):
        raise DataError(
            f"expected at least as many {what} images as classes ({len(classes)}), got {len(labels)}: take more images"
        )
    counts = torch.bincount(torch.tensor(labels), minlength=len(classes)).tolist()
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"expected {what} images of every class, got none of {_some(empty)}: add some, or raise the limit on images"
        )


def check_enough(labels: Sequence[int], classes: Sequence[str], config: ProbeConfig) -> None:
    """Checks that there are enough training images for what probes ask, before any feature is computed.

    Args:
        labels: of the training images.
        classes: their names.
        config: the probes.

    Raises:
        DataError: there are fewer images than k, or fewer of a class than shots.
    """
    k, shots = max(config.ks, default=1), max(config.shots, default=1)
    if "knn" in config.probes and k > len(labels):
        raise DataError(f"expected at least k = {k} training images, got {len(labels)}: ask for a smaller k")
    counts = torch.bincount(torch.tensor(labels), minlength=len(classes))
    least, smallest = int(counts.min()), int(counts.argmin())
    if "few-shot" in config.probes and shots > least:
        raise DataError(
            f"expected at least {shots} training images of every class for {shots} shots, got {least} of "
            f"{classes[smallest]}: ask for fewer shots"
        )


def _check_folders(images: ImageFolder) -> None:
    """Refuses a class folder without files: classes are known by their images, so that it would not be missed."""
    empty = empty_class_folders(images)
    if empty:
        place = empty[0].parent
        names = [folder.name for folder in empty if folder.parent == place]
        raise DataError(
            f"expected images of every class, got none of {_some(names)} in {place}: add some, or remove what is empty"
        )


def _check_same(train: ImageFolder, test: ImageFolder) -> None:
    if not test.classes:
        raise DataError(
            f"expected test images in class folders, got images without classes in {test.root}: put the images of each "
            "class in a folder of its own"
        )
    if test.classes != train.classes:
        missing = [name for name in train.classes if name not in test.classes]
        strange = [name for name in test.classes if name not in train.classes]
        where = f"only the training images have {_some(missing)}" if missing else ""
        also = f"only the test images have {_some(strange)}" if strange else ""
        told = " and ".join(filter(None, (where, also))) or "them in another order"
        raise DataError(f"expected the same classes in training and test images, but {told}: give sets that match")


def _limited(images: ImageFolder, limit: int | None) -> ImageFolder:
    if limit is None or limit >= len(images):
        return images
    if limit < 1:
        raise ConfigError(f"expected a limit of at least 1 image, got {limit}")
    return images.select([i * len(images) // limit for i in range(limit)])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
