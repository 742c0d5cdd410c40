"""`mergevq train recovery`: presets, a run that is trained and resumed, what tokens and tokenizer decide, bad input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.tokenizer.config import RecoveryConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.recovery_config import RecoveryRun

SMALL = (
    *("--recovery.width", "32", "--recovery.heads", "2", "--recovery.self-depth", "1"),
    *("--loop.steps", "2", "--loop.batch-size", "2", "--loop.val-images", "2", "--accelerator", "cpu"),
)


@pytest.fixture
def bare(tiny_tokenizer: MergeVQ) -> MergeVQ:
    """The tiny tokenizer without its recovery."""
    tok = MergeVQ(replace(tiny_tokenizer.config, recovery=RecoveryConfig(enabled=False)))
    tok.load_state_dict({k: v for k, v in tiny_tokenizer.state_dict().items() if not k.startswith("recovery.")})
    return tok.eval()


@pytest.fixture
def tokens(bare: MergeVQ, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The options that name two caches of a few images, and a tokenizer without recovery that made them."""
    bare.save_pretrained(tmp_path / "tok.safetensors")
    for name, count in (("train", 5), ("val", 2)):
        rng = torch.Generator().manual_seed(count)
        write_images(tmp_path / name, torch.rand(count, 3, 32, 32, generator=rng) * 2 - 1)
        words = ["cache-tokens", str(tmp_path / name), "-o", str(tmp_path / f"{name}_tokens")]
        assert main([*words, "--model", str(tmp_path / "tok.safetensors"), "--num-tokens", "64,20,10"]) == 0
    capsys.readouterr()
    return [
        *("--data.tokens", str(tmp_path / "train_tokens"), "--data.val-tokens", str(tmp_path / "val_tokens")),
        *("--data.tokenizer", str(tmp_path / "tok.safetensors")),
    ]


