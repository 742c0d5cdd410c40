"""`mergevq eval generation`, run in-process on tiny models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.model import MergeVQ


@pytest.fixture
def place(tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with photos in two classes, a tokenizer and generators, one of another tokenizer."""
    monkeypatch.chdir(tmp_path)
    names = [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in ("cat", "dog") for i in range(3)]
    write_images("photos", torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1, names)
    tiny_tokenizer.save_pretrained("tok.safetensors")
    torch.manual_seed(0)
    fields = {"grid": (8, 8), "num_bits": 6, "groups": (3, 3), "num_classes": 2, "class_names": ("cat", "dog")}
    fields |= {"num_tokens": 20, "width": 16, "depth": 1, "group_depth": 1, "heads": 1, "ffn_multiple": 16}
    for name, tokenizer in (("gen", tiny_tokenizer.fingerprint()), ("strange", 64 * "e")):
        MergeAR(GeneratorConfig(**fields, tokenizer=tokenizer)).save_pretrained(f"{name}.safetensors")
    return tmp_path


VERB = "eval generation photos -o new --generator gen.safetensors --tokenizer tok.safetensors --network none"


def test_it_writes_json_and_a_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--num-images 3 --guidance 1,1.5 --classes dog --samples 2 --top-k 4,0 --reference train --batch-size 4"
    assert main([*VERB.split(), *options.split()]) == 0
    out = capsys.readouterr().out
    value = json.loads((place / "new" / "generation.json").read_text())
    assert [row["setting"]["guidance"] for row in value["rows"]] == [1.0, 1.5]
    protocol = value["protocol"]
    assert (protocol["images"], protocol["reference"]["images"], protocol["classes"]) == (3, 6, "in turn: dog")
    assert protocol["neighbours"]["are_the_reference"] and protocol["sampling"]["top_k"] == [4, 0]
    assert [sample["class_name"] for sample in value["samples"][0]] == ["dog", "dog"]
    assert "guidance 1.5" in out and "generation.json" in out
    # Two samples with the nearest training image by pixels, the sweep, a sheet for each scale.
    assert (place / "new" / "report.html").read_text().count("<img ") == 1 + 2 * 2 + 2


BAD = {
    "no images": ("--num-images 0", "num_images and batch_size of at least 1, got 0"),
    "no images at a time": ("--num-images 4 --batch-size 0", "--batch-size to be at least 1, got 0"),
    "negative guidance": ("--num-images 4 --guidance 1,-1", "guidance of at least 0"),
    "guided by nothing": ("--num-images 4 --guidance 2 --classes none", "guidance 1 without classes"),
    "unknown class": ("--num-images 4 --classes dig", "such as dog"),
    "no number": ("--num-images 4 --classes=--1", "got '--1'"),
    "negative limit": ("--num-images 4 --limit -3", "limit of at least 1"),
    "class number": ("--num-images 4 --classes 2", "0..1, got 2"),
    "K above L": ("--num-images 4 --num-tokens 65", "1..64"),
    "steps in raster order": ("--num-images 4 --steps 4", "random order only"),
    "groups": ("--num-images 4 --temperature 1,1,1", "temperature"),
    "no devices": ("--num-images 4 --devices 0", "--devices to be at least 1"),
    "no reference": ("--num-images 4 --neighbours nowhere", "nowhere"),
    "another tokenizer": ("--num-images 4 --generator strange.safetensors", "expected tokenizer eeeeeeeeeeee"),
    "a tokenizer as generator": ("--num-images 4 --generator tok.safetensors", "generator"),
    "a generator as tokenizer": ("--num-images 4 --tokenizer gen.safetensors", "tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_line(case: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options, hint = BAD[case]
    assert main([*VERB.split(), *options.split()]) == 2
    out, err = capfd.readouterr()
    assert err.startswith("mergevq: error: ") and err.count("\n") == 1 and hint in err, err
    assert out == "" and not (place / "new").exists()


@pytest.mark.slow
def test_two_processes_give_the_same_images(place: Path) -> None:
    """As the user starts them: the command starts the second process itself."""
    words = f"{VERB} --num-images 5 --batch-size 2 --guidance 2 --device cpu --samples 5"
    for devices in (1, 2):
        code = f"import sys; from mergevq.cli.main import main; sys.exit(main({words.split()!r}))"
        Path("run.py").write_text(
            code.replace("new", f"new{devices}").replace("'5'", f"'5', '--devices', '{devices}'", 1)
        )
        subprocess.run([sys.executable, "run.py"], check=True, capture_output=True, timeout=300)
    one, two = (json.loads((place / f"new{n}" / "generation.json").read_text()) for n in (1, 2))
    assert (one["protocol"]["processes"], two["protocol"]["processes"]) == (1, 2)
    assert one["rows"][0]["distinct_tokens"] == two["rows"][0]["distinct_tokens"]
    assert one["samples"] == two["samples"] and len(two["samples"][0]) == 5
