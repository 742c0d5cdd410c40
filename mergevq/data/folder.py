"""A data set of image files: a folder, a zip archive, or several archives, in an order that never changes.

Nothing is decoded to open it but the first image. An unreadable image is found when its turn comes.
"""

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from mergevq.data.images import SUFFIXES, all_unreadable, image_paths, read_image
from mergevq.errors import ConfigError, DataError

PARTS = frozenset({"train", "val", "validation", "test"})
"""Names of top folders that divide a data set and are not classes."""


class Sample(NamedTuple):
    image: Image.Image
    """8-bit RGB, of its own size."""
    label: int
    """Number of its class, or -1."""
    name: str
    """Path within the data set, with slashes."""
    number: int
    """Place in the data set."""


class _Entry(NamedTuple):
    name: str
    file: Path
    member: str | None
    """Path inside the archive `file`; None if `file` is the image."""


class ImageFolder(Dataset[Sample]):
    """Images of a folder, of a .zip, or of all .zip files that a folder or a pattern like "train-*.zip" names.

    Sorted by name; the same files give the same order on every machine. The first folder that not all images share is
    the class ("train/cats/tom.jpg": cats), top folders called train, val, validation or test set aside; if any image
    lies outside such a folder there are no classes. A folder's archives are read only if it holds no loose images.

    `data[i]` is a `Sample`. If image i cannot be read it is the next one that can, and `unreadable` says why: the same
    on every run, and no pass over the data is needed to find out. `read(i)` raises instead.

    Args:
        root: where the images are. A .zip is read in place.
        part: keep only what lies below this top folder ("train").
        classes: number the labels by this list and give other images -1; by default the sorted class folders.
        cache: keep decoded images in memory. For sets of small images.

    Raises:
        DataError: nothing is there, there are no images, or none of them can be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        part: str | None = None,
        classes: Sequence[str] | None = None,
        cache: bool = False,
    ) -> None:
        self.root = Path(root)
        self.cached = cache
        self._entries = _list(self.root)
        self.classes, self.labels = _label([_folders(entry) for entry in self._entries], classes)
        if part is not None:
            numbers = self._numbers_in(part)
            self._entries = [self._entries[i] for i in numbers]
            self.labels = [self.labels[i] for i in numbers]
        self._forget()
        self[0]  # Finds out now, not in the middle of a run, that nothing can be read.

    def _forget(self) -> None:
        self.unreadable: dict[str, str] = {}
        """Name and reason of every image that could not be read so far."""
        self._images: dict[int, Image.Image] = {}
        self._archives: dict[tuple[int, Path], zipfile.ZipFile] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, number: int) -> str:
        """Returns the path of image `number` within the data set, with slashes."""
        return self._entries[number].name

    def read(self, number: int) -> Sample:
        """Returns image `number`.

        Raises:
            DataError: it cannot be read.
        """
        entry, label = self._entries[number], self.labels[number]
        image = self._images.get(number)
        if image is None:
            image = self._decode(entry)
            if self.cached:
                self._images[number] = image
        return Sample(image, label, entry.name, number)

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"expected an image number in 0..{len(self) - 1}, got {number}")
        for step in range(len(self)):
            candidate = (number + step) % len(self)
            if self._entries[candidate].name in self.unreadable:
                continue
            try:
                return self.read(candidate)
            except DataError as error:
                self.unreadable[self._entries[candidate].name] = str(error)
        raise DataError(f"{self.root}: {all_unreadable(len(self), next(iter(self.unreadable.values())))}")

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the images' names, labels and sizes in bytes, in order, in hex. Reads no image.

        The same files, loose or in an archive, wherever they lie, give the same one.
        """
        sizes: dict[tuple[Path, str], int] = {}
        for path in {entry.file for entry in self._entries if entry.member is not None}:
            with zipfile.ZipFile(path) as archive:
                sizes |= {(path, member.filename): member.file_size for member in archive.infolist()}
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for entry, label in zip(self._entries, self.labels, strict=True):
            size = entry.file.stat().st_size if entry.member is None else sizes[entry.file, entry.member]
            digest.update(json.dumps([entry.name, label, size]).encode())
        return digest.hexdigest()

    def shared_with(self, other: "ImageFolder") -> int:
        """Returns how many of these images are images of another data set too: the same file, or the same member of the
        same archive. Links are followed; a copy is another image. Reads no image.

        Args:
            other: may have another root, or be a part of the same one.
        """
        theirs = set(other._places())
        return sum(place in theirs for place in self._places())

    def _places(self) -> Iterator[tuple[str, str | None]]:
        """Gives the real path of each image's file, and its name within an archive."""
        folders = {folder: folder.resolve() for folder in {entry.file.parent for entry in self._entries}}
        for entry in self._entries:
            path = folders[entry.file.parent] / entry.file.name
            yield str(path.resolve() if path.is_symlink() else path), entry.member

    def split(self, fraction: float) -> tuple["ImageFolder", "ImageFolder"]:
        """Divides the images in two, the second with about `fraction` of them, at least one.

        A hash of its name decides for each image, so adding files moves no other.

        Raises:
            ConfigError: the fraction is not inside 0..1.
            DataError: there are fewer than two images.
        """
        if not 0 < fraction < 1:
            raise ConfigError(f"expected a held-out fraction between 0 and 1, got {fraction}")
        if len(self) < 2:
            raise DataError(f"expected at least two images to divide in {self.root}, got {len(self)}")
        position = [_hash_to_unit(entry.name) for entry in self._entries]
        order = sorted(range(len(self)), key=position.__getitem__)
        held_out = sum(at < fraction for at in position)
        held_out = min(max(held_out, 1), len(self) - 1)
        return self.select(sorted(order[held_out:])), self.select(sorted(order[:held_out]))

    @property
    def parts(self) -> tuple[str, ...]:
        """Top folders called train, val, validation or test; empty if any image lies outside of them."""
        tops = {_folders(entry)[:1] for entry in self._entries}
        return tuple(sorted(top[0] for top in tops)) if all(top and top[0] in PARTS for top in tops) else ()

    def part(self, name: str) -> "ImageFolder":
        """Returns the images below the top folder `name`, with the same classes.

        Raises:
            DataError: there are none.
        """
        return self.select(self._numbers_in(name))

    def _numbers_in(self, part: str) -> list[int]:
        numbers = [i for i, entry in enumerate(self._entries) if _folders(entry)[:1] == (part,)]
        if not numbers:
            raise DataError(f"expected a folder {part} with images in {self.root}, got none")
        return numbers

    def select(self, numbers: Sequence[int]) -> "ImageFolder":
        """Returns a data set of these images in this order, with the same classes."""
        chosen = copy(self)
        chosen._entries = [self._entries[i] for i in numbers]
        chosen.labels = [self.labels[i] for i in numbers]
        chosen._forget()
        return chosen

    def _decode(self, entry: _Entry) -> Image.Image:
        if entry.member is None:
            return read_image(entry.file, entry.name)
        # A process of its own needs a handle of its own: forked ones would share the position in the file.
        key = (os.getpid(), entry.file)
        archive = self._archives.get(key)
        if archive is None:
            archive = self._archives[key] = zipfile.ZipFile(entry.file)
        try:
            data = archive.read(entry.member)
        except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:  # RuntimeError: encrypted.
            raise DataError(f"{entry.name}: cannot take this image out of {entry.file.name}: {error}") from error
        return read_image(io.BytesIO(data), entry.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archives": {}}  # Open archives do not travel to spawned workers.


# ----------------------------------------------------------------------------------------------------------- listing


def _list(root: Path) -> list[_Entry]:
    if root.is_dir():
        archives = sorted(path for path in root.glob("*.zip") if path.is_file())
        try:
            return [_Entry(path.relative_to(root).as_posix(), path, None) for path in image_paths(root)]
        except DataError:
            if not archives:
                raise
    elif root.exists():
        archives = [root]
    else:
        archives = sorted(path for path in root.parent.glob(root.name) if path.suffix == ".zip")
        if not archives:
            raise DataError(f"expected a folder of images or a .zip at {root}, got nothing there")
    found = [
        entry for path in archives for entry in _list_archive(path, prefix="" if path == root else f"{path.stem}/")
    ]
    if not found:
        raise DataError(f"expected images (.jpg, .png, .webp, ...) in {root}, got archives without any")
    return sorted(set(found))  # An updated archive may name a file twice.


def _list_archive(path: Path, prefix: str) -> list[_Entry]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member.filename for member in archive.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"expected a folder of images or a .zip, got {path}: {error}") from error
    visible = [m for m in members if not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(m).parts)]
    return [_Entry(prefix + m, path, m) for m in visible if PurePosixPath(m).suffix.lower() in SUFFIXES]


def _folders(entry: _Entry) -> tuple[str, ...]:
    """The folders an image lies in, from the top; an archive is not a folder."""
    return PurePosixPath(entry.name if entry.member is None else entry.member).parts[:-1]


def _label(folders: list[tuple[str, ...]], classes: Sequence[str] | None) -> tuple[tuple[str, ...], list[int]]:
    """Returns the class names, and the label of each image, from the folders that each lies in."""
    if classes is not None:
        known = {name: number for number, name in enumerate(classes)}
        return tuple(classes), [next((known[part] for part in parts if part in known), -1) for parts in folders]
    if all(parts[:1] and parts[0] in PARTS for parts in folders):
        folders = [parts[1:] for parts in folders]
    depth = min(map(len, folders))
    level = next((i for i in range(depth) if len({parts[i] for parts in folders}) > 1), depth)
    if level == depth:
        return (), [-1] * len(folders)
    names = tuple(sorted({parts[level] for parts in folders}))
    number = {name: i for i, name in enumerate(names)}
    return names, [number[parts[level]] for parts in folders]


def _hash_to_unit(name: str) -> float:
    """Returns a number in 0..1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
