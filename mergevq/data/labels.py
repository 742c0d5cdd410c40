"""Labels of images from a file, for data whose folders are not its classes."""

import csv
import io
import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mergevq.data.folder import ImageFolder
from mergevq.errors import DataError

_MOST = 1_000_000
_LONGEST = 1000


def label_images(images: ImageFolder, file: str | Path, known: Collection[str] = ()) -> ImageFolder:
    """Returns the images with labels from a file.

    The labels are either class names, numbered in sorted order, or class numbers from 0 on (-1: none), which become
    the names "0", "1" and so on. All labels of the file count, so every part of a data set numbers them alike.

    Args:
        images: each must have a label.
        file: JSON, `{name: label}`, if it ends in .json; else CSV, `name,label` in each line, a first line with these
            two words left out. Names are those of `ImageFolder.name`: paths within the data set, with slashes.
        known: names of further images that the file may label, such as those of the held-out part.

    Raises:
        DataError: the file cannot be read, an image has no label, or a name is no image's.
    """
    path = Path(file)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        came = (error.strerror or "nothing readable").lower() if isinstance(error, OSError) else "no text in UTF-8"
        raise DataError(f"{path}: expected a file of labels, got: {came}: check the path") from error
    pairs = _read_json(path, text) if path.suffix.lower() == ".json" else _read_csv(path, text)
    labels = dict(pairs)
    if len(labels) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise DataError(f"{path}: expected one label for each name, got {twice} more than once")
    names = [images.name(i) for i in range(len(images))]
    _check_names(path, labels, names, known)
    classes, numbers = _number(path, labels)
    labelled = images.select(range(len(images)))
    labelled.classes, labelled.labels = classes, [numbers[name] for name in names]
    return labelled


def _read_json(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        # The pairs as they stand in the file, so that a repeated name is seen.
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, the file is damaged ({error})") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise DataError(f'{path}: expected {{"name": label, ...}}, got {text.strip()[:20]!r}')
    return pairs


def _read_csv(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(text)) if row]
    except csv.Error as error:  # A quotation mark that is not closed, for example.
        raise DataError(f"{path}: expected name,label in each line, the file is damaged ({error})") from error
    if rows and [cell.strip().lower() for cell in rows[0]] == ["name", "label"]:
        rows = rows[1:]
    for row in rows:
        if len(row) != 2:
            raise DataError(f"{path}: expected name,label in each line, got {','.join(row)[:60]!r}")
    labels = [label.strip() for _, label in rows]
    if endless := next((label for label in labels if len(label) > _LONGEST), None):
        raise DataError(f"{path}: expected labels of at most {_LONGEST} characters, got {endless[:20]}...")
    whole = all(label.removeprefix("-").isdecimal() for label in labels)
    return [(row[0].strip(), int(label) if whole else label) for row, label in zip(rows, labels, strict=True)]


def _check_names(path: Path, labels: dict[str, Any], names: list[str], known: Collection[str]) -> None:
    missing = [name for name in names if name not in labels]
    if missing:
        raise DataError(
            f"{path}: expected a label for each of {len(names)} images, {len(missing)} have none, first {missing[0]}"
        )
    there = {*names, *known}
    unknown = [name for name in labels if name not in there]
    if unknown:
        raise DataError(
            f"{path}: expected names of images in the data set, such as {names[0]}, {len(unknown)} are not, first "
            f"{unknown[0]}"
        )


def _number(path: Path, labels: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Returns the names of all classes, and the class number of each image."""
    # Told apart by their types: of an unhashable value no set can be made.
    kinds = {type(label) for label in labels.values()}
    if kinds == {str}:
        classes = tuple(sorted(set(labels.values())))
        numbers = {name: i for i, name in enumerate(classes)}
        return classes, {name: numbers[label] for name, label in labels.items()}
    if kinds != {int}:
        raise DataError(f"{path}: expected labels that are all class names, or all whole numbers, got others")
    low, high = min(labels.values()), max(labels.values())
    if low < -1 or high >= _MOST:
        raise DataError(f"{path}: expected class numbers -1..{_MOST - 1}, got {low}..{high}")
    return tuple(map(str, range(high + 1))), labels
