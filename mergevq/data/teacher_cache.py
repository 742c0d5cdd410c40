"""A teacher cache: what a teacher makes of each image of a data set, computed once, to align without running it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergevq.data.folder import ImageFolder
from mergevq.data.images import center_square, stack_images
from mergevq.data.loader import Batch
from mergevq.data.shard_folder import Layout, ShardFolder, Shards, ShardSettings
from mergevq.data.shard_writer import write_shards
from mergevq.data.token_shards import unsigned
from mergevq.errors import ConfigError, DataError, ShapeError, TokenFileError
from mergevq.layers.teachers import Teacher, load_teacher


@dataclass(frozen=True)
class TeacherCacheSettings(ShardSettings):
    """What a cache holds: which images, seen by which teacher, and how. Two of equal settings hold the same numbers."""

    teacher: str
    """Its name, such as lite0."""
    checksum: str
    """SHA-256 of its weights."""
    preprocessing: str
    """What it does to an image before its network sees it, in words."""
    width: int
    """Dt, numbers an image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.width, self.image_size) < 1:
            raise ConfigError(f"expected a width and an image_size of at least 1, got {self.width}, {self.image_size}")

    def layout(self, images: int) -> Layout:
        """Returns type and shape of every array in a shard of so many readable images."""
        return {
            "number": (unsigned(self.data_images - 1), (images,)),
            "features": (np.dtype("<f4"), (images, self.width)),
        }


class TeacherCache:
    """A finished teacher cache, memory-mapped: a batch reads its own rows and nothing else.

    Args:
        folder: where `mergevq cache-teacher` wrote it.

    Raises:
        TokenFileError: there is no finished cache, or a part of it is missing, truncated or not its own.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shards = Shards(teacher_folder(folder), TeacherCacheSettings)
        self._rows = torch.full((self.settings.data_images,), -1)
        numbers = self._shards.joined("number")
        if int(numbers.max()) >= len(self._rows):
            raise TokenFileError(
                f"{self.folder}: expected images 0..{len(self._rows) - 1}, got others: cache the teacher again"
            )
        self._rows[numbers] = torch.arange(len(self))

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def settings(self) -> TeacherCacheSettings:
        """What the cache holds."""
        return self._shards.settings

    @property
    def unreadable(self) -> dict[str, str]:
        """Name and reason of each image that was left out."""
        return self._shards.unreadable

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings and of all numbers."""
        return self._shards.fingerprint

    def features(self, numbers: Int[Tensor, " B"]) -> Float[Tensor, "B Dt"]:
        """Returns the teacher's output for some images, copied to the CPU.

        Args:
            numbers: of the images in their data set, on the CPU, in any order.

        Raises:
            DataError: the cache does not hold one of them.
        """
        rows = self._rows[numbers].numpy()
        if (rows < 0).any():
            number = int(numbers[int((rows < 0).argmax())])
            raise DataError(
                f"{self.folder}: expected the teacher's features of image {number}, got none: it could not be read "
                "when they were cached; cache the teacher again"
            )
        found = np.empty((len(rows), self.settings.width), np.float32)
        shards = np.searchsorted(self._shards.ends, rows, side="right")
        for shard in np.unique(shards):
            here = shards == shard
            first = self._shards.ends[shard - 1] if shard else 0
            found[here] = self._shards.arrays[shard]["features"][rows[here] - first]
        return torch.from_numpy(found)

    def check_fits(self, images: ImageFolder, image_size: int, teacher: str | Teacher) -> None:
        """Checks that the features are of these images at this size by this teacher; one by name is not loaded.

        Raises:
            ConfigError: another teacher made them, or images of another size.
            DataError: they are of other images.
        """
        held, name = self.settings, teacher if isinstance(teacher, str) else teacher.name
        if name != held.teacher:
            raise ConfigError(
                f"{self.folder}: expected features of teacher {name} (loss.teacher), got those of {held.teacher}: name "
                "that one, or cache the teacher again"
            )
        if isinstance(teacher, Teacher) and (teacher.checksum(), teacher.preprocessing()) != (
            held.checksum,
            held.preprocessing,
        ):
            raise ConfigError(
                f"{self.folder}: expected features of {name} with the weights and the preprocessing that were given, "
                f"got those of weights {held.checksum[:12]} after {held.preprocessing}: cache the teacher again"
            )
        if image_size != held.image_size:
            raise ConfigError(
                f"{self.folder}: expected features of images of {image_size} x {image_size} pixels, got of "
                f"{held.image_size} x {held.image_size}: cache the teacher again with --size {image_size}"
            )
        if images.fingerprint() != held.data:
            raise DataError(
                f"{self.folder}: expected features of the {len(images):,} images to train on in {images.root}, got of "
                f"{held.data_images:,} others: cache the teacher again with the run's data, --split and --val-fraction"
            )

    def verify(self) -> None:
        """Reads every shard whole and compares its SHA-256 with the manifest's.

        Raises:
            TokenFileError: a file is not the one that was written.
        """
        self._shards.verify()


