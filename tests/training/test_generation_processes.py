"""An evaluation of generation by two processes of gloo is that of one."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergevq.data.folder import ImageFolder
from mergevq.errors import DataError, MergeVQError
from mergevq.evaluation.generation import evaluate_generation
from mergevq.evaluation.processes import shared_processes
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import GenerationStats
from mergevq.metrics.features import FeatureNetwork
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import MergedTokens
from mergevq.training.config import HardwareConfig
from mergevq.training.processes import build_fabric

TWO = HardwareConfig(accelerator="cpu", devices=2, strategy="ddp_fork")


class Noise:
    """Draws every index from the image's own seed."""

    def __init__(self, tokenizer: str) -> None:
        self.config = GeneratorConfig(
            grid=(8, 8), num_bits=6, groups=(6,), num_classes=2, num_tokens=20, width=4, heads=1
        )
        self.tokenizer = tokenizer

    def fingerprint(self) -> str:
        return "noise"

    def generate_with_stats(self, classes=None, **options):
        rngs = [torch.Generator().manual_seed(seed) for seed in options["seeds"]]
        index = torch.stack([torch.randint(64, (64,), generator=rng) for rng in rngs])
        stats = GenerationStats(len(index), 1.0, 64, cache_bytes=100, cache_slots=9)
        return MergedTokens.from_full_index(index, (8, 8), 6, self.tokenizer), stats


@pytest.fixture
def network() -> FeatureNetwork:
    torch.manual_seed(5)
    # The last digits of a convolution depend on the batch: one image alone is added up otherwise.
    layers = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return FeatureNetwork(layers, "corners", classifier=nn.Linear(12, 4))


def evaluated(
    fabric, tok: MergeVQ, network: FeatureNetwork, images: ImageFolder, folder: Path, count: int, batch_size: int = 4
) -> None:
    generator = Noise(tok.fingerprint())
    try:
        report = evaluate_generation(
            generator, tok, images, num_images=count, guidance=(1, 2), network=network, batch_size=batch_size, shown=5
        )
        found = report.to_json()
        pictures = [sample.image.tolist() for samples in report.samples for sample in samples]
    except MergeVQError as error:
        found, pictures = f"{type(error).__name__}: {error}", []
    rank = 0 if fabric is None else fabric.global_rank
    (folder / f"{rank}.json").write_text(json.dumps([found, pictures]))


def of_both(folder: Path, *arguments: object) -> list:
    build_fabric(TWO).launch(evaluated, *arguments[:3], folder, *arguments[3:])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("count", [9, 2])
def test_two_processes_measure_what_one_does(
    tiny_tokenizer: MergeVQ, network: FeatureNetwork, image_folder: Path, tmp_path: Path, count: int
) -> None:
    """Nine images are three batches for two; two are one, and the second process has none. Of the thirteen real ones
    the last is a batch of its own, for two processes as for one."""
    images = ImageFolder(image_folder)
    (first, pictures), (second, none) = of_both(tmp_path, tiny_tokenizer, network, images, count)
    evaluated(None, tiny_tokenizer, network, images, tmp_path, count)
    alone, expected = json.loads((tmp_path / "0.json").read_text())
    assert pictures == expected and len(pictures) == 2 * min(count, 5) and none == []
    assert first["samples"] == alone["samples"] and second["samples"] == []
    assert first["rows"] == second["rows"] and first["reference"] == second["reference"]
    assert first["protocol"]["processes"] == 2
    for mine, theirs in [*zip(first["rows"], alone["rows"], strict=True), (first["reference"], alone["reference"])]:
        for name in mine.keys() - {"seconds", "generate_per_second", "decode_per_second"}:
            assert mine[name] == theirs[name], name


def test_an_error_of_one_process_is_told_by_both(
    tiny_tokenizer: MergeVQ, network: FeatureNetwork, image_folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        ImageFolder(image_folder).read(i).image.save(root / f"{i}.png")
    images = ImageFolder(root)
    for i in (2, 3):  # Later: a folder without any readable image is refused when it is opened.
        (root / f"{i}.png").write_bytes(b"no image")
    # The second process has images 2 and 3, none of them readable; the first has the others.
    (first, _), (second, _) = of_both(tmp_path, tiny_tokenizer, network, images, 4, 2)
    assert first["protocol"]["reference"]["images"] == 2 and first["rows"] == second["rows"]
    for i in (0, 1):
        (root / f"{i}.png").write_bytes(b"no image")
    (first, _), (second, _) = of_both(tmp_path, tiny_tokenizer, network, images, 4, 2)
    assert first.startswith("DataError: ") and first.split(": ", 1)[1] in second and "process 0" in second


def collected(fabric, folder: Path) -> None:
    rank, found = fabric.global_rank, []
    with shared_processes() as processes:
        rows: dict[str, Tensor] = {"rank": torch.full((rank + 1, 2), rank)}
        if rank:
            rows["bytes"] = torch.arange(3, dtype=torch.uint8)
        for name, tensor in processes.collect(lambda: rows).items():
            found.append([name, str(tensor.dtype), tensor.tolist()])

        def fail() -> dict[str, Tensor]:
            if rank:
                raise DataError("expected something")
            return {}

        try:
            processes.collect(fail)
        except MergeVQError as error:
            found.append(f"{type(error).__name__} {error}")
        found.append(processes.first(lambda: {"rank": rank}))
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_rows_and_errors_travel(tmp_path: Path) -> None:
    build_fabric(TWO).launch(collected, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] == ["bytes", "torch.uint8", [0, 1, 2]]
    assert first[1] == ["rank", "torch.int64", [[0, 0], [1, 1], [1, 1]]]
    assert second[:2] == [["bytes", "torch.uint8", []], ["rank", "torch.int64", []]]
    assert first[2] == "MergeVQError process 1 of 2 failed: expected something"
    assert second[2] == "DataError expected something"
    assert first[3] == second[3] == {"rank": 0}
