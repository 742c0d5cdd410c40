"""`mergevq cache-teacher`: what it writes and says, how it goes on, and one line for whatever is wrong."""

from pathlib import Path

import pytest
import torch

from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.data.sources import images_of_split
from mergevq.data.teacher_cache import TeacherCache
from mergevq.layers.teachers import Teacher, load_teacher


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with six photos to train on and three held out."""
    monkeypatch.chdir(tmp_path)
    pixels = torch.rand(9, 3, 34, 40, generator=torch.Generator().manual_seed(3)) * 2 - 1
    write_images("photos", pixels, [f"{'train' if i < 6 else 'val'}/{'ab'[i % 2]}/{i}.png" for i in range(9)])
    Path("full").mkdir()
    Path("full", "precious.txt").write_text("keep me")
    return tmp_path


def run(words: str) -> int:
    return main(f"cache-teacher {words} --workers 0".split())


def test_it_writes_a_cache_goes_on_and_is_described(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "photos -o cache --teacher lite0 --size 32 --shard-size 4 --batch-size 4"
    forward, calls = Teacher.forward, 0

    def interrupted(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Teacher, "forward", interrupted)
    assert run(options) == 130
    assert capsys.readouterr().err == (
        "mergevq: interrupted: the same command without --force goes on with what is missing\n"
    )
    assert run(options) == 0
    assert calls == 3  # Two shards, of which the second was tried twice.
    out = capsys.readouterr().out.splitlines()
    teacher = load_teacher("lite0")
    size = sum(path.stat().st_size for path in Path("cache").iterdir())
    assert out == [
        f"cache: 6 images of 32 x 32 pixels, {size:,} bytes",
        f"lite0, 1280 numbers an image, weights {teacher.checksum()[:12]}, images bicubic to 224 x 224 pixels",
    ]
    TeacherCache("cache").check_fits(images_of_split("photos", "train"), 32, teacher)
    assert main(["info", "cache"]) == 0
    told = capsys.readouterr().out
    assert "teacher-cache/1" in told and teacher.checksum() in told and "6 of 32 x 32 pixels" in told
    shard = Path("cache", "shard-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x04")
    assert main(["info", "cache"]) == 2
    assert "the checksum differs: cache the teacher again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("nowhere -o new --teacher lite0", "nowhere"),
        ("photos -o full --teacher lite0", "full exists already"),
        ("photos -o new --teacher lite9", "did you mean lite"),
        ("photos -o new --teacher lite0 --teacher-weights x.safetensors", "name of a timm model"),
        ("photos -o new --teacher lite0 --size 0", "got 6 of 0 pixels"),
        ("photos -o new --teacher lite0 --batch-size 0", "--batch-size"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(
    words: str, match: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    assert run(words) == 2
    err = capsys.readouterr().err
    assert match in err and err.count("\n") == 1 and err.startswith("mergevq: error: ")
    assert sorted(place.rglob("*")) == before
