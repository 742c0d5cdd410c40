"""From the words of a configuration to data sets: what a run trains on, and what it is measured on."""

from pathlib import Path
from typing import Literal

from mergevq.data.embedded import EmbeddedImages
from mergevq.data.folder import ImageFolder

EMBEDDED = "embedded"
"""Stands for the images that come with the package, wherever a folder is asked for."""

Split = Literal["train", "val", "all"]
"""Which images of a source: those that a training on it trains on, those it holds out, or both."""

_HELD_OUT = ("val", "validation", "test")


def training_and_validation(
    train: str | Path, val: str | Path = "", val_fraction: float = 0.02
) -> tuple[ImageFolder, ImageFolder]:
    """Returns the images to train on and the held-out ones, with the same class numbers.

    Args:
        train: a folder, a .zip, a pattern that names several .zip files, or "embedded". Of folders train and val (or
            validation, test) directly inside, only train is trained on.
        val: the same for the held-out images. If empty they are the folder val (or validation, test) of `train`, or,
            where there is none, a share of `train`.
        val_fraction: that share; a hash of each image's name chooses it.

    Raises:
        DataError: a source is missing, empty or broken.
        ConfigError: the share is not between 0 and 1.
    """
    if train == EMBEDDED:
        images: ImageFolder = EmbeddedImages("train")
        return images, evaluation_images(val, images.classes) if val else EmbeddedImages("val")
    images = ImageFolder(train)
    training = images.part("train") if "train" in images.parts else images
    if val:
        return training, evaluation_images(val, images.classes)
    for name in _HELD_OUT:
        if training is not images and name in images.parts:
            return training, images.part(name)
    return training.split(val_fraction)


def evaluation_images(source: str | Path | ImageFolder, classes: tuple[str, ...] | None = None) -> ImageFolder:
    """Returns the images to measure on: of a source with parts its held-out part, else all.

    Args:
        source: a folder, a .zip, a pattern that names several .zip files, or "embedded". A data set is returned as is.
        classes: number the labels by this list, and give images of other classes -1.

    Raises:
        DataError: the source is missing, empty or broken.
    """
    if isinstance(source, ImageFolder):
        return source
    if source == EMBEDDED:
        return EmbeddedImages("val")
    images = ImageFolder(source, classes=classes)
    return next((images.part(name) for name in _HELD_OUT if name in images.parts), images)


def training_images(source: str | Path | ImageFolder) -> ImageFolder:
    """Returns the images that close ones are looked for in: of a source with parts its part train, else all.

    Args:
        source: a folder, a .zip, a pattern that names several .zip files, or "embedded". A data set is returned as is.

    Raises:
        DataError: the source is missing, empty or broken.
    """
    if isinstance(source, ImageFolder):
        return source
    if source == EMBEDDED:
        return EmbeddedImages("train")
    images = ImageFolder(source)
    return images.part("train") if "train" in images.parts else images


def images_of_split(source: str | Path, split: Split, val_fraction: float = 0.02) -> ImageFolder:
    """Returns the images that training on `source` trains on, those it holds out, or all.

    Args:
        source: a folder, a .zip, a pattern that names several .zip files, or "embedded".
        split: "train", "val" or "all". All have the same class numbers.
        val_fraction: share that is held out of a source without held-out images of its own.

    Raises:
        DataError: the source is missing, empty or broken.
        ConfigError: the share is not between 0 and 1.
    """
    if split == "all":
        return ImageFolder(EmbeddedImages("val").root, cache=True) if source == EMBEDDED else ImageFolder(source)
    train, val = training_and_validation(source, val_fraction=val_fraction)
    return train if split == "train" else val
