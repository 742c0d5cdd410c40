"""`mergevq eval representation`, run in-process on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.tokenizer.model import MergeVQ


@pytest.fixture
def place(tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with photos in two classes, others in three or in none, and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    names = [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in ("cat", "dog") for i in range(6)]
    write_images("photos", images, names)
    write_images("three", images[:6], [f"{kind}/{i}.png" for kind in ("ape", "cat", "dog") for i in range(2)])
    write_images("flat", images[:3])
    write_images("few", images, [name.replace("dog", "cow") for name in names])
    for part in ("train", "val"):
        Path("few", part, "dog").mkdir()
    tiny_tokenizer.save_pretrained("tok.safetensors")
    return tmp_path


VERB = "eval representation photos -o new --model tok.safetensors --epochs 2"


def run(*options: str) -> int:
    return main([*VERB.split(), *" ".join(options).split()])


def test_it_writes_json_and_a_page_and_keeps_the_features(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--num-tokens 64,20 --kinds mean --quantized both --lr 0.1,0.01 --k 1,2 --shots 2 --draws 3 --seed 5"
    assert run(options, "--pixel-side 4 --baselines pixels --held-out 0.25") == 0
    out = capsys.readouterr().out
    value = json.loads((place / "new" / "representation.json").read_text())
    assert value["schema"] == "mergevq.representation/1" and value["classes"] == ["cat", "dog"]
    names = [f"mean of {what}, K = {k}" for k in (64, 20) for what in ("tokens", "codes")]
    assert [row["name"] for row in value["rows"]] == [*names, "pixels, 4 x 4"]
    protocol = value["protocol"]
    assert (protocol["train"]["images"], protocol["test"]["images"], protocol["probe_seed"]) == (12, 12, 5)
    assert protocol["linear"]["learning_rates"] == [0.1, 0.01] and protocol["linear"]["epochs"] == 2
    assert value["rows"][0]["linear"]["held_out"] == 4 and value["rows"][0]["few_shot"][0]["shots"] == 2
    assert "linear" in out and "new/representation.json" in out
    # Accuracies, curves over K, two dimensions, classes, confusion.
    assert (place / "new" / "report.html").read_text().count("<img ") == 5
    assert (place / "new" / "features" / "train-00000.safetensors").exists()


def test_a_run_that_was_interrupted_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--kinds mean --num-tokens 20 --probes knn --baselines none"

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mergevq.evaluation.representation.probe_row", stop)
        assert run(options) == 130
    with monkeypatch.context() as patch:  # All features are there.
        patch.setattr(MergeVQ, "embed", stop)
        assert run(options) == 0
    capsys.readouterr()
    assert run(options) == 2 and "new exists already" in capsys.readouterr().err
    # Probing again reads them; other kinds need them anew, which --force allows.
    assert run(options, "--force --k 3") == 0
    assert main([*VERB.replace("new", "other").split(), *options.split(), "--features", "new/features"]) == 0
    assert sorted(path.name for path in (place / "other").iterdir()) == ["report.html", "representation.json"]
    capsys.readouterr()
    others = "--kinds class --baselines none --features new/features"
    assert main([*VERB.replace("new", "third").split(), *others.split()]) == 2
    assert "holds features of another set of kinds" in capsys.readouterr().err
    assert run("--kinds class --num-tokens 20 --probes knn --baselines none --force") == 0


BAD = {
    "no classes": ("eval representation flat -o new --model tok.safetensors", "images without classes in flat"),
    "empty class": (
        "eval representation few -o new --model tok.safetensors",
        "images of every class, got none of dog in few/train:",
    ),
    "other classes": (f"{VERB} --test three", "(cat, dog), got 2 of 6 without"),
    "no class folders to test on": (f"{VERB} --test flat", "got 3 of 3 without"),
    "nothing there": (f"{VERB} --test nowhere", "nowhere"),
    "more neighbours than images": (f"{VERB} --k 1,13", "at least k = 13 training images, got 12"),
    "more shots than images": (f"{VERB} --shots 7", "at least 7 training images of every class"),
    "fewer images than classes": (f"{VERB} --train-limit 1", "as many training images as classes (2), got 1"),
    "K above L": (f"{VERB} --num-tokens 65", "1..64"),
    "kind": (f"{VERB} --kinds mean,clas", "got 'clas'"),
    "patches": (f"{VERB} --kinds patches", "one vector an image"),
    "baseline": (f"{VERB} --baselines noise", "got 'noise'"),
    "probe": (f"{VERB} --probes knm", "did you mean knn?"),
    "teacher": (f"{VERB} --teacher lite00", "lite00"),
    "weights of nobody": (f"{VERB} --teacher-weights tok.safetensors", "the weights alone"),
    "rate": (f"{VERB} --lr 0", "learning rates above 0"),
    "no devices": (f"{VERB} --devices 0", "--devices to be at least 1"),
    "held out": (f"{VERB} --held-out 1", "between 0 and 1"),
    "no share to test on": ("eval representation three -o new --model tok.safetensors --test-fraction 2", "2.0"),
    "features of nobody": (f"{VERB} --features photos", "photos exists already"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line(case: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, hint = BAD[case]
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    assert err.startswith("mergevq: error: ") and err.count("\n") == 1 and hint in err, err
    assert out == "" and not (place / "new").exists()


@pytest.mark.slow
def test_two_devices_measure_what_one_does(place: Path) -> None:
    """As the user starts them: the command starts the second process itself."""
    found = []
    for devices in (1, 2):
        words = f"{VERB} --device cpu --kinds mean --num-tokens 20 --probes knn,few-shot --devices {devices}"
        words = words.replace("new", f"new{devices}")
        Path("run.py").write_text(f"import sys; from mergevq.cli.main import main; sys.exit(main({words.split()!r}))")
        subprocess.run([sys.executable, "run.py"], check=True, capture_output=True, timeout=300)
        value = json.loads((place / f"new{devices}" / "representation.json").read_text())
        assert value["protocol"].pop("processes") == devices and value.pop("seconds")
        found.append(value)
    for value in found:  # Fabric gives each process a share of the threads.
        value["protocol"]["hardware"].pop("threads")
    assert found[0] == found[1]