def teacher_folder(folder: str | Path) -> ShardFolder:
    """Returns a folder as that of a teacher cache."""
    return ShardFolder(Path(folder), "teacher-cache/1", "mergevq cache-teacher", "cache the teacher again")


def write_teacher_cache(
    teacher: str | nn.Module,
    images: ImageFolder,
    out: str | Path,
    *,
    size: int,
    shard_size: int = 4096,
    batch_size: int = 16,
    workers: int = 2,
    device: torch.device | str | None = None,
    force: bool = False,
    on_images: Callable[[int], None] | None = None,
) -> TeacherCache:
    """Shows every image to a teacher, and returns the cache in the folder `out`; float32, whatever the autocast.

    Unreadable images are left out; `TeacherCache.unreadable` names them. If `out` holds an unfinished cache of the same
    teacher, images and settings, its shards are kept and the missing ones are made; on the same machine with the same
    `batch_size` the files are those of an uninterrupted run.

    Args:
        teacher: as `load_teacher` takes it; moved to `device`.
        images: those that will be trained on.
        out: folder to write.
        size: side in pixels of the square it is shown: the tokenizer's `image_size`.
        shard_size: images in a file. What an interrupted run loses at most.
        batch_size: images at a time.
        workers: processes that read images.
        device: where to compute; None leaves the teacher where it is.
        force: start anew, and remove the files of a cache that is in `out`. Others stay.
        on_images: called with the number of images done, those of shards that were there included.

    Raises:
        OutputExistsError: there is something else in `out`: a finished cache, one of other settings, other files.
        ConfigError: there is no such teacher, or a setting is impossible.
        ShapeError: the teacher gives something else than finite numbers [B, Dt].
        DataError: there are no images, or none can be read.
        WriteError: the disk is full, or the folder does not allow files.
    """
    teacher = load_teacher(teacher)
    if device is not None:
        teacher.to(device)
    if len(images) < 1 or size < 1:
        raise DataError(f"expected images to show to {teacher.name}, got {len(images)} of {size} pixels")
    width = teacher.width or _show(teacher, stack_images([center_square(images[0].image, size)])).shape[1]
    settings = TeacherCacheSettings(
        teacher=teacher.name,
        checksum=teacher.checksum(),
        preprocessing=teacher.preprocessing(),
        width=width,
        data=images.fingerprint(),
        data_images=len(images),
        image_size=size,
        shard_size=shard_size,
    )

    def encode(batch: Batch) -> dict[str, Tensor]:
        found = _show(teacher, batch["image"])
        if found.shape[1] != width:
            raise ShapeError(f"expected {width} numbers an image from teacher {teacher.name}, got {found.shape[1]}")
        return {"features": found}

    write_shards(
        teacher_folder(out),
        settings,
        images,
        encode,
        batch_size=batch_size,
        workers=workers,
        force=force,
        on_images=on_images,
    )
    return TeacherCache(out)


def _show(teacher: Teacher, images: Tensor) -> Tensor:
    device = teacher.mean.device
    with torch.autocast(device.type, enabled=False):
        found: Tensor = teacher(images.to(device)).float()
    if found.ndim != 2 or len(found) != len(images) or not bool(found.isfinite().all()):
        raise ShapeError(
            f"expected finite numbers [{len(images)}, Dt] from teacher {teacher.name}, got shape {tuple(found.shape)} "
            f"with {int((~found.isfinite()).sum())} that are NaN or infinite"
        )
    return found