def test_a_tokenizer_learns_to_do_without_source_maps(
    tokens: list[str], bare: MergeVQ, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photos = str(tmp_path / "run"), str(tmp_path / "val")
    train = ["train", "recovery", "--out", run]
    measure = ["eval", "reconstruction", photos, "--num-tokens", "20", "--predict-source"]
    measure += ["--network", "none", "--perceptual", "none", "--out", str(tmp_path / "results")]
    assert main([*measure, "--model", str(tmp_path / "tok.safetensors")]) == 2
    assert "mergevq train recovery" in capsys.readouterr().err

    assert main([*train, "--preset", "emoji_64", *tokens, *SMALL]) == 0
    assert capsys.readouterr().out == f"{run}/model.safetensors\n"
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["loop"]["num_tokens"] == config["loop"]["val_num_tokens"] == [10, 20], "at K = 64 nothing is merged"
    trained = MergeVQ.from_pretrained(run)
    assert trained.config.recovery == RecoveryConfig(width=32, heads=2, self_depth=1)
    assert trained.fingerprint() == bare.fingerprint()

    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main([*train, "--preset", "emoji_64", *tokens, *SMALL]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*train, "--resume", "--optim.lr", "1e-4"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert main(["train", "tokenizer", "--out", run, "--resume"]) == 2
    assert "expected a tokenizer-run file, got a recovery-run file" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before

    # Without --preset the configuration is that of the run.
    assert main([*train, "--resume", "--loop.steps", "3"]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 3

    assert main([*measure, "--model", run]) == 0
    (row,) = json.loads((tmp_path / "results" / "reconstruction.json").read_text())["rows"]
    assert row["predicted"]["accuracy"] == pytest.approx(_predicted_right(run, photos), abs=1e-6)
    assert row["predicted"]["psnr"] != row["psnr"]


def _predicted_right(model: str, photos: str) -> float:
    from mergevq.data.images import read_images

    tok = MergeVQ.from_pretrained(model)
    tokens = tok.encode(read_images(photos, size=32), 20)
    return (tok.recover(tokens.without_source()).full_index() == tokens.full_index()).double().mean().item()


def test_dry_run_shows_what_tokens_and_tokenizer_decide(
    tokens: list[str], tiny_tokenizer: MergeVQ, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "recovery", "--preset", "emoji_64", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*words, "--optim.lr", "2e-4"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr = 0.0002 (preset 0.002)" in out and "parameters: depend on data.tokenizer" in out

    assert main([*words, *tokens]) == 0
    out = capsys.readouterr().out
    assert "loop.num_tokens = [10, 20] (preset [])" in out and "recovery.width = 128\n" in out

    # A tokenizer of the same tokens that has a recovery: its shape is what is trained, unless a new one is asked for.
    tiny_tokenizer.save_pretrained(tmp_path / "with.safetensors")
    words += [*tokens, "--data.tokenizer", str(tmp_path / "with.safetensors")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert tiny_tokenizer.recovery is not None
    count = sum(p.numel() for p in tiny_tokenizer.recovery.parameters())
    assert f"recovery.width = {tiny_tokenizer.config.recovery.width} (preset 128)" in out
    assert f"{count:,}  recovery" in out
    assert main([*words, "--no-fine-tune"]) == 0
    out = capsys.readouterr().out
    assert "fine_tune = False (preset True)" in out and "recovery.width = 128\n" in out
    assert not (tmp_path / "run").exists()


def test_bad_input_is_one_line(tokens: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "recovery", "--out", str(tmp_path / "run"), *SMALL]
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = shutil.copytree(tmp_path / "train_tokens", tmp_path / "damaged")
    (damaged / "shard-00000.safetensors").write_bytes(b"nothing")
    other = MergeVQ(MergeVQ.from_pretrained(tmp_path / "tok.safetensors").config)
    other.save_pretrained(tmp_path / "other.safetensors")
    named = [*train, "--preset", "emoji_64", *tokens]
    for words, expected in (
        (train, "expected --preset and one of emoji_64, 256"),
        ([*train, "--preset", "emoji"], "did you mean emoji_64"),
        ([*train, "--preset", "emoji_64"], "expected data.tokenizer"),
        ([*train, "--preset", "emoji_64", *tokens[4:]], "expected data.tokens"),
        ([*train, "--preset", "emoji_64", "--dry-run", *tokens[:4]], "expected data.tokenizer"),
        ([*train, "--preset", "emoji_64", *tokens[:2], *tokens[4:]], "expected data.val_tokens"),
        ([*named, "--data.tokens", str(empty)], "mergevq cache-tokens"),
        ([*named, "--data.tokens", str(damaged)], "shard-00000.safetensors"),
        ([*named, "--data.tokenizer", str(tmp_path / "other.safetensors")], "expected tokens of tokenizer"),
        ([*named, "--data.tokenizer", str(tmp_path / "none.safetensors")], "none.safetensors"),
        ([*named, "--recovery.heads", "3"], "recovery.width must be a multiple of 4 * heads"),
        ([*named, "--loop.num-tokens", "30"], "among 10, 20, 64, got 30"),
        ([*named, "--loop.num-tokens", "10,64"], "loop.num_tokens must lie in 1..63, got 64"),
        ([*named, "--init", str(tmp_path / "tok.safetensors")], "expected a tokenizer with a recovery model"),
        ([*train, "--resume"], "run.json"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert main(words) == 2, expected
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("mergevq: error:") and expected in message
        assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_help_of_resume_names_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "recovery", "--help"])
    text = capsys.readouterr().out
    resume = text[text.index("--resume") : text.index("--init")]
    shared = {"data.train", "data.val", "data.workers"}  # There are no images.
    for name in set(RecoveryRun.free_fields) - shared:
        assert name.split(".")[1] in resume, name
    assert "--recovery.enabled" not in text and "--loop.num-tokens INT,..." in text
    assert "--fine-tune, --no-fine-tune" in text and "--no-resume" not in text
