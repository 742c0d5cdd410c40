"""An evaluation of everything by two processes of gloo is that of one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergevq.data.images import write_images
from mergevq.errors import MergeVQError
from mergevq.evaluation.overall import evaluate_all
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import GenerationStats
from mergevq.metrics.probe_config import ProbeConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import MergedTokens
from mergevq.training.config import HardwareConfig
from mergevq.training.processes import build_fabric

TWO = HardwareConfig(accelerator="cpu", devices=2, strategy="ddp_fork")
TIMES = {"encode_per_second", "decode_per_second", "generate_per_second", "seconds", "processes", "notes"}


class Edges(nn.Module):
    """Its last digits depend on the batch, as those of every convolution do: one image alone is added up otherwise."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.rand(8, 3, 3, 3, generator=rng) - 0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(images, self.weight).relu().mean((2, 3))


class Noise:
    """Draws every index from the image's own seed."""

    def __init__(self, tok: MergeVQ) -> None:
        fields = {"grid": (8, 8), "num_bits": 6, "groups": (6,), "num_classes": 2, "num_tokens": 20, "width": 16}
        self.config = GeneratorConfig(**fields, heads=1, group_depth=0, tokenizer=tok.fingerprint())

    def fingerprint(self) -> str:
        return "noise"

    def generate_with_stats(self, classes: Any = None, **options: Any) -> tuple[MergedTokens, GenerationStats]:
        rngs = [torch.Generator().manual_seed(seed) for seed in options["seeds"]]
        index = torch.stack([torch.randint(64, (64,), generator=rng) for rng in rngs])
        tokens = MergedTokens.from_full_index(index, (8, 8), 6, self.config.tokenizer)
        return tokens, GenerationStats(len(index), 1.0, 64, cache_bytes=100, cache_slots=9)


def evaluated(fabric: Any, models: tuple, photos: Path, out: Path, options: dict) -> None:
    rank = 0 if fabric is None else fabric.global_rank
    probes = ProbeConfig(probes=("knn",), ks=(1,))
    try:
        report = evaluate_all(
            *models, photos, num_tokens=20, network=Edges(), perceptual=None, probes=probes, num_images=3,
            batch_size=3, out=out, command="again", **options,
        )  # fmt: skip
        found = {**report.to_json(), "sections": [part.section() for part in report.parts.values()]}
    except MergeVQError as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    (out.parent / f"{rank}.json").write_text(json.dumps(found))


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(entry) for name, entry in value.items() if name not in TIMES}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def test_two_processes_measure_what_one_does(
    tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergevq.evaluation.overall.section", lambda name, found: f"<p>{name}</p>")
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    # Eight images to look at are three batches for two processes, the last of which is smaller.
    names = [f"{part}/{kind}/{i}.png" for part in ("train", "val") for kind in ("cat", "dog") for i in range(4)]
    write_images(tmp_path / "photos", images, names)
    models = (tiny_tokenizer, Noise(tiny_tokenizer))
    build_fabric(TWO).launch(evaluated, models, tmp_path / "photos", tmp_path / "two", {})
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    evaluated(None, models, tmp_path / "photos", tmp_path / "one", {})
    alone = json.loads((tmp_path / "0.json").read_text())
    assert first.pop("sections") == alone.pop("sections") and second.pop("sections") == [""] * 4
    assert list(first["parts"]) == ["reconstruction", "generation", "representation", "sanity"]
    assert first == second and timeless(first) == timeless(alone)
    # What two processes began, one may finish, and an error is told by both.
    evaluated(None, models, tmp_path / "photos", tmp_path / "two", {})
    again = json.loads((tmp_path / "0.json").read_text())
    assert again["parts"] == first["parts"] and again.pop("sections")
    build_fabric(TWO).launch(evaluated, models, tmp_path / "photos", tmp_path / "two", {"seed": 5})
    errors = [json.loads((tmp_path / f"{rank}.json").read_text())["error"] for rank in range(2)]
    assert errors[0].startswith("OutputExistsError") and "process 0 of 2 failed" in errors[1]
    assert all("another seed, 0 instead of 5" in error for error in errors)
