"""An evaluation of representation by two processes of gloo is that of one, bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mergevq.data.folder import ImageFolder
from mergevq.errors import DataError, MergeVQError
from mergevq.evaluation.processes import shared_processes
from mergevq.evaluation.representation import evaluate_representation
from mergevq.metrics.probe_config import LinearConfig, ProbeConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.config import HardwareConfig
from mergevq.training.processes import build_fabric

TWO = HardwareConfig(accelerator="cpu", devices=2, strategy="ddp_fork")


class Broken(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) / 0


def parts(images: ImageFolder) -> tuple[ImageFolder, ImageFolder]:
    """Seven images to train on and six to test on, with cats (the first eight) and dogs in both."""
    return images.select([0, 1, 2, 3, 8, 9, 10]), images.select([4, 5, 6, 7, 11, 12])


def evaluated(fabric, tok: MergeVQ, data: tuple, folder: Path, options: dict) -> None:
    probes = ProbeConfig(ks=(1, 2), linear=LinearConfig(learning_rates=(0.1, 0.2), epochs=3), shots=(1,), draws=2)
    seen: list[int] = []
    try:
        report = evaluate_representation(
            tok, *data, num_tokens=20, kinds=("class", "mean"), probes=probes, shard_size=2, batch_size=2,
            pixel_side=2, on_images=seen.append, **options,
        )  # fmt: skip
        pictures = [picture.projection.tolist() for picture in report.pictures]
        found = {**report.to_json(), "pictures": pictures, "seen": sum(seen)}
        found.pop("seconds")
        found["processes"] = found["protocol"].pop("processes")
    except MergeVQError as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    rank = 0 if fabric is None else fabric.global_rank
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("stored", [True, False])
def test_two_processes_measure_what_one_does(
    tiny_tokenizer: MergeVQ, image_folder: Path, tmp_path: Path, stored: bool
) -> None:
    images = ImageFolder(image_folder)
    data = parts(images)
    caches = [{"cache": tmp_path / name} if stored else {} for name in ("two", "one")]
    build_fabric(TWO).launch(evaluated, tiny_tokenizer, data, tmp_path, caches[0])
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    evaluated(None, tiny_tokenizer, data, tmp_path, caches[1])
    alone = json.loads((tmp_path / "0.json").read_text())
    counts = [found.pop("processes") for found in (first, second, alone)]
    assert counts == [2, 2, 1]
    seen = [found.pop("seen") for found in (first, second, alone)]
    # Seven shards, and the test images once for each of five rows.
    assert seen[2] == 13 + 5 * 6 == seen[0] + seen[1] and min(seen) > 13
    assert first == second == alone
    if stored:
        files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
        assert files[0] == files[1] and len(files[0]) == 1 + 4 + 3


def test_an_error_is_told_by_both(tiny_tokenizer: MergeVQ, image_folder: Path, tmp_path: Path) -> None:
    images = ImageFolder(image_folder)
    data = parts(images)
    build_fabric(TWO).launch(evaluated, tiny_tokenizer, data, tmp_path, {"teacher": Broken(), "baselines": ()})
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text())["error"] for rank in range(2))
    # Rows are class token, mean and teacher: the first process has the last.
    assert first.startswith("ShapeError: expected finite training (teacher Broken) features")
    assert second.startswith("MergeVQError: process 0 of 2 failed: ") and first.split(": ", 1)[1] in second


def each(fabric, folder: Path) -> None:
    rank, found = fabric.global_rank, []
    with shared_processes() as processes:
        found.append(processes.each(lambda: {"rank": rank}))

        def fail() -> None:
            if rank:
                raise DataError("expected something")

        try:
            processes.each(fail)
        except MergeVQError as error:
            found.append(f"{type(error).__name__} {error}")
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_results_of_each_process_are_known_to_all(tmp_path: Path) -> None:
    build_fabric(TWO).launch(each, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] == second[0] == [{"rank": 0}, {"rank": 1}]
    assert first[1] == "MergeVQError process 1 of 2 failed: expected something"
    assert second[1] == "DataError expected something"
