import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mergevq import presets
from mergevq.cli import demo_generation, demo_representation
from mergevq.cli.main import main
from mergevq.cli.options import progress
from mergevq.data.embedded import EmbeddedImages
from mergevq.data.images import write_images
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import load_tokens
from mergevq.training.config import TokenizerRun

SMALL = (
    *("--loop.steps", "2", "--loop.batch-size", "2", "--loop.num-tokens", "64", "20", "--loop.val-num-tokens", "64"),
    *("--loop.val-images", "2", "--loss.weights.perceptual", "0", "--data.workers", "0"),
    *("--model.image-size", "32", "--model.num-tokens", "20"),
)


def test_dry_run_prints_the_difference_and_the_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "tokenizer", "--preset", "gr_256", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*words, "--optim.lr", "2e-4"]) == 0
    out = capsys.readouterr().out
    assert "optim.lr = 0.0002 (preset 0.0001)" in out
    with torch.device("meta"):
        encoder = MergeVQ(presets.tokenizer("gr_256").model).encoder
    assert f"{sum(p.numel() for p in encoder.parameters()):,}  encoder" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["tiny", "gr_256"])
def test_switches_have_the_same_words_with_every_preset(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "tokenizer", "--preset", preset, "--out", str(tmp_path / "run"), "--dry-run"]
    base = presets.tokenizer(preset)
    for flip, word in ((True, "--data.flip"), (False, "--data.no-flip")):
        assert main([*words, word]) == 0
        changed = f"data.flip = {flip} (preset {base.data.flip})" in capsys.readouterr().out
        assert changed == (flip != base.data.flip)
    with pytest.raises(SystemExit):
        main(["train", "tokenizer", "--preset", preset, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--data.flip, --data.no-flip Mirror" in text and "--no-resume" not in text


@pytest.mark.parametrize("numbers", ["144,64", "144 64", "144, 64"])
def test_lists_of_k_are_written_with_commas_or_spaces(
    numbers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "tokenizer", "--preset", "tiny", "--out", str(tmp_path / "run"), "--dry-run"]
    assert main([*words, "--loop.num-tokens", *numbers.split()]) == 0
    assert "loop.num_tokens = [144, 64] (preset" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*words, "--loop.num-tokens", "many"])
    assert stop.value.code == 2 and "144,64" in capsys.readouterr().err


