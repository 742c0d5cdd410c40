"""Features of a data set on disk, made by several processes shard by shard, and gone on with after an interruption.

A shard holds every array of so many images of one part, whole or not at all. Its batches are the same whoever makes it,
so features do not depend on the number of processes.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.data.folder import ImageFolder
from mergevq.data.images import all_unreadable
from mergevq.data.loader import evaluation_batches
from mergevq.errors import CheckpointError, DataError, OutputExistsError
from mergevq.evaluation.feature_sources import FeatureSource
from mergevq.evaluation.processes import Processes
from mergevq.evaluation.protocol import versions
from mergevq.files import check_format, load_tensors, read_header, read_json, refuse_existing, save_tensors, write_json

FORM = "features/1"
RECORD = "features.json"

_SHARD_FORM = "feature-shard/1"
_SHARD = re.compile(r"(train|test)-\d{5,}\.safetensors")
_TEMPORARY = re.compile(r"\.((train|test)-\d{5,}|features)\.[0-9a-f]{8}\.tmp\.(safetensors|json)")

_LEFT_OVER = 3600
"""Seconds after which a temporary file is nobody's."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features of the readable images of a part, in the order of the data set."""

    features: Float[Tensor, "n D"]
    labels: Int[Tensor, " n"]


def remove_features(folder: Path) -> None:
    """Removes the features that a cache wrote to a folder, and nothing else; none if no cache did."""
    if not (folder / RECORD).is_file():
        return
    (folder / RECORD).unlink()
    for path in list(folder.iterdir()):
        if path.is_file() and (_SHARD.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name)):
            path.unlink()


