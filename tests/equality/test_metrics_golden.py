"""Metrics against the release's golden values and against independent implementations."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mergevq.metrics.distribution import frechet_distance, kernel_distance
from mergevq.metrics.image import psnr, ssim

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "golden" / "metrics.safetensors")
IMAGES, ORIGINALS = (GOLDEN[name].permute(0, 3, 1, 2) for name in ("img.rec", "img.gt"))


def skimage_ssim(a, b, **options):
    return structural_similarity(a.numpy(), b.numpy(), data_range=255, channel_axis=-1, **options)


def test_frechet_distance():
    assert frechet_distance(GOLDEN["fid.A"], GOLDEN["fid.B"]) == pytest.approx(GOLDEN["fid.value"].item(), rel=1e-7)


def test_psnr():
    torch.testing.assert_close(psnr(IMAGES, ORIGINALS), GOLDEN["psnr.per_image"], rtol=1e-7, atol=0)
    for i in range(3):
        expected = peak_signal_noise_ratio(ORIGINALS[i].numpy(), IMAGES[i].numpy(), data_range=255)
        assert psnr(IMAGES[i : i + 1], ORIGINALS[i : i + 1]).item() == pytest.approx(expected, rel=1e-9)


def test_ssim_is_skimages_with_a_gaussian_window():
    for i, score in enumerate(ssim(IMAGES, ORIGINALS).tolist()):
        a, b = GOLDEN["img.rec"][i], GOLDEN["img.gt"][i]
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        assert score == pytest.approx(skimage_ssim(a, b, **options), abs=1e-9)
        # The release's definition differs (uniform 7 x 7): the golden value is skimage's default, not ours.
        assert skimage_ssim(a, b) == pytest.approx(GOLDEN["ssim.per_image"][i].item(), abs=1e-7)
        assert score != pytest.approx(GOLDEN["ssim.per_image"][i].item(), abs=1e-4)


def test_kernel_distance_is_the_definition():
    a, b = GOLDEN["fid.A"][:40].numpy(), GOLDEN["fid.B"][:25].numpy()

    def kernel(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    within_a = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
    within_b = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
    between = [kernel(x, y) for x in a for y in b]
    expected = np.mean(within_a) + np.mean(within_b) - 2 * np.mean(between)
    ours = kernel_distance(GOLDEN["fid.A"][:40], GOLDEN["fid.B"][:25], block=7)
    assert ours == pytest.approx(expected, rel=1e-9)
