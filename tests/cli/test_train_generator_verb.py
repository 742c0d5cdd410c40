"""`mergevq train generator`: presets, tokens that decide, a run that is trained and resumed, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mergevq import presets
from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.dry_run import count_parameters
from mergevq.training.generator_config import GeneratorRun

SMALL = (
    *("--model.width", "16", "--model.depth", "1", "--model.heads", "2", "--model.ffn-multiple", "16"),
    *("--loop.steps", "2", "--loop.batch-size", "2", "--loop.val-images", "2", "--accelerator", "cpu"),
    *("--loop.sample-classes", "1", "--loop.sample-images", "1"),
)


@pytest.fixture
def tokens(tiny_tokenizer: MergeVQ, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The options that name two caches of a few images, and their tokenizer."""
    tiny_tokenizer.save_pretrained(tmp_path / "tok.safetensors")
    for name, count in (("train", 5), ("val", 2)):
        rng = torch.Generator().manual_seed(count)
        write_images(tmp_path / name, torch.rand(count, 3, 32, 32, generator=rng) * 2 - 1)
        words = ["cache-tokens", str(tmp_path / name), "-o", str(tmp_path / f"{name}_tokens")]
        assert main([*words, "--model", str(tmp_path / "tok.safetensors"), "--num-tokens", "20,10"]) == 0
    capsys.readouterr()
    return [
        *("--data.tokens", str(tmp_path / "train_tokens"), "--data.val-tokens", str(tmp_path / "val_tokens")),
        *("--data.tokenizer", str(tmp_path / "tok.safetensors")),
    ]


def test_a_run_is_trained_resumed_and_kept(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    train = ["train", "generator", "--out", run]
    assert main([*train, "--preset", "tiny", *tokens, *SMALL]) == 0
    assert capsys.readouterr().out == f"{run}/model.safetensors\n"
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["model"]["grid"] == [8, 8] and config["model"]["groups"] == [3, 3]
    assert config["loop"]["num_tokens"] == [10, 20] and config["model"]["num_classes"] == 0
    assert MergeAR.from_pretrained(run).config.trained_num_tokens == (10, 20)
    assert (tmp_path / "run" / "images" / "step_0000002.png").exists()

    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main([*train, "--preset", "tiny", *tokens, *SMALL]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*train, "--resume", "--optim.lr", "1e-4"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert main(["train", "tokenizer", "--out", run, "--resume"]) == 2
    assert "expected a tokenizer-run file, got a generator-run file" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before

    # Without --preset the configuration is that of the run.
    assert main([*train, "--resume", "--loop.steps", "3"]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 3


def test_dry_run_shows_what_the_tokens_decide(
    tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "generator", "--preset", "emoji_64", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*words, "--optim.lr", "2e-4"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr = 0.0002 (preset 0.0015)" in out
    assert f"{count_parameters(presets.generator('emoji_64'))['generator']:,}  generator" in out
    assert main([*words, *tokens]) == 0
    out = capsys.readouterr().out
    assert "model.grid = [8, 8] (preset [16, 16])" in out and "model.num_bits = 6 (preset 12)" in out
    assert "loop.num_tokens = [10, 20] (preset [])" in out
    assert "model.mask.recent = 8 (preset 16)" in out, "a row stays a row"
    assert main([*words, *tokens, "--model.groups", "2,4", "--model.mask.recent", "None"]) == 0
    out = capsys.readouterr().out
    assert "model.groups = [2, 4] (preset [6, 6])" in out and "model.mask.recent = None (preset 16)" in out
    assert not (tmp_path / "run").exists()


def test_bad_input_is_one_line(tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "generator", "--out", str(tmp_path / "run"), *SMALL]
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = shutil.copytree(tmp_path / "train_tokens", tmp_path / "damaged")
    (damaged / "shard-00000.safetensors").write_bytes(b"nothing")
    other = MergeVQ(MergeVQ.from_pretrained(tmp_path / "tok.safetensors").config)
    other.save_pretrained(tmp_path / "other.safetensors")
    named = [*train, "--preset", "tiny", *tokens]
    for words, expected in (
        (train, "expected --preset and one of tiny, s_64"),
        ([*train, "--preset", "emoji"], "did you mean emoji_64"),
        ([*train, "--preset", "tiny"], "expected data.tokens"),
        ([*named, "--data.tokens", str(empty)], "mergevq cache-tokens"),
        ([*named, "--data.tokens", str(damaged)], "shard-00000.safetensors"),
        ([*named, "--data.tokenizer", str(tmp_path / "other.safetensors")], "expected tokens of tokenizer"),
        ([*named, "--data.train", str(empty)], "data.tokens (a cache) or data.train (images), got both"),
        ([*named, "--model.groups", "1,3"], "sum to the tokens' 6 bits"),
        ([*named, "--model.heads", "3"], "width / heads"),
        ([*named, "--model.mask.recent", "0"], "mask.recent of at least 1"),
        ([*named, "--loop.num-tokens", "30"], "among the 10, 20 that were encoded, got 30"),
        ([*named, "--loss.label-smoothing", "1.5"], "loss.label_smoothing must lie in 0..1"),
        ([*named, "--init", "nowhere.safetensors"], "nowhere.safetensors"),
    ):
        assert main(words) == 2, expected
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("mergevq: error:") and expected in message
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_help_of_resume_names_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "generator", "--help"])
    text = capsys.readouterr().out
    resume = text[text.index("--resume") : text.index("--init")]
    for name in GeneratorRun.free_fields:
        assert name.split(".")[1] in resume, name
    # What the tokens decide is no option.
    assert "--model.grid" not in text and "--model.num-classes" not in text and "--model.groups INT,..." in text
