"""A teacher cache holds what the teacher says, survives being stopped, and refuses what is not its own."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from mergevq.data.folder import ImageFolder
from mergevq.data.images import read_images
from mergevq.data.shard_folder import MANIFEST, UNFINISHED
from mergevq.data.teacher_cache import TeacherCache, write_teacher_cache
from mergevq.data.token_cache import TokenCache
from mergevq.errors import ConfigError, DataError, OutputExistsError, ShapeError, TokenFileError
from mergevq.layers.teachers import Teacher, load_teacher

COUNT, BROKEN = 11, 5
OPTIONS: dict[str, Any] = {"size": 16, "shard_size": 4, "batch_size": 3, "workers": 0}


class Small(nn.Module):
    """Seven numbers from images of eight pixels; a dropout would show a teacher that is not in evaluation mode."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7), nn.Dropout(0.5))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(images)
        return out


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(Small(), size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Eleven images, one of which cannot be read."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8)).save(root / f"{i:03d}.png")
    (root / f"{BROKEN:03d}.png").write_bytes(b"no image")
    return ImageFolder(root)


@pytest.fixture
def write(teacher: Teacher, data: ImageFolder) -> Callable[..., TeacherCache]:
    """Writes a cache with `OPTIONS`, some of them changed."""

    def write(out: Path, by: nn.Module | None = None, images: ImageFolder | None = None, **other: Any) -> TeacherCache:
        images = data if images is None else images
        return write_teacher_cache(by or teacher, images, out, **{**OPTIONS, **other})

    return write


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_after(images: int) -> Callable[[int], None]:
    """Raises when so many images are done."""
    seen = 0

    def stop(done: int) -> None:
        nonlocal seen
        seen += done
        if seen >= images:
            raise KeyboardInterrupt

    return stop


def test_a_cache_gives_back_what_the_teacher_says(
    write: Callable[..., TeacherCache], teacher: Teacher, data: ImageFolder, tmp_path: Path
) -> None:
    done: list[int] = []
    cache = write(tmp_path / "cache", on_images=done.append)
    assert (len(cache), sum(done), list(cache.unreadable)) == (COUNT - 1, COUNT, [data.name(BROKEN)])
    held = cache.settings
    assert (held.teacher, held.width, held.image_size, held.data) == ("Small", 7, 16, data.fingerprint())
    assert (held.checksum, held.preprocessing) == (teacher.checksum(), teacher.preprocessing())
    numbers = torch.tensor([10, 0, 7, 7, 4, 3])
    shown = read_images([data.root / data.name(i) for i in numbers.tolist()], size=16)
    torch.testing.assert_close(cache.features(numbers), teacher(shown), rtol=1e-5, atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(cache)).features(numbers), cache.features(numbers))
    with pytest.raises(DataError, match=f"features of image {BROKEN}, got none: it could not be read"):
        cache.features(torch.tensor([1, BROKEN]))
    # Any safetensors reader opens a shard.
    shard = load_file(tmp_path / "cache" / "shard-00001.safetensors")
    assert shard["number"].tolist() == [4, 6, 7] and shard["features"].dtype == np.float32
    cache.verify()