class FeatureCache:
    """Features of the parts train and test in a folder.

    Args:
        folder: where; created if need be. Several machines need one that all of them see.
        sources: by name.
        arrays: names of all that they give.
        parts: the images, by part: train and test.
        size: side in pixels of what sources are given.
        batch_size: images at a time.
        shard_size: images in a file; what an interrupted run loses at most of each process.
        device: where the sources compute.
    """

    def __init__(
        self,
        folder: str | Path,
        sources: Mapping[str, FeatureSource],
        arrays: Sequence[str],
        parts: Mapping[str, ImageFolder],
        *,
        size: int,
        batch_size: int,
        shard_size: int,
        device: torch.device,
    ) -> None:
        self.folder, self.sources, self.parts = Path(folder), sources, parts
        self.size, self.batch_size, self.shard_size, self.device = size, batch_size, shard_size, device
        # All that a source says of itself: the same weights may see images at another size.
        facts = {f"{name} {fact}": x for name, source in sorted(sources.items()) for fact, x in source.facts().items()}
        self.settings: dict[str, Any] = {
            **{name.replace(" fingerprint", " model"): value for name, value in facts.items()},
            **{f"version of {name}": version for name, version in versions().items()},
            **{f"set of {part} images": images.fingerprint() for part, images in parts.items()},
            "set of kinds": sorted(arrays),
            "image size": size,
            "batch size": batch_size,
            "shard size": shard_size,
            "device": device.type,
        }
        self.key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    # --------------------------------------------------------------------------------------------------------- writing

    def claim(self, force: bool = False) -> None:
        """Makes the folder one of these features; what is there of them is kept.

        Args:
            force: features of other settings there are removed, instead of refused.

        Raises:
            OutputExistsError: it holds features of another model, other images or another kind, or other files.
            CheckpointError: its record is damaged.
            WriteError: it cannot be written.
        """
        record = self.folder / RECORD
        if record.exists():
            found = read_json(record)
            if isinstance(found, dict) and found.get("mergevq") == FORM and found.get("settings") == self.settings:
                self._remove_leftovers()
                return
            if not force:
                self._refuse(found)
            remove_features(self.folder)
        else:
            refuse_existing(self.folder, force)
        write_json(record, {"mergevq": FORM, "settings": self.settings})

    def _remove_leftovers(self) -> None:
        """Removes what interrupted writers left; a young file may be one that another evaluation is writing."""
        for path in list(self.folder.iterdir()):
            if _TEMPORARY.fullmatch(path.name):
                with suppress(FileNotFoundError):  # Its writer has just finished.
                    if time.time() - path.stat().st_mtime > _LEFT_OVER:
                        path.unlink()

    def _refuse(self, found: Any) -> None:
        check_format(found if isinstance(found, dict) else {}, FORM, self.folder / RECORD)
        other = found.get("settings") if isinstance(found.get("settings"), dict) else {}
        names = [*self.settings, *(name for name in other if name not in self.settings)]
        name = next((name for name in names if other.get(name) != self.settings.get(name)), "kind")
        came, wanted = (_short(values.get(name)) for values in (other, self.settings))
        raise OutputExistsError(
            f"{self.folder} holds features of another {name}, {came} instead of {wanted}: choose another folder, or "
            "start anew with force=True"
        )

    def fill(self, processes: Processes, on_images: Callable[[int], None]) -> None:
        """Makes this process's share of the shards that are not there yet.

        Args:
            processes: that share the work; all call this.
            on_images: called with the number of images done, those of shards that were there included.

        Raises:
            DataError, ShapeError: images or features are not usable.
            WriteError: the disk is full.
        """
        shards = [(part, number) for part, images in self.parts.items() for number in range(self._shards(images))]
        for part, number in shards[processes.rank :: processes.world_size]:
            first = number * self.shard_size
            images = self.parts[part].select(range(first, min(first + self.shard_size, len(self.parts[part]))))
            path = self._path(part, number)
            if self._is_done(path):
                on_images(len(images))
            else:
                self._write(path, images, on_images)

    def _write(self, path: Path, images: ImageFolder, on_images: Callable[[int], None]) -> None:
        columns: dict[str, list[Tensor]] = {}
        read, workers = 0, 2 if len(images) > 256 else 0
        try:
            for batch in evaluation_batches(images, self.size, batch_size=self.batch_size, workers=workers):
                columns.setdefault("label", []).append(batch["label"])
                pixels = batch["image"].to(self.device)
                with torch.autocast(self.device.type, enabled=False):
                    for source in self.sources.values():
                        for name, rows in source(pixels).items():
                            columns.setdefault(name, []).append(rows.float().cpu())
                read += len(pixels)
                on_images(len(pixels))
        except DataError:
            if len(images.unreadable) < len(images):
                raise
        on_images(len(images) - read)
        header = {"mergevq": _SHARD_FORM, "settings": self.key, "images": str(read)}
        header["unreadable"] = json.dumps(images.unreadable, ensure_ascii=False)
        tensors = {name: torch.cat(parts) for name, parts in columns.items()}
        save_tensors(path, tensors or {"label": torch.zeros(0, dtype=torch.int64)}, header)

    # --------------------------------------------------------------------------------------------------------- reading

    def unreadable(self, part: str) -> dict[str, str]:
        """Returns name and reason of every image of a part that could not be read.

        Raises:
            CheckpointError: a shard is missing or damaged.
            DataError: no image of the part could be read.
        """
        found: dict[str, str] = {}
        for number in range(self._shards(self.parts[part])):
            found |= json.loads(self._header(part, number)["unreadable"])
        if len(found) == len(self.parts[part]):
            raise DataError(all_unreadable(len(found), next(iter(found.values()))))
        return found

    def labels(self, part: str) -> Int[Tensor, " n"]:
        """Returns the labels of the readable images of a part.

        Raises:
            CheckpointError: a shard is missing or damaged.
        """
        numbers = range(self._shards(self.parts[part]))
        return torch.cat([load_tensors(self._path(part, number), names=("label",))[0]["label"] for number in numbers])

    def load(self, part: str, arrays: Sequence[str]) -> Labelled:
        """Returns features made of these arrays side by side.

        Raises:
            CheckpointError: a shard is missing or damaged.
        """
        numbers = range(self._shards(self.parts[part]))
        counts = [int(self._header(part, number)["images"]) for number in numbers]
        labels = torch.empty(sum(counts), dtype=torch.int64)
        features: Tensor | None = None
        row = 0
        for number, count in zip(numbers, counts, strict=True):
            if not count:
                continue
            tensors, _ = load_tensors(self._path(part, number), names=("label", *arrays))
            rows = torch.cat([tensors[name] for name in arrays], 1)
            if features is None:
                features = torch.empty(len(labels), rows.shape[1])
            features[row : row + count] = rows
            labels[row : row + count] = tensors["label"]
            row += count
        return Labelled(torch.empty(0, 0) if features is None else features, labels)

    # --------------------------------------------------------------------------------------------------------- shards

    def _shards(self, images: ImageFolder) -> int:
        return -(-len(images) // self.shard_size)

    def _path(self, part: str, number: int) -> Path:
        return self.folder / f"{part}-{number:05d}.safetensors"

    def _header(self, part: str, number: int) -> dict[str, str]:
        path = self._path(part, number)
        header = read_header(path)
        check_format(header, _SHARD_FORM, path)
        if header.get("settings") != self.key:
            raise CheckpointError(
                f"{path}: expected a shard of these features, got one of others: give a folder that no other "
                "evaluation writes to"
            )
        return header

    def _is_done(self, path: Path) -> bool:
        try:
            return path.exists() and read_header(path).get("settings") == self.key
        except CheckpointError:
            return False


def _short(value: Any) -> str:
    return "none" if value is None else value[:12] if isinstance(value, str) else json.dumps(value)