def test_a_run_is_trained_resumed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "photos", torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    run, photos = str(tmp_path / "run"), ["--data.train", str(tmp_path / "photos"), "--data.val-fraction", "0.3"]
    train = ["train", "tokenizer", "--out", run, "--accelerator", "cpu"]
    assert main([*train, "--preset", "tiny", *photos, *SMALL]) == 0
    assert capsys.readouterr().out == f"{run}/model.safetensors\n"
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["model"]["image_size"] == 32 and config["loop"]["num_tokens"] == [64, 20]
    assert MergeVQ.from_pretrained(run).config.num_tokens == 20

    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert main([*train, "--preset", "tiny", *photos, *SMALL]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*train, "--resume", "--optim.lr", "1e-3"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before

    # Without --preset the configuration is that of the run.
    assert main([*train, "--resume", "--loop.steps", "3"]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 3
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


def test_the_help_of_resume_names_what_may_change(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "tokenizer", "--help"])
    text = capsys.readouterr().out
    resume = text[text.index("--resume") : text.index("--init")]
    for name in TokenizerRun.free_fields:
        assert name.split(".")[1] in resume, name


@pytest.mark.parametrize(("rank", "printed"), [("0", "model.safetensors\n"), ("1", "")])
def test_one_of_torchruns_processes_prints_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, printed: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("mergevq.training.tokenizer.train_tokenizer", lambda *_, **__: Path("model.safetensors"))
    assert main(["train", "tokenizer", "--preset", "tiny", "--out", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == printed


def test_the_demo_trains_round_trips_measures_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = presets.tiny()

    def small() -> TokenizerRun:
        weights = replace(full.loss.weights, perceptual=0.0)
        loop = replace(full.loop, steps=2, batch_size=2, val_images=2, val_num_tokens=(64,))
        return replace(full, loss=replace(full.loss, weights=weights), loop=loop)

    live = presets.generator("tiny")
    loop = replace(live.loop, steps=2, batch_size=2, val_images=2, sample_classes=0)
    monkeypatch.setattr(presets, "tiny", small)
    monkeypatch.setattr(presets, "generator", lambda _: replace(live, loop=loop))
    monkeypatch.setattr(demo_generation, "_LIVE_IMAGES", 2)
    monkeypatch.setattr("mergevq.model_files.shipped_roles", lambda _: ())
    monkeypatch.setattr(demo_generation, "_images", lambda part: EmbeddedImages(part).select(range(0, 299, 50)))
    monkeypatch.setattr(demo_representation, "_TRAIN", 45)
    monkeypatch.setattr(demo_representation, "_TEST", 18)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--images", "4", "--minutes", "5"]) == 0
    printed = capsys.readouterr().out
    assert "PSNR in dB" in printed and f"{out}/report.html" in printed

    tok = MergeVQ.from_pretrained(out)
    report = json.loads((out / "report.json").read_text())
    assert [row["num_tokens"] for row in report["rows"]] == [256, 196, 144, 100, 64]
    assert report["protocol"]["images"] == 4 and report["protocol"]["tokenizer"] == tok.fingerprint()
    assert report["protocol"]["data"] == "embedded"
    page = (out / "report.html").read_text()
    for k in (256, 144, 64):
        tokens = load_tokens(out / f"held_out_{k}.mvq", expect_tokenizer=tok.fingerprint())
        assert tokens.num_tokens.tolist() == [k] * 9, "one image of each class"
        assert f"9 images of {k} tokens in {(out / f'held_out_{k}.mvq').stat().st_size:,} bytes" in page
    # The plot; for nine images the original, three reconstructions, and maps at two K: at 256 nothing was merged.
    assert page.count("<img ") == 1 + 9 * (1 + 3 + 2)
    probed = json.loads((out / "representation.json").read_text())
    assert probed["protocol"]["encoders"]["tokenizer"]["fingerprint"] == tok.fingerprint()
    names = [row["name"] for row in probed["rows"]]
    assert {"class token, K = 256", "random weights, mean of tokens, K = 256", "pixels, 16 x 16"} <= set(names)
    assert probed["rows"][0]["linear"] is None
    for name, row in zip(names, probed["rows"], strict=True):  # The table is in the report, its pictures beside it.
        assert name in page and f"{100 * row['knn']['score']['top1']:.1f} ± " in page
    assert (out / "representation.html").read_text().count("<img ") >= 3

    with Image.open(out / "report.png") as picture:
        assert picture.width > 6 * 136 and picture.height > 9 * 136

    trained = json.loads((out / "live.json").read_text())
    assert trained["protocol"]["tokenizer"] == tok.fingerprint()
    assert MergeAR.from_pretrained(out / "generator").config.trained_num_tokens == (64, 144)
    assert "trained for 2 minutes" in (out / "live.html").read_text()
    with Image.open(out / "live.png") as picture:
        assert picture.width > 2 * 96


def test_the_demo_shows_what_the_merge_cache_saves(
    tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    bits = tiny_tokenizer.config.num_bits
    gen = MergeAR(
        GeneratorConfig(
            grid=(8, 8),
            num_bits=bits,
            groups=(bits,),
            num_classes=9,
            num_tokens=20,
            tokenizer=tiny_tokenizer.fingerprint(),
            width=32,
            depth=1,
            group_depth=0,
            heads=2,
        )
    )
    monkeypatch.setattr(demo_generation, "_SHIPPED_IMAGES", 2)
    monkeypatch.setattr(demo_generation, "_images", lambda part: EmbeddedImages(part).select(range(0, 299, 50)))
    facts = demo_generation.generate_with(gen, tiny_tokenizer, tmp_path, progress)
    report = json.loads((tmp_path / "generation.json").read_text())
    full, merge = report["rows"]
    assert (full["setting"]["cache"], merge["setting"]["cache"]) == ("full", "merge")
    assert full["distinct_tokens"] == merge["distinct_tokens"], "the images are the same"
    kib = [round(row["cache_bytes_per_image"] / 1024) for row in (full, merge)]
    assert facts["cache, an image"].startswith(f"full {kib[0]} KiB, merge {kib[1]} KiB")
    # Two images, the closest training image of each, and a sheet for each cache.
    assert (tmp_path / "generation.html").read_text().count("<img ") == 2 * 2 + 2
    with Image.open(tmp_path / "generation.png") as picture:
        assert picture.width > 2 * 96
