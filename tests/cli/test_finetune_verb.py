"""`mergevq finetune`: presets, a run that is trained and resumed, what tokenizer and images decide, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mergevq import presets
from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.classifier import Classifier
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.finetune_config import FinetuneRun

SMALL = (
    *("--loop.steps", "2", "--loop.batch-size", "2", "--data.workers", "0", "--accelerator", "cpu"),
    *("--model.num-tokens", "20", "--model.features", "mean", "--loss.mixup", "0.8"),
)


@pytest.fixture
def place(tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a tokenizer and images of two classes."""
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save_pretrained("tok.safetensors")
    rng = torch.Generator().manual_seed(0)
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cats", "dogs"):
            write_images(f"photos/{part}/{name}", torch.rand(count, 3, 32, 32, generator=rng) * 2 - 1)
    return tmp_path


TRAIN = ["finetune", "--out", "run"]
NAMED = [*TRAIN, "--preset", "tiny", "--data.tokenizer", "tok.safetensors", "--data.train", "photos", *SMALL]


def test_a_tokenizer_becomes_a_classifier(
    place: Path, tiny_tokenizer: MergeVQ, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(NAMED) == 0
    assert capsys.readouterr().out == "run/model.safetensors\n"
    result = json.loads((place / "run" / "result.json").read_text())
    assert result["schema"] == "mergevq.finetune/1" and result["step"] == 2 and result["finished"]
    protocol = result["protocol"]
    assert protocol["tokenizer"] == tiny_tokenizer.fingerprint()
    assert protocol["images"] == {"train": 6, "val": 4, "measured": 4}
    assert (protocol["features"], protocol["num_tokens"], protocol["classes"]) == ("mean", 20, 2)
    assert protocol["data"] == {"train": "photos", "val": "photos"}
    assert Classifier.from_pretrained("run").config.class_names == ("cats", "dogs")

    before = (place / "run" / "model.safetensors").read_bytes()
    assert main(NAMED) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*TRAIN, "--resume", "--optim.layer-decay", "0.5"]) == 2
    assert "optim.layer_decay" in capsys.readouterr().err
    assert main(["train", "tokenizer", "--out", "run", "--resume"]) == 2
    assert "expected a tokenizer-run file, got a finetune-run file" in capsys.readouterr().err
    assert main(["encode", "photos", "-o", "x.mvq", "--model", "run"]) == 2
    assert "expected a tokenizer file, got a classifier file" in capsys.readouterr().err
    assert (place / "run" / "model.safetensors").read_bytes() == before

    # Without --preset the configuration is that of the run.
    assert main([*TRAIN, "--resume", "--loop.steps", "3"]) == 0
    assert json.loads((place / "run" / "result.json").read_text())["step"] == 3
    capsys.readouterr()

    assert main(["info", "run"]) == 0
    out = capsys.readouterr().out
    assert "classifier/1" in out and "2: cats, dogs" in out and "mean, 20 of 64 tokens" in out
    assert tiny_tokenizer.fingerprint() in out


def test_dry_run_shows_what_tokenizer_and_images_decide(
    place: Path, tiny_tokenizer: MergeVQ, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TRAIN, "--preset", "imagenet_256", "--dry-run", "--optim.lr", "1e-3"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr = 0.001 (preset 0.0025)" in out and "parameters: depend on data.tokenizer" in out

    assert main([*NAMED, "--model.num-tokens", "0", "--model.features", "class+mean", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.num_tokens = 64 (preset 0)" in out and "model.image_size = 32 (preset 0)" in out
    assert "model.class_names = ['cats', 'dogs'] (preset [])" in out
    encoder = tiny_tokenizer.encoder
    codes = sum(p.numel() for part in (encoder.norm_out, encoder.code_out) for p in part.parameters())
    width = tiny_tokenizer.config.encoder.width
    head = 2 * 2 * width + 2 * (2 * width + 1)
    count = sum(p.numel() for p in encoder.parameters()) - codes + head
    assert f"{head:,}  norm and head" in out and f"{count:,}  classifier" in out
    assert not (place / "run").exists()


def test_bad_input_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = GeneratorConfig(groups=(3, 3), num_bits=6, grid=(8, 8), width=16, depth=1, heads=2, num_tokens=20)
    MergeAR(shape).save_pretrained("generator")
    shutil.copytree("photos/train/cats", "flat")
    shutil.copytree("photos/val/cats", "odd/owls")
    for words, expected in (
        ([*TRAIN, *SMALL], "expected --preset and one of tiny, imagenet_256"),
        ([*TRAIN, "--preset", "imagenet"], "did you mean imagenet_256"),
        ([*TRAIN, "--preset", "imagenet_256"], "expected data.tokenizer"),
        ([*NAMED, "--data.tokenizer", "generator"], "expected a tokenizer file, got a generator file"),
        ([*NAMED, "--data.tokenizer", "none.safetensors"], "none.safetensors"),
        ([*NAMED, "--data.train", "nowhere"], "nowhere"),
        ([*NAMED, "--data.train", "flat"], "got images without labels"),
        ([*NAMED, "--data.val", "odd"], "got none for owls/0000.png"),
        ([*NAMED, "--model.num-tokens", "65"], "model.num_tokens must lie in 1..64, got 65"),
        ([*NAMED, "--model.image-size", "30"], "multiple of the tokenizer's downsampling 4"),
        ([*NAMED, "--loss.label-smoothing", "1"], "loss.label_smoothing must lie in 0..1"),
        ([*NAMED, "--init", "tok.safetensors"], "expected a classifier file, got a tokenizer file"),
        ([*TRAIN, "--resume"], "run.json"),
    ):
        shutil.rmtree("run", ignore_errors=True)
        assert main(words) == 2, expected
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("mergevq: error:") and expected in message
        assert not (place / "run" / "model.safetensors").exists()


def test_the_help_of_resume_names_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    text = capsys.readouterr().out
    resume = text[text.index("--resume") : text.index("--init")]
    for name in FinetuneRun.free_fields:
        assert name.split(".")[1] in resume, name
    assert "--model.class-names" not in text and "--model.tokenizer" not in text
    assert "--data.flip, --data.no-flip" in text and "--no-resume" not in text


def test_the_papers_protocol_is_the_preset() -> None:
    """Appendix A.4: 100 epochs, AdamW, batch 1,024, all tokens."""
    run = presets.finetune("imagenet_256")
    on_eight = 8 * run.loop.batch_size * run.loop.accumulate
    assert on_eight == 1024
    assert run.loop.steps * on_eight / 1_281_167 == pytest.approx(100, abs=0.1)
    assert run.optim.warmup_steps / run.loop.steps == 0.2
    assert run.model.num_tokens == 0
