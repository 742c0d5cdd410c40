"""The order of training: the same whatever the workers, shared out over processes, and continued by a resumed run."""

import itertools
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mergevq.data.augment import Views, alignment_views
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch, batches_per_epoch, evaluation_batches, training_batches
from mergevq.errors import ConfigError, DataError

VIEWS = alignment_views(16, 4, flip=True)


def folder(root: Path, count: int) -> ImageFolder:
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / f"{i:03d}.png")
    return ImageFolder(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    return folder(tmp_path_factory.mktemp("images"), 22)


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


def numbers(batches: Iterable[Batch]) -> list[int]:
    return [number for batch in batches for number in batch["number"].tolist()]


def test_batches_hold_the_views_in_range(data: ImageFolder) -> None:
    (batch,) = take(training_batches(data, VIEWS, batch_size=4, seed=0), 1)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "image": (4, 3, 16, 16),
        "view_student": (4, 3, 16, 16),
        "view_teacher": (4, 3, 16, 16),
        "label": (4,),
        "number": (4,),
    }
    for key in ("image", "view_student", "view_teacher"):
        assert batch[key].dtype == torch.float32
        assert -1 <= float(batch[key].min()) < -0.5 and 0.5 < float(batch[key].max()) <= 1
    assert batch["label"].tolist() == [-1] * 4
    assert set(take(training_batches(data, Views(16), batch_size=4, seed=0), 1)[0]) == {"image", "label", "number"}


def test_an_epoch_sees_each_image_once_and_the_next_in_another_order(data: ImageFolder) -> None:
    per_epoch = batches_per_epoch(len(data), 4)
    assert per_epoch == 5
    seen = numbers(take(training_batches(data, Views(16), batch_size=4, seed=0), 3 * per_epoch))
    epochs = [seen[i : i + 20] for i in (0, 20, 40)]
    for epoch in epochs:
        assert max(Counter(epoch).values()) == 1 and len(epoch) == 20
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert set(seen) == set(range(22))
    assert numbers(take(training_batches(data, Views(16), batch_size=4, seed=1), per_epoch)) != epochs[0]