@pytest.mark.parametrize("images", [3, 7, 11])
def test_a_run_stopped_anywhere_is_gone_on_with(
    write: Callable[..., TeacherCache], tmp_path: Path, images: int
) -> None:
    write(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", on_images=stop_after(images))
    kept = contents(tmp_path / "cut")
    assert UNFINISHED in kept and len(kept) == 1 + (images - 1) // 4
    with pytest.raises(TokenFileError, match="interrupted: `mergevq cache-teacher` with the same options goes on"):
        TeacherCache(tmp_path / "cut")
    write(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_only_the_same_work_is_gone_on_with(
    write: Callable[..., TeacherCache], data: ImageFolder, tmp_path: Path
) -> None:
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        write(out, on_images=stop_after(7))
    before = contents(out)
    for wrong, changed in (
        ("checksum", {"by": load_teacher(Small(1), size=8, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))}),
        ("preprocessing", {"by": load_teacher(Small(), size=8)}),
        ("data", {"images": data.select(range(COUNT - 1))}),
        ("image_size, 16 instead of 20", {"size": 20}),
    ):
        with pytest.raises(OutputExistsError, match=f"unfinished teacher cache of another {wrong}"):
            write(out, **changed)
    assert contents(out) == before
    write(out)
    with pytest.raises(OutputExistsError, match="finished teacher cache"):
        write(out)


def test_a_cache_of_another_teacher_size_or_data_is_refused(
    write: Callable[..., TeacherCache], teacher: Teacher, data: ImageFolder, tmp_path: Path
) -> None:
    cache = write(tmp_path / "cache")
    cache.check_fits(data, 16, "Small")
    cache.check_fits(data, 16, teacher)
    for arguments, error, match in (
        ((data, 16, "lite0"), ConfigError, r"features of teacher lite0 \(loss.teacher\), got those of Small"),
        ((data, 16, load_teacher(Small(1), size=8)), ConfigError, "Small with the weights and the preprocessing"),
        ((data, 32, "Small"), ConfigError, "images of 32 x 32 pixels, got of 16 x 16: .*--size 32"),
        ((data.select([0, 1]), 16, "Small"), DataError, "of the 2 images to train on .*, got of 11 others"),
    ):
        with pytest.raises(error, match=match) as caught:
            cache.check_fits(*arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_what_no_cache_can_hold_is_refused(
    write: Callable[..., TeacherCache], data: ImageFolder, tmp_path: Path
) -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) / 0

    class Maps(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    for network, shape in ((Broken(), r"\(1, 768\) with 768"), (Maps(), r"\(1, 3, 16, 16\) with 0")):
        with pytest.raises(ShapeError, match=rf"numbers \[1, Dt\] from teacher {type(network).__name__}.*{shape} that"):
            write(tmp_path / "none", network)
    with pytest.raises(DataError, match="got 0 of 16 pixels"):
        write(tmp_path / "none", images=data.select([]))
    with pytest.raises(ConfigError, match="at least one image a shard, got 0"):
        write(tmp_path / "none", shard_size=0)
    with pytest.raises(ConfigError, match="batch_size"):
        write(tmp_path / "none", batch_size=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.usefixtures("unchecked")
def test_a_damaged_cache_is_one_line(write: Callable[..., TeacherCache], tmp_path: Path) -> None:
    def edit(folder: Path, **changed: Any) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["settings"].update(changed)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    def cut(folder: Path) -> None:
        path = folder / "shard-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-4])

    def renumber(folder: Path) -> None:
        path = folder / "shard-00000.safetensors"
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        data = bytearray(path.read_bytes())
        assert data[start:][-4:] == bytes([0, 1, 2, 3])  # After the floats.
        data[-4:] = bytes([0, 1, 2, 200])
        path.write_bytes(data)

    for name, (damage, match) in enumerate(
        (
            (lambda f: (f / MANIFEST).unlink(), "no manifest.json in it"),
            (lambda f: edit(f, width=0), "width and an image_size of at least 1"),
            (lambda f: edit(f, width=8), "features.*cache the teacher again"),
            (lambda f: edit(f, colour="red"), "colour"),
            (cut, "truncated"),
            (renumber, r"expected images 0\.\.10"),
            (lambda f: (f / "shard-00001.safetensors").unlink(), "shard of the teacher cache, it is missing"),
        )
    ):
        folder = tmp_path / str(name)
        write(folder)
        damage(folder)
        with pytest.raises(TokenFileError, match=match) as caught:
            TeacherCache(folder)
        assert "\n" not in str(caught.value)
    write(tmp_path / "fine")
    with pytest.raises(TokenFileError, match="expected a token-cache file, got a teacher-cache file"):
        TokenCache(tmp_path / "fine")
