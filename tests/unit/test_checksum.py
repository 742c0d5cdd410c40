"""A flipped bit in a model file is noticed; files from before there were checksums still load."""

import json
from pathlib import Path

import pytest
import torch

from mergevq.checksum import checksum
from mergevq.cli.main import main
from mergevq.errors import CheckpointError
from mergevq.files import load_tensors, save_tensors
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.classifier import Classifier
from mergevq.tokenizer.classifier_config import ClassifierConfig
from mergevq.tokenizer.model import MergeVQ

KINDS = {"tokenizer": MergeVQ, "raster": MergeAR, "random": RandomAR, "classifier": Classifier}


@pytest.fixture
def files(tiny_tokenizer: MergeVQ, tmp_path: Path) -> dict[str, Path]:
    small = {
        "grid": (8, 8),
        "num_tokens": 20,
        "num_bits": 6,
        "groups": (2, 4),
        "num_classes": 3,
        "width": 32,
        "depth": 1,
        "heads": 2,
    }
    generators = {"raster": MergeAR, "random": RandomAR}
    models = {
        "tokenizer": tiny_tokenizer,
        "classifier": Classifier(
            ClassifierConfig(tiny_tokenizer.config, image_size=32, num_tokens=64, class_names=("a", "b"))
        ),
        **{order: kind(GeneratorConfig(order=order, **small)) for order, kind in generators.items()},
    }
    return {name: model.save_pretrained(tmp_path / f"{name}.safetensors") for name, model in models.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_of_weights_or_header_is_refused(files, kind):
    path = files[kind]
    data = path.read_bytes()
    KINDS[kind].from_pretrained(path)
    header = 8 + int.from_bytes(data[:8], "little")
    step = data.index(b'"step":"0"') + len('"step":"')
    for place in (header, header + (len(data) - header) // 2, len(data) - 1, step):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match="checksum differs") as caught:
            KINDS[kind].from_pretrained(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_half_precision_has_a_checksum_of_what_is_in_the_file(tiny_tokenizer, tmp_path):
    path = tiny_tokenizer.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
    tensors, header = load_tensors(path)
    assert header["sha256"] == checksum(header, tensors)
    MergeVQ.from_pretrained(path)


def test_the_checksum_depends_on_names_types_shapes_and_bytes():
    value = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    others = [
        {**value, "a": value["a"].view(2, 3)},
        {**value, "a": value["a"].view(torch.int32)},
        {**value, "a": value["a"].flip(0)},
        {"a": value["b"], "b": value["a"], "c": value["c"]},
        {"a": value["a"], "b": value["b"]},
    ]
    sums = [checksum({"step": "1"}, tensors) for tensors in (value, *others)] + [checksum({"step": "2"}, value)]
    assert len(set(sums)) == len(sums)
    assert checksum({"step": "1"}, dict(reversed(value.items()))) == sums[0]
    assert checksum({"step": "1"}, {**value, "a": torch.arange(6.0).repeat_interleave(2)[::2]}) == sums[0]


def test_a_file_without_a_checksum_loads_and_info_compares_its_fingerprint(files, capsys):
    path = files["tokenizer"]
    tensors, header = load_tensors(path)
    del header["sha256"]
    save_tensors(path, tensors, header)
    assert main(["info", str(path)]) == 0
    tensors["encoder.class_token"].view(torch.int32).flatten()[0] ^= 1
    save_tensors(path, tensors, header)
    MergeVQ.from_pretrained(path)
    capsys.readouterr()
    assert main(["info", str(path)]) == 2
    assert "fingerprint differs" in capsys.readouterr().err


def test_the_shipped_models_load_and_are_what_their_header_says(capsys):
    assert main(["info", "emoji_64"]) == 0
    found = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert json.loads(found["trained"].split()[0].replace(",", "")) > 0
