"""What the metrics say of images whose quality is known, against what is computed here by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from mergevq.data.images import read_images, write_images
from mergevq.errors import ConfigError
from mergevq.evaluation.reconstruction import evaluate_reconstruction
from mergevq.evaluation.sanity import NOISE, evaluate_sanity
from mergevq.evaluation.sanity_result import SanityReport, SanityRow
from mergevq.metrics.features import FeatureNetwork
from mergevq.tokenizer.model import MergeVQ


class Corners(nn.Module):
    """Features of an image: the mean colour of each quarter."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class MeanDifference(nn.Module):
    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        return (reconstruction - image).abs().mean()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images of 64 x 64 pixels, grey enough that noise is not clamped."""
    coarse = torch.rand(11, 3, 6, 6, generator=torch.Generator().manual_seed(3)) - 0.5
    write_images(tmp_path / "images", nn.functional.interpolate(coarse, 64, mode="bicubic").clamp(-1, 1))
    return tmp_path / "images"


def measure(folder: Path, **options: object) -> SanityReport:
    torch.manual_seed(5)
    classifier = nn.Linear(12, 4)
    network = FeatureNetwork(Corners(), "corners", classifier=classifier)
    return evaluate_sanity(folder, 64, network=network, perceptual=MeanDifference(), **options)


def row(report: SanityReport, name: str) -> SanityRow:
    found = report.row(name)
    assert found is not None
    return found


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float((10 * np.log10(255**2 / ((a - b) ** 2).mean((1, 2, 3)))).mean())


def test_copies_are_perfect_and_other_images_are_a_perfect_set(folder: Path) -> None:
    report = measure(folder)
    assert [row.name for row in report.rows] == ["identical", "shuffled", "blurred", "noised", "halves"]
    same, other = row(report, "identical"), row(report, "shuffled")
    assert (same.psnr, same.ssim, same.perceptual, same.kernel) == (math.inf, pytest.approx(1), 0, 0)
    assert same.frechet == pytest.approx(0, abs=1e-9) and other.frechet == pytest.approx(0, abs=1e-9)
    assert same.precision == same.recall == other.precision == other.recall == 1
    assert same.inception_score == pytest.approx(other.inception_score)
    # Every image is compared with another one, each of which has its turn.
    images = np.round((read_images(folder, 64).numpy() + 1) * 127.5)
    pairs = [psnr(images[i : i + 1], images[j : j + 1]) for i in range(11) for j in range(11) if i != j]
    assert min(pairs) < other.psnr < max(pairs) < 20
    assert other.kernel < 0


def test_the_blur_and_the_noise_are_what_they_are_called(folder: Path) -> None:
    report = measure(folder)
    assert report.protocol["blur_sigma"] == 1 and report.title("blurred") == "blurred, sigma 1 pixel"
    images = np.round((read_images(folder, 64).numpy() + 1) * 127.5)
    blurred = np.round(gaussian_filter(images, (0, 0, 1, 1), mode="mirror", truncate=3))
    assert row(report, "blurred").psnr == pytest.approx(psnr(images, blurred), abs=0.01)
    # Rounding adds the variance of a step, 1/12.
    assert row(report, "noised").psnr == pytest.approx(10 * math.log10(255**2 / (NOISE**2 + 1 / 12)), abs=0.05)
    assert row(report, "noised").ssim < row(report, "blurred").ssim < 1


def test_the_floor_is_the_reference_of_reconstruction(folder: Path, tiny_tokenizer: MergeVQ) -> None:
    report = measure(folder, seed=4)
    other = evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=Corners(), size=64, seed=4)
    floor = row(report, "halves")
    assert other.reference is not None and floor.images == other.reference.images == 5
    assert (floor.frechet, floor.kernel) == pytest.approx((other.reference.frechet, other.reference.kernel), rel=1e-6)
    assert floor.psnr is None and floor.precision is not None


def test_batches_change_nothing_and_runs_are_equal(folder: Path) -> None:
    one, two, again = measure(folder), measure(folder, batch_size=4), measure(folder)
    assert one.to_json() == again.to_json()
    for name in ("shuffled", "blurred", "noised"):
        assert row(one, name).psnr == pytest.approx(row(two, name).psnr, rel=1e-9)
        assert row(one, name).perceptual == pytest.approx(row(two, name).perceptual, rel=1e-5)
        assert row(one, name).kernel == pytest.approx(row(two, name).kernel, abs=1e-6)


def test_it_comes_back_from_json(folder: Path) -> None:
    report = measure(folder)
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert SanityReport.from_json(value) == report
    heads, lines = report.cells()
    assert heads[1:4] == ["PSNR in dB", "SSIM", "perceptual (MeanDifference)"] and lines[0][:3] == [
        "identical",
        "∞",
        "1.000",
    ]
    assert heads[4:6] == ["FD-corners", "KD-corners"] and lines[4][1] == "" and "FD-corners" in str(report)


def test_few_images_have_fewer_rows(folder: Path) -> None:
    (folder / "0003.png").write_bytes(b"not an image")
    assert measure(folder).protocol["images"] == 10 and "1 of 11 images could not be read" in measure(folder).notes[0]
    one = measure(folder, limit=1)
    assert [row.name for row in one.rows] == ["identical", "blurred", "noised"] and one.rows[0].frechet is None
    assert any("at least 2 images" in note for note in one.notes)
    bare = evaluate_sanity(folder, 64, network=None)
    assert bare.cells()[0] == ["originals against", "PSNR in dB", "SSIM"]
    with pytest.raises(ConfigError, match="limit of at least 1"):
        evaluate_sanity(folder, 64, limit=0)
