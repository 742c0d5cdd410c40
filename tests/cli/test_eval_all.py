"""`mergevq eval all`, run in-process on tiny models."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from mergevq.cli.eval_all import command_of, eval_all
from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.model import MergeVQ

TIMES = {"encode_per_second", "decode_per_second", "generate_per_second", "seconds"}


@pytest.fixture
def place(tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with photos in two classes, others without classes, a tokenizer and a generator."""
    monkeypatch.chdir(tmp_path)
    images = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    names = [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in ("cat", "dog") for i in range(6)]
    write_images("photos", images, names)
    write_images("flat", images[:5])
    tiny_tokenizer.save_pretrained("tok.safetensors")
    torch.manual_seed(0)
    config = GeneratorConfig(
        grid=(8, 8), num_bits=6, groups=(6,), num_classes=2, num_tokens=20, width=16, depth=1, group_depth=0, heads=2,
        tokenizer=tiny_tokenizer.fingerprint(),
    )  # fmt: skip
    MergeAR(config).save_pretrained("gen.safetensors")
    return tmp_path


VERB = "eval all --tokenizer tok.safetensors --data photos --out new --network none --perceptual none"


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(entry) for name, entry in value.items() if name not in TIMES}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def test_it_writes_one_json_one_page_and_a_card_that_tells_how(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--generator gen.safetensors --num-images 3 --num-tokens 20 --guidance 2 --examples 1 --samples 2"
    assert main([*VERB.split(), *options.split()]) == 0
    out = capsys.readouterr().out
    value = json.loads((place / "new" / "evaluation.json").read_text())
    assert value["schema"] == "mergevq.evaluation/2" and value["missing"] == {}
    assert {name: part["schema"] for name, part in value["parts"].items()} == {
        name: f"mergevq.{name}/1" for name in ("reconstruction", "generation", "representation", "sanity")
    }
    assert "Reconstruction of 12 images" in out and "new/evaluation.json, new/report.html, new/card.md" in out
    page = (place / "new" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("<!doctype") == page.count("<style>") == 1
    for name in value["parts"]:
        assert f'<a href="#{name}">' in page and f'id="{name}"' in page, name
    # Plot; original, reconstruction, map; two samples with neighbours by pixels, their sheet; probes.
    assert page.count("<img ") == 1 + 3 + (2 * 2 + 1) + 4
    assert all(link.startswith(("data:image/", "#")) for link in page.replace("href=", "src=").split('src="')[1:])
    card = (place / "new" / "card.md").read_text()
    command = card.split("```")[1].strip()
    assert command == value["command"] and "--guidance 2" in command and "--out results" in command
    # Read back, and measured again by the command on the card.
    assert main(["info", "new/evaluation.json"]) == 0
    assert "PSNR in dB" in capsys.readouterr().out
    monkeypatch.setattr("mergevq.evaluation.overall.section", lambda name, found: name)
    assert main(shlex.split(command)[1:]) == 0
    again = json.loads((place / "results" / "evaluation.json").read_text())
    assert timeless(again) == timeless(value)


def test_labels_and_a_generator_may_be_missing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(VERB.replace("photos", "flat").split()) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Generation was left out: no generator was given." in told
    assert "Representation was left out: expected training images in class folders" in told
    value = json.loads((place / "new" / "evaluation.json").read_text())
    assert list(value["parts"]) == ["reconstruction", "sanity"] and list(value["missing"]) == [
        "generation",
        "representation",
    ]


BAD = {
    "no labels": (VERB.replace("photos", "flat") + " --parts representation", "images without classes in flat"),
    "no generator": (f"{VERB} --parts generation", "give one with --generator"),
    "part": (f"{VERB} --parts speed", "got 'speed'"),
    "nothing there": (VERB.replace("photos", "nowhere"), "nowhere"),
    "K": (f"{VERB} --num-tokens 65", "1..64"),
    "tokenizer": (VERB.replace("tok.saf", "no.saf"), "no.safetensors"),
    "generator of another": (f"{VERB} --generator emoji_64", "expected a tokenizer of grid 16x16 and 12 bits"),
    "limit": (f"{VERB} --limit 0", "at least 1 image, got 0"),
    "no devices": (f"{VERB} --devices 0", "--devices to be at least 1"),
    "weights of nobody": (f"{VERB} --teacher-weights w.safetensors", "--teacher with --teacher-weights"),
    "weights of a package": (f"{VERB} --teacher lite0 --teacher-weights w.safetensors", "name of a timm model"),
    "teacher": (f"{VERB} --size 48 --teacher lite00", "lite00"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line(case: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, hint = BAD[case]
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    assert err.startswith("mergevq: error: ") and err.count("\n") == 1 and hint in err, err
    assert out == "" and not (place / "new").exists()


def test_a_folder_with_something_else_and_json_of_another_version_are_refused(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*VERB.replace("new", "flat").split()]) == 2
    assert "flat exists already" in capfd.readouterr().err
    (place / "old.json").write_text(json.dumps({"schema": "mergevq.evaluation/7"}))
    assert main(["info", "old.json"]) == 2
    assert "expected the schema mergevq.evaluation/2, got mergevq.evaluation/7: upgrade" in capfd.readouterr().err


def test_the_command_names_what_is_not_the_default() -> None:
    given = dict.fromkeys(eval_all.__annotations__)
    given |= {name: p.default for name, p in __import__("inspect").signature(eval_all).parameters.items()}
    given |= {"tokenizer": "my tok", "data": "d", "out": Path("x"), "num_tokens": (64, 20), "force": True}
    # Of a number all digits: the command has to give the same results.
    assert command_of({**given, "predict_source": True, "guidance": (1.5, 2.12345678)}) == (
        "mergevq eval all --tokenizer 'my tok' --data d --out results --num-tokens 64,20 --guidance 1.5,2.12345678 "
        "--predict-source"
    )
