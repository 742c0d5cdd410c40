"""What is gathered at one K: means over images, whatever copies and perceptual modules give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergevq.data.images import write_images
from mergevq.errors import ShapeError
from mergevq.evaluation.result import ReconstructionReport
from mergevq.evaluation.sanity import evaluate_sanity
from mergevq.evaluation.tally import Quality, Tally
from mergevq.metrics.image import psnr

ORIGINALS = torch.randint(0, 256, (4, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def drawn(perfect: int) -> Tensor:
    """Copies of the originals, of which all but the first so many are changed."""
    pixels = ORIGINALS.clone()
    pixels[perfect:, 0, 0, 0] ^= 31
    pixels[perfect:, 1] ^= 1
    return pixels


def row(perfect: int) -> Any:
    tally = Tally(3, 6, predict_source=True)
    assert tally.predicted is not None
    for quality in (tally.known, tally.predicted):
        quality.compare(drawn(perfect), ORIGINALS, None)
    ones = torch.ones(4)
    tally.known.add(bits_index=ones, bits_source=ones, distinct=ones)
    tally.predicted.add(accuracy=ones)
    tally.codebook.update(torch.tensor([0, 0, 5, 5, 63, 63, 17, 17]))
    tally.seconds.append((4, 1.0, 1.0))
    return tally.row(None)


def report(perfect: int) -> ReconstructionReport:
    protocol = {"network": None, "perceptual": None, "images": 4, "image_size": 12, "data": "x", "num_patches": 9}
    return ReconstructionReport((row(perfect),), None, protocol, ("A note.",), (3, 3))


def test_one_perfect_copy_leaves_psnr_a_mean_of_the_others() -> None:
    values = psnr(drawn(1), ORIGINALS)[1:]
    for found in (row(1), row(1).predicted):
        assert found.psnr.mean == pytest.approx(float(values.mean())) and math.isfinite(found.psnr.std)
        assert found.psnr_perfect == 1
    told = report(1)
    assert "perfect copies: 1 at K = 3" in told.all_notes()[-1] and "perfect copies" in str(told)
    value = json.loads(json.dumps(told.to_json(), allow_nan=False))
    assert value["rows"][0]["psnr_perfect"] == 1 and value["notes"] == list(told.all_notes())
    again = ReconstructionReport.from_json(value)
    assert again.to_json() == told.to_json() and again.all_notes() == told.all_notes()
    assert row(0).psnr_perfect == 0 and report(0).all_notes() == ("A note.",)


def test_all_perfect_is_infinite_without_a_deviation() -> None:
    found = report(4)
    assert (found.rows[0].psnr.mean, found.rows[0].psnr.std) == (math.inf, 0.0)
    assert "∞" in str(found) and "nan" not in str(found)
    assert found.to_json()["rows"][0]["psnr"] == {"mean": None, "std": 0.0}


def test_the_perplexity_of_the_codebook_is_told() -> None:
    assert row(0).codebook_perplexity == pytest.approx(4)
    assert ["  perplexity", "4.0"] in report(0).cells()[1]


def test_a_flat_image_does_not_make_blurred_ones_perfect(tmp_path: Path) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    images[0] = 1.0
    write_images(tmp_path, images)
    found = evaluate_sanity(tmp_path, 32, network=None)
    blurred, same = found.row("blurred"), found.row("identical")
    assert blurred is not None and blurred.psnr is not None and math.isfinite(blurred.psnr)
    assert blurred.psnr_perfect == 1 and "equal are 1 blurred" in found.notes[0]
    assert same is not None and (same.psnr, same.psnr_perfect) == (math.inf, 3)


class Gives(nn.Module):
    """A perceptual module that returns the distances of the images as it is told."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, reconstruction: Tensor, image: Tensor) -> Any:
        each = (reconstruction - image).abs().mean((1, 2, 3))
        forms = {
            "mean": each.mean(),
            "mean [1]": each.mean()[None],
            "[B]": each,
            "[B, 1]": each[:, None],
            "[B, 1, 1, 1]": each.view(-1, 1, 1, 1),
            "[B, B]": each.expand(4, 4),
            "[1, B]": each[None],
            "[B - 1]": each[1:],
            "a list": each.tolist(),
        }
        return forms[self.form]


@pytest.mark.parametrize("form", ["mean", "mean [1]", "[B]", "[B, 1]", "[B, 1, 1, 1]"])
def test_distances_of_a_perceptual_module_are_means_or_one_an_image(form: str) -> None:
    quality = Quality()
    quality.compare(drawn(1), ORIGINALS, Gives(form))
    expected = Gives("mean")(drawn(1).float() / 127.5 - 1, ORIGINALS.float() / 127.5 - 1)
    assert quality.mean("perceptual") == pytest.approx(expected.item(), rel=1e-5)
    assert len(quality.values["perceptual"][0]) == 4


@pytest.mark.parametrize("form", ["[B, B]", "[1, B]", "[B - 1]", "a list"])
def test_anything_else_is_refused(form: str) -> None:
    with pytest.raises(ShapeError, match=r"one number for the 4 images, or one an image in a tensor \[4\]"):
        Quality().compare(drawn(1), ORIGINALS, Gives(form))
