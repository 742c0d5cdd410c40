"""`mergevq cache-tokens`: what it writes and says, how it goes on, and one line for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.data.sources import images_of_split
from mergevq.data.token_cache import TokenCache
from mergevq.tokenizer.model import MergeVQ


@pytest.fixture
def place(tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with two models and photos in two classes, six to train on and three held out."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save_pretrained("model.safetensors")
    pixels = torch.rand(9, 3, 34, 40, generator=torch.Generator().manual_seed(3)) * 2 - 1
    write_images("photos", pixels, [f"{'train' if i < 6 else 'val'}/{'ab'[i % 2]}/{i}.png" for i in range(9)])
    with torch.no_grad():
        next(tiny_tokenizer.encoder.parameters()).add_(0.5)
    tiny_tokenizer.save_pretrained("other.safetensors")
    Path("full").mkdir()
    Path("full", "precious.txt").write_text("keep me")
    Path("broken").mkdir()
    Path("broken", "a.png").write_bytes(b"not an image at all")
    return tmp_path


def run(words: str) -> int:
    return main(f"cache-tokens {words} --workers 0".split())


def test_it_writes_a_cache_and_says_what_is_in_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/train/a/2.png").write_bytes(b"no image")
    assert run("photos -o train --model model.safetensors --num-tokens 20,5 --views crop,flip") == 0
    out, err = capsys.readouterr()
    tok = MergeVQ.from_pretrained("model.safetensors")
    cache = TokenCache("train", expect_tokenizer=tok.fingerprint())
    size = sum(path.stat().st_size for path in Path("train").iterdir())
    assert out.splitlines() == [
        "train: 5 images of 32 x 32 pixels, 1 unreadable left out, 2 classes",
        "5, 20 of 64 tokens an image, 6 bits a token",
        f"crop and flip, {size:,} bytes, tokenizer {tok.fingerprint()[:12]}",
    ]
    assert err.count("\n") == 1 and "train/a/2.png" in err
    assert (len(cache), cache.class_names, cache.labels.tolist()) == (5, ("a", "b"), [0, 0, 1, 1, 1])
    assert run("photos -o val --model model.safetensors --split val --size 40 --shard-size 2") == 0
    val = TokenCache("val")
    assert (len(val), val.grid, val.num_tokens, val.labels.tolist()) == (3, (10, 10), (20,), [0, 0, 1])
    assert run("photos -o all --model model.safetensors --split all") == 0
    assert len(TokenCache("all")) == 8


def test_the_embedded_images_and_a_held_out_share(place: Path) -> None:
    assert run("embedded -o val --model model.safetensors --split val --num-tokens 5 --batch-size 64") == 0
    val = TokenCache("val")
    assert (len(val), val.num_classes) == (299, 9)
    images = images_of_split("embedded", "val")
    assert val.data == images.fingerprint() and val.labels.tolist() == images.labels
    assert [len(images_of_split("embedded", split)) for split in ("train", "all")] == [2805, 3104]
    parts = [images_of_split("photos/train", split, 0.3) for split in ("train", "val", "all")]
    names = [{part.name(i) for i in range(len(part))} for part in parts]
    assert names[0] | names[1] == names[2] and not names[0] & names[1] and names[1]


def test_labels_come_from_a_file(place: Path) -> None:
    numbers = {f"{'train' if i < 6 else 'val'}/{'ab'[i % 2]}/{i}.png": f"class {i % 3}" for i in range(9)}
    Path("labels.json").write_text(json.dumps(numbers))
    for split, expected in (("train", [0, 2, 1, 1, 0, 2]), ("val", [0, 2, 1])):
        assert run(f"photos -o {split} --model model.safetensors --labels labels.json --split {split}") == 0
        cache = TokenCache(split)
        assert cache.class_names == ("class 0", "class 1", "class 2")
        assert cache.labels.tolist() == expected


def test_an_interrupted_run_is_gone_on_with(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--model model.safetensors --num-tokens 5 --shard-size 2 --batch-size 2"
    assert run(f"photos -o whole {options}") == 0
    encode, calls = MergeVQ.encode_each, 0

    def interrupted(self: MergeVQ, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return encode(self, *args)

    monkeypatch.setattr(MergeVQ, "encode_each", interrupted)
    assert run(f"photos -o cut {options}") == 130
    assert capsys.readouterr().err == (
        "mergevq: interrupted: the same command without --force goes on with what is missing\n"
    )
    assert run(f"photos -o cut {options}") == 0
    assert calls == 4  # Three shards, of which the second was tried twice.
    for path in Path("whole").iterdir():
        assert path.read_bytes() == (Path("cut") / path.name).read_bytes()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


CASES = {
    "nothing there": ("nowhere -o new --model model.safetensors", "nowhere"),
    "broken images": ("broken -o new --model model.safetensors", "all 1 tried are broken"),
    "no model": ("photos -o new --model none.safetensors", "none.safetensors"),
    "K above L": ("photos -o new --model model.safetensors --num-tokens 65", "1..64"),
    "K of 0": ("photos -o new --model model.safetensors --num-tokens 0", "at least 1, got 0"),
    "unknown view": ("photos -o new --model model.safetensors --views crop,top", "views of crop, flip, got top"),
    "size not divisible": ("photos -o new --model model.safetensors --size 30", "downsampling 4, got 30"),
    "no images in a file": ("photos -o new --model model.safetensors --shard-size 0", "one image a shard, got 0"),
    "no images at a time": ("photos -o new --model model.safetensors --batch-size 0", "--batch-size"),
    "no share": ("photos/train -o new --model model.safetensors --val-fraction 1", "between 0 and 1"),
    "labels missing": ("photos -o new --model model.safetensors --labels few.csv", "5 have none"),
    "labels unknown": ("photos -o new --model model.safetensors --labels many.csv", "1 are not, first x.png"),
    "no labels": ("photos -o new --model model.safetensors --labels none.csv", "none.csv"),
    "other files": ("photos -o full --model model.safetensors", "full exists already"),
    "a finished cache": ("photos -o done --model model.safetensors", "done holds a finished token cache"),
    "another K": (
        "photos -o begun --model model.safetensors --num-tokens 5",
        "another num_tokens, [20] instead of [5]",
    ),
    "another model": ("photos -o begun --model other.safetensors --num-tokens 20", "another tokenizer"),
    "other images": ("photos -o begun --model model.safetensors --num-tokens 20 --split val", "another data"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_line_and_changes_nothing(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, hint = CASES[case]
    if "-o done" in words:
        assert run("photos -o done --model model.safetensors") == 0
    if "-o begun" in words:
        with monkeypatch.context() as patch:
            patch.setattr("mergevq.data.shard_writer._finish", interrupt)
            assert run("photos -o begun --model model.safetensors --num-tokens 20") == 130
    labels = [f"train/{'ab'[i % 2]}/{i}.png,x" for i in range(6)] + [f"val/{'ab'[i % 2]}/{i}.png,x" for i in (6, 7, 8)]
    Path("few.csv").write_text(labels[0])
    Path("many.csv").write_text("\n".join([*labels, "x.png,x"]))
    capfd.readouterr()
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert run(words) == 2
    out, err = capfd.readouterr()
    assert err.startswith("mergevq: error: ") and err.count("\n") == 1 and hint in err, err
    assert out == ""
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert not (place / "new").exists()


def test_info_describes_and_checks_a_cache(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("photos -o cache --model model.safetensors --num-tokens 20,5 --shard-size 4") == 0
    capsys.readouterr()
    assert main(["info", "cache"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    cache = TokenCache("cache")
    assert (lines["tokenizer"], lines["data"], lines["kind"]) == (cache.tokenizer, cache.data, "token-cache/1")
    assert lines["images"] == "6 of 32 x 32 pixels, 8 x 8 patches, 0 unreadable left out"
    assert lines["folder"].endswith("in 2 shards")
    shard = Path("cache", "shard-00001.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    assert main(["info", "cache"]) == 2
    assert "shard-00001.safetensors: expected the shard that was written" in capsys.readouterr().err


def test_force_starts_anew(place: Path) -> None:
    assert run("photos -o cache --model model.safetensors --shard-size 1") == 0
    assert run("photos -o cache --model other.safetensors --force") == 0
    assert {path.name for path in Path("cache").iterdir()} == {"manifest.json", "shard-00000.safetensors"}
    assert run("photos -o full --model model.safetensors --force") == 0
    assert Path("full", "precious.txt").read_text() == "keep me"
    assert len(TokenCache("full")) == 6