def test_crops_change_from_epoch_to_epoch(data: ImageFolder) -> None:
    batches = take(training_batches(data, Views(16), batch_size=22, seed=0), 2)
    first, second = (batch["image"][batch["number"].argsort()] for batch in batches)
    same = sum(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert same < 5  # The square has five places to lie in.


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_mid_epoch_continues_exactly(data: ImageFolder, workers: int) -> None:
    whole = take(training_batches(data, VIEWS, batch_size=4, seed=7), 13)
    for start in (0, 3, 5, 12):
        rest = take(training_batches(data, VIEWS, batch_size=4, seed=7, workers=workers, start_batch=start), 13 - start)
        assert equal(rest, whole[start:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(data: ImageFolder, world_size: int) -> None:
    one = take(training_batches(data, VIEWS, batch_size=2 * world_size, seed=3), 8)
    ranks = [
        take(training_batches(data, VIEWS, batch_size=2, seed=3, rank=rank, world_size=world_size), 8)
        for rank in range(world_size)
    ]
    joined = [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in zip(*ranks, strict=True)]
    assert equal(joined, one)


def test_a_small_set_is_repeated_within_the_batch(data: ImageFolder) -> None:
    few = data.select([0, 1, 2])
    batches = take(training_batches(few, Views(16), batch_size=4, seed=0, world_size=2, rank=1), 2)
    assert [len(batch["image"]) for batch in batches] == [4, 4]
    both = [
        take(training_batches(few, Views(16), batch_size=4, seed=0, world_size=2, rank=rank), 1)[0] for rank in (0, 1)
    ]
    assert sorted(Counter(torch.cat([batch["number"] for batch in both]).tolist()).values()) == [2, 3, 3]
    image, number = torch.cat([batch["image"] for batch in both]), torch.cat([batch["number"] for batch in both])
    repeats = image[number == number.mode().values]
    assert len(torch.unique(repeats, dim=0)) > 1


def test_global_random_state_is_left_alone(data: ImageFolder) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(training_batches(data, VIEWS, batch_size=4, seed=0, workers=1), 2)
    take(evaluation_batches(data, 16, batch_size=4), 2)
    assert torch.equal(before, torch.get_rng_state())
    first = take(training_batches(data, VIEWS, batch_size=4, seed=0), 2)
    torch.manual_seed(1)
    assert equal(first, take(training_batches(data, VIEWS, batch_size=4, seed=0), 2))


def test_evaluation_sees_every_image_once_in_order(data: ImageFolder) -> None:
    batches = list(evaluation_batches(data, 16, batch_size=5))
    assert numbers(batches) == list(range(22)) and len(batches[-1]["image"]) == 2
    image = np.asarray(data[3].image.resize((19, 16), Image.Resampling.BICUBIC))[:, 1:17]
    assert torch.equal(
        ((batches[0]["image"][3] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(image.copy())
    )
    shared = [numbers(evaluation_batches(data, 16, batch_size=5, rank=r, world_size=3)) for r in range(3)]
    assert sorted(itertools.chain(*shared)) == list(range(22))
    whole = [evaluation_batches(data, 16, batch_size=5, rank=r, world_size=3, whole_batches=True) for r in range(3)]
    shares = [[batch["number"].tolist() for batch in share] for share in whole]
    assert [*itertools.chain(*itertools.zip_longest(*shares))][:5] == [batch["number"].tolist() for batch in batches]
    assert shares[2] == [list(range(10, 15))]
    assert not [*evaluation_batches(data, 16, batch_size=22, rank=1, world_size=2, whole_batches=True)]
    assert [batch["image"].shape[2] for batch in evaluation_batches(data, 8, batch_size=22, workers=2)] == [8]


def test_a_limited_evaluation_is_spread_over_the_set(data: ImageFolder) -> None:
    assert numbers(evaluation_batches(data, 16, batch_size=5, limit=4)) == [0, 5, 11, 16]
    assert len(numbers(evaluation_batches(data, 16, batch_size=5, limit=99))) == 22


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_reported_and_replaced(
    tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = folder(tmp_path, 8)
    for name in ("002.png", "003.png"):
        (tmp_path / name).write_bytes(b"broken")
    batches = take(training_batches(data, VIEWS, batch_size=4, seed=0, workers=workers), 4)
    assert sorted(data.unreadable) == ["002.png", "003.png"]
    assert sorted(numbers(batches[:2])) == [0, 1, 4, 4, 4, 5, 6, 7]
    assert caplog.text.count("002.png") >= 1 and caplog.text.count("left out") == 2
    rest = take(training_batches(ImageFolder(tmp_path), VIEWS, batch_size=4, seed=0, start_batch=2), 2)
    assert equal(rest, batches[2:])

    data = ImageFolder(tmp_path)
    batches = list(evaluation_batches(data, 16, batch_size=2, workers=workers))
    assert numbers(batches) == [0, 1, 4, 5, 6, 7]
    assert sorted(data.unreadable) == ["002.png", "003.png"]


def test_workers_do_not_share_an_open_archive(tmp_path: Path) -> None:
    loose = folder(tmp_path / "loose", 80)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "loose").iterdir()):
            archive.write(path, path.name)
    packed = ImageFolder(tmp_path / "all.zip")  # Opens the archive in this process, before the workers fork.
    batches = list(evaluation_batches(packed, 16, batch_size=10, workers=2))
    assert packed.unreadable == {}
    assert equal(batches, list(evaluation_batches(loose, 16, batch_size=10)))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_break_after_opening_are_one_line(tmp_path: Path, workers: int) -> None:
    data = folder(tmp_path, 3)
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    for batches in (
        training_batches(data, VIEWS, batch_size=2, seed=0, workers=workers),
        evaluation_batches(data, 16, batch_size=2, workers=workers),
    ):
        with pytest.raises(DataError, match="all 3 tried are broken, first 00") as caught:
            list(batches)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["raise SystemExit(0)", "next(broken)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_readers_do_not_outlive_or_hold_up_their_process(tmp_path: Path, end: str) -> None:
    """A process ends although an iterator with readers, which ignore SIGTERM, is still there."""
    folder(tmp_path, 6)
    script = f"""
import multiprocessing, os, signal
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
batches = evaluation_batches(ImageFolder({str(tmp_path)!r}), 16, batch_size=2, workers=1)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
broken = iter(())
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "Error" not in done.stderr.replace("StopIteration", "")
    readers = [int(pid) for pid in done.stdout.split()]
    assert len(readers) == 1
    deadline = time.monotonic() + 20  # Readers of a killed process look for it every five seconds.
    while any(Path(f"/proc/{pid}").exists() for pid in readers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in readers)


def test_impossible_arguments_are_told_at_once(data: ImageFolder) -> None:
    with pytest.raises(ConfigError, match=r"rank must lie in 0\.\.1, got 2"):
        training_batches(data, VIEWS, batch_size=4, seed=0, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="start_batch must be at least 0, got -1"):
        training_batches(data, VIEWS, batch_size=4, seed=0, start_batch=-1)
    with pytest.raises(ConfigError, match="limit of at least 1, got 4 and 0"):
        evaluation_batches(data, 16, batch_size=4, limit=0)
