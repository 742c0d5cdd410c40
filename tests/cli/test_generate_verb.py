"""`mergevq generate`: what lands in the folder, and that a killed run goes on to the same images."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mergevq.cli.main import main
from mergevq.data.images import read_images
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.model_files import shipped_roles
from mergevq.sampling import image_seeds
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import load_tokens

NAMES = ("big cats", "dogs", "flags")


@pytest.fixture
def tokenizer_file(tiny_tokenizer: MergeVQ, tmp_path: Path) -> str:
    return str(tiny_tokenizer.save_pretrained(tmp_path / "tok.safetensors"))


@pytest.fixture
def generators(tiny_tokenizer: MergeVQ, tmp_path: Path) -> dict[str, str]:
    files = {}
    for order, kind in (("raster", MergeAR), ("random", RandomAR)):
        torch.manual_seed(0)
        config = GeneratorConfig(
            order=order,
            grid=(8, 8),
            num_bits=tiny_tokenizer.config.num_bits,
            groups=(2, tiny_tokenizer.config.num_bits - 2),
            num_classes=3,
            class_names=NAMES,
            num_tokens=20,
            tokenizer=tiny_tokenizer.fingerprint(),
            width=32,
            depth=1,
            group_depth=1,
            heads=2,
        )
        model = kind(config)
        for parameter in model.transformer.heads.parameters():
            torch.nn.init.normal_(parameter)
        files[order] = str(model.save_pretrained(tmp_path / f"{order}.safetensors"))
    return files


def run(out: Path, generator: str, tokenizer: str, *more: str) -> int:
    return main(["generate", "-o", str(out), "--generator", generator, "--tokenizer", tokenizer, *more])


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_images_are_those_of_the_python_api(generators, tokenizer_file, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = ["--classes", "dogs,0", "--num-images", "3", "--seed", "5", "--guidance", "2", "--batch-size", "2"]
    assert run(out, generators["raster"], tokenizer_file, *words) == 0
    names = {"0000_dogs.png", "0001_big-cats.png", "0002_dogs.png"}
    assert set(contents(out)) == names | {"generate.json", "sheet.png", "tokens.mvq"}

    seeds = image_seeds(torch.Generator().manual_seed(5), 3)
    expected = MergeAR.from_pretrained(generators["raster"]).generate(["dogs", 0, "dogs"], guidance=2.0, seeds=seeds)
    tokens = load_tokens(out / "tokens.mvq")
    assert tokens.equal(expected)
    tok = MergeVQ.from_pretrained(tokenizer_file)
    for i, name in enumerate(sorted(names)):
        drawn = tok.decode(tokens[i]).clamp(-1, 1)
        torch.testing.assert_close(read_images([out / name], 32), drawn, atol=1 / 127, rtol=0)
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 3 * 64
    low, high = tokens.num_tokens.min(), tokens.num_tokens.max()
    drew = f"{low} to {high}" if low < high else f"{low}"
    told = f"asked for K = 20, drew {drew} distinct tokens, {float(tokens.num_tokens.double().mean()):.1f} on average"
    assert told in capsys.readouterr().out


def test_both_caches_write_the_same_files(generators, tokenizer_file, tmp_path) -> None:
    for cache in ("merge", "full"):
        assert run(tmp_path / cache, generators["raster"], tokenizer_file, "--num-images", "4", "--cache", cache) == 0
    merge, full = contents(tmp_path / "merge"), contents(tmp_path / "full")
    assert merge.pop("generate.json") != full.pop("generate.json")
    assert merge == full


def test_a_killed_run_goes_on_to_the_same_images(generators, tokenizer_file, tmp_path, monkeypatch, capsys) -> None:
    words = ["--num-images", "6", "--batch-size", "2", "--num-tokens", "9", "--top-k", "3"]
    assert run(tmp_path / "whole", generators["raster"], tokenizer_file, *words) == 0
    calls = []
    generate = MergeAR.generate

    def dying(self: MergeAR, *arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *arguments, **options)

    monkeypatch.setattr(MergeAR, "generate", dying)
    out = tmp_path / "killed"
    assert run(out, generators["raster"], tokenizer_file, *words) == 130
    assert len(list(out.glob("*.png"))) == 4
    assert run(out, generators["raster"], tokenizer_file, *words, "--resume") == 0
    assert len(calls) == 4  # Two batches were there; the third was made again.
    assert contents(out) == contents(tmp_path / "whole")
    capsys.readouterr()
    assert run(out, generators["raster"], tokenizer_file, *words, "--resume") == 0
    assert "there already" in capsys.readouterr().out and len(calls) == 4
    next(out.glob("*.png")).unlink()  # Not whole any more: everything is made again.
    assert run(out, generators["raster"], tokenizer_file, *words, "--resume") == 0
    assert contents(out) == contents(tmp_path / "whole") and len(calls) > 4
    capsys.readouterr()
    assert run(out, generators["raster"], tokenizer_file, *words, "--resume", "--seed", "1") == 2
    assert "got other seed" in capsys.readouterr().err
    assert run(out, generators["raster"], tokenizer_file, *words) == 2
    assert "--force" in capsys.readouterr().err


def test_force_forgets_what_a_killed_run_left(generators, tokenizer_file, tmp_path, monkeypatch) -> None:
    words = ["--num-images", "4", "--batch-size", "1", "--num-tokens", "9"]
    assert run(tmp_path / "whole", generators["raster"], tokenizer_file, *words, "--seed", "1") == 0
    generate, left = MergeAR.generate, [0]

    def dying(self: MergeAR, *arguments: object, **options: object) -> object:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return generate(self, *arguments, **options)

    monkeypatch.setattr(MergeAR, "generate", dying)
    out = tmp_path / "out"
    left[0] = 3
    assert run(out, generators["raster"], tokenizer_file, *words) == 130
    left[0] = 1
    assert run(out, generators["raster"], tokenizer_file, *words, "--seed", "1", "--force") == 130
    left[0] = 3
    assert run(out, generators["raster"], tokenizer_file, *words, "--seed", "1", "--resume") == 0
    assert contents(out) == contents(tmp_path / "whole")
    left[0] = 3
    assert run(out, generators["raster"], tokenizer_file, *words, "--force") == 130
    left[0] = 1  # Fewer images than the parts that are there.
    words[1] = "1"
    assert run(out, generators["raster"], tokenizer_file, *words, "--force") == 0
    assert not (out / "parts").exists()


def test_options_reach_every_batch_and_a_warning_comes_once(
    generators, tokenizer_file, tmp_path, monkeypatch, caplog
) -> None:
    given, generate = [], MergeAR.generate

    def spy(self: MergeAR, *arguments: object, **options: object) -> object:
        given.append((options["guidance_schedule"], options["guidance_power"]))
        logging.getLogger("mergevq").warning("strange")
        return generate(self, *arguments, **options)

    monkeypatch.setattr(MergeAR, "generate", spy)
    words = ["--num-images", "2", "--batch-size", "1", "--guidance-schedule", "power_cosine", "--guidance-power", "2.5"]
    assert run(tmp_path / "out", generators["raster"], tokenizer_file, *words) == 0
    assert given == 2 * [("power_cosine", 2.5)]
    assert [record.getMessage() for record in caplog.records] == ["strange"]


def test_random_order_draws_where_recovery_puts_the_tokens(generators, tokenizer_file, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = ["--num-tokens", "12", "--steps", "4", "--num-images", "2"]
    assert run(out, generators["random"], tokenizer_file, *words, "--cache", "full") == 2
    assert "--cache for a generator in raster order only" in capsys.readouterr().err
    assert run(out, generators["random"], tokenizer_file, *words) == 0
    tokens = load_tokens(out / "tokens.mvq")
    assert tokens.source is None
    assert tokens.num_tokens.tolist() == [12, 12]
    assert json.loads((out / "generate.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "dog"], "expected a class such as dogs"),
        (["--classes", "3"], "expected classes 0..2, got 3"),
        (["--classes=--1"], "got '--1'"),
        (["--num-tokens", "65"], "expected num_tokens in 1..64, got 65"),
        (["--num-tokens", "0"], "expected num_tokens in 1..64, got 0"),
        (["--steps", "4"], "--steps for a generator in random order only"),
        (["--guidance", "nan"], "guidance"),
        (["--top-p", "0"], "top_p"),
        (["--guidance", "-1"], "guidance"),
        (["--temperature", "-1"], "temperature"),
        (["--num-images", "0"], "--num-images of at least 1"),
        (["--batch-size", "0"], "--batch-size"),
        (["--generator", "nowhere.safetensors"], "there is no such file"),
    ],
)
def test_bad_input_gets_one_line(words, message, generators, tokenizer_file, tmp_path, capsys) -> None:
    assert run(tmp_path / "out", generators["raster"], tokenizer_file, *words) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()  # The right words are not refused afterwards.


def test_models_that_do_not_belong_together_are_refused(generators, tiny_tokenizer, tmp_path, capsys) -> None:
    torch.manual_seed(9)
    other = MergeVQ(tiny_tokenizer.config).save_pretrained(tmp_path / "other.safetensors")
    assert run(tmp_path / "out", generators["raster"], str(other)) == 2
    assert "use the one it was trained with" in capsys.readouterr().err
    assert run(tmp_path / "out", str(other), str(other)) == 2
    assert "generator" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_digits_are_names(generators: dict[str, str], tokenizer_file: str, tmp_path: Path) -> None:
    model = MergeAR.from_pretrained(generators["raster"])
    model.config = replace(model.config, class_names=("1", "10", "2"))
    digits = str(model.save_pretrained(tmp_path / "digits.safetensors"))
    assert run(tmp_path / "out", digits, tokenizer_file, "--classes", "2, 10,0") == 0
    assert json.loads((tmp_path / "out" / "generate.json").read_text())["classes"] == [2, 1, 0]


def test_a_seed_that_torch_cannot_take_leaves_no_trace(
    generators: dict[str, str], tokenizer_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(out, generators["raster"], tokenizer_file, "--seed", "9" * 23) == 2
    assert f"expected --seed of at most 64 bits, got {'9' * 23}" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("given", [["2,1"], ["2", "1"], ["2,", "1"]])
def test_a_value_for_each_bit_group_is_written_with_commas_or_spaces(given, generators, tokenizer_file, tmp_path):
    words = ["--guidance", *given, "--temperature", "1,0.9", "--top-k", "3,0", "--top-p", "1,0.8", "--num-images", "1"]
    assert run(tmp_path / "out", generators["raster"], tokenizer_file, *words) == 0
    record = json.loads((tmp_path / "out" / "generate.json").read_text())
    told = [record[name] for name in ("guidance", "temperature", "top_k", "top_p")]
    assert told == [[2, 1], [1, 0.9], [3, 0], [1, 0.8]]


def test_an_interrupted_run_says_how_to_go_on(generators, tokenizer_file, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MergeAR, "generate", interrupt)
    assert run(tmp_path / "out", generators["raster"], tokenizer_file) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err


def test_the_help_names_the_models_that_are_there(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "folder of a training run, emoji_64 (comes with the package), or Hugging Face hub id" in text
    assert ("emoji_64_random" in text) == ("random_ar" in shipped_roles("emoji_64"))
    assert "the lowest bits first" in text and "not a promise" in text
