"""The report against what the written files say, computed here by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mergevq.data.folder import ImageFolder
from mergevq.data.images import read_images, write_images
from mergevq.errors import ConfigError, DataError, ShapeError
from mergevq.evaluation.reconstruction import evaluate_reconstruction
from mergevq.metrics.distribution import frechet_distance, kernel_distance
from mergevq.tokenizer.config import MergingConfig, RecoveryConfig, TokenizerConfig
from mergevq.tokenizer.model import MergeVQ


class Corners(nn.Module):
    """Features of an image: the mean colour of each quarter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class MeanDifference(nn.Module):
    def forward(self, reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return (reconstruction - image).abs().mean()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven PNG files of 32 x 32 smooth, different images."""
    coarse = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    write_images(tmp_path / "images", nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(-1, 1))
    return tmp_path / "images"


def _pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), dtype=np.float64) for path in sorted(folder.iterdir())])


def test_psnr_bits_and_codebook_agree_with_the_written_files(
    tiny_tokenizer: MergeVQ, folder: Path, tmp_path: Path
) -> None:
    ran: list[int] = []
    with tiny_tokenizer.encoder.stem.register_forward_hook(lambda _, images, __: ran.append(len(images[0]))):
        report = evaluate_reconstruction(tiny_tokenizer, folder, (20, 64), network=None)
    assert sum(ran) == len(list(folder.iterdir())), "what comes before attention runs once for all K"
    assert [row.num_tokens for row in report.rows] == [64, 20]
    images = read_images(folder, 32)
    for row in report.rows:
        tokens = tiny_tokenizer.encode(images, row.num_tokens)
        write_images(tmp_path / f"{row.num_tokens}", tiny_tokenizer.decode(tokens))
        squared = ((_pixels(folder) - _pixels(tmp_path / f"{row.num_tokens}")) ** 2).mean((1, 2, 3))
        psnr = 10 * np.log10(255**2 / squared)
        assert row.psnr.mean == pytest.approx(psnr.mean(), abs=1e-9)
        assert row.psnr.std == pytest.approx(psnr.std(), abs=1e-9)
        assert (row.bits_index, row.bits_source) == (row.num_tokens * 6, 64 * math.ceil(math.log2(row.num_tokens)))
        rows = [set(index.tolist()) for index in tokens.index]
        assert row.distinct_tokens == pytest.approx(np.mean([len(indices) for indices in rows]))
        assert row.codebook_used == len(set.union(*rows)) and row.codebook_size == 64
        bits = (tokens.index[..., None] >> torch.arange(6)) & 1
        np.testing.assert_allclose(row.bit_balance, bits.double().mean((0, 1)))
        assert row.encode_per_second > 0 and row.decode_per_second > 0
        assert row.perceptual is None and row.frechet is None and row.kernel is None


def test_means_do_not_depend_on_the_batch_size(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    def measure(batch_size: int) -> list[float | None]:
        report = evaluate_reconstruction(
            tiny_tokenizer, folder, (30,), network=Corners(), perceptual=MeanDifference(), batch_size=batch_size
        )
        row = report.rows[0]
        assert row.ssim is not None
        return [row.psnr.mean, row.ssim.mean, row.perceptual, row.frechet, row.kernel]

    torch.testing.assert_close(measure(7), measure(3), rtol=1e-4, atol=1e-6)


def test_distances_are_those_between_the_files(tiny_tokenizer: MergeVQ, folder: Path, tmp_path: Path) -> None:
    network = Corners()
    report = evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=network, perceptual=MeanDifference())
    images = read_images(folder, 32)
    write_images(tmp_path / "back", tiny_tokenizer.reconstruct(images, 20))
    back = read_images(tmp_path / "back", 32)
    row = report.rows[0]
    assert row.frechet == pytest.approx(frechet_distance(network(images), network(back)), rel=1e-5)
    assert row.kernel == pytest.approx(kernel_distance(network(images), network(back), paired=True), rel=1e-4)
    assert row.perceptual == pytest.approx((back - images).abs().mean().item(), rel=1e-5)
    assert report.protocol["network"]["name"] == "Corners" and len(report.protocol["network"]["sha256"]) == 64
    assert report.protocol["perceptual"]["name"] == "MeanDifference"
    assert report.distance_names() == ("FD-Corners", "KD-Corners")
    assert report.reference is not None and report.reference.images == 3
    again = evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=network)
    other = evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=network, seed=1)
    assert report.reference == again.reference != other.reference


def test_examples_are_what_was_encoded_and_decoded(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    report = evaluate_reconstruction(tiny_tokenizer, folder, (20, 40), network=None, examples=3, batch_size=2)
    images = read_images(folder, 32)
    assert len(report.examples) == 3
    for example, number in zip(report.examples, (0, 2, 4), strict=True):
        torch.testing.assert_close(example.original, images[number])
        for k in (20, 40):
            tokens = tiny_tokenizer.encode(images[number][None], k)
            assert tokens.source is not None
            assert torch.equal(example.source_index[k], tokens.source.index[0])
            torch.testing.assert_close(
                example.reconstruction[k], tiny_tokenizer.decode(tokens)[0].clamp(-1, 1), atol=0.005, rtol=0
            )


def test_copies_have_no_distance_and_one_k_is_enough(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    images = iter(read_images(folder, 32).split(2))
    tiny_tokenizer.decode = lambda tokens: next(images)  # type: ignore[method-assign]
    report = evaluate_reconstruction(tiny_tokenizer, folder, 20, network=Corners(), batch_size=2)
    row = report.rows[0]
    assert row.num_tokens == 20 and row.psnr.mean == math.inf
    assert row.kernel == 0 and row.frechet == pytest.approx(0, abs=1e-9)
    assert "floor" not in str(report).lower() and "different images of the same kind" in str(report)


def test_one_image_has_no_distances_and_says_so(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    report = evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=Corners(), limit=1)
    assert report.protocol["images"] == 1 and report.protocol["images_available"] == 7
    assert report.rows[0].frechet is None and report.rows[0].kernel is None and report.reference is None
    assert any("at least 2 images, got 1" in note for note in report.notes)
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["rows"][0]["frechet"] is None
    assert written["rows"][0]["psnr"] == {"mean": report.rows[0].psnr.mean, "std": 0.0}
    three = evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=Corners(), limit=3)
    assert three.rows[0].frechet is not None and three.reference is None
    assert any("needs at least 4 images, got 3" in note for note in three.notes)


def test_unreadable_images_are_counted_and_left_out(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    (folder / "0003.png").write_bytes(b"not an image")
    report = evaluate_reconstruction(tiny_tokenizer, ImageFolder(folder), (20,), network=None)
    assert (report.protocol["images"], report.protocol["images_unreadable"]) == (6, 1)
    assert any("1 of 7 images could not be read" in note for note in report.notes)


def test_small_images_have_no_ssim(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    report = evaluate_reconstruction(tiny_tokenizer, folder, (2,), network=None, size=8)
    assert report.rows[0].ssim is None and report.grid == (2, 2)
    assert any("SSIM needs images of at least 11" in note for note in report.notes)


def test_the_tokenizer_keeps_its_mode_and_its_own_k_is_the_default(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    tiny_tokenizer.train()
    report = evaluate_reconstruction(tiny_tokenizer, folder, network=None)
    assert tiny_tokenizer.training
    assert [row.num_tokens for row in report.rows] == [20]


def test_a_converted_tokenizers_rows_tell_what_it_keeps(tiny_config: TokenizerConfig, folder: Path) -> None:
    # Two layers, each at most half: of 64 patches 16 are left at least, whatever is asked for.
    merging = MergingConfig(overflow="clip", order="merge")
    torch.manual_seed(0)
    tok = MergeVQ(replace(tiny_config, merging=merging, recovery=RecoveryConfig(enabled=False)))
    kept = {k: tok.encode(read_images(folder, 32), k).index.shape[1] for k in (1, 2, 60)}
    assert kept[1] == kept[2] == 16 and kept[60] == 60
    report = evaluate_reconstruction(tok, folder, (1, 60, 2), network=None, examples=1)
    assert [row.num_tokens for row in report.rows] == [60, 16]
    assert [row.bits_index for row in report.rows] == [60 * 6, 16 * 6]
    assert set(report.examples[0].reconstruction) == {60, 16}
    assert "Asked for 2 tokens, this tokenizer keeps 16." in report.notes


def test_the_embedded_images_are_the_held_out_ones(tiny_tokenizer: MergeVQ) -> None:
    done: list[int] = []
    report = evaluate_reconstruction(
        tiny_tokenizer, "embedded", (20,), network=None, limit=5, batch_size=2, on_images=done.append
    )
    assert report.protocol["data"] == "embedded" and done == [2, 2, 1]


def test_bad_input_is_refused(tiny_tokenizer: MergeVQ, folder: Path, tmp_path: Path) -> None:
    for k in (0, 65):
        with pytest.raises(ShapeError, match=rf"{k}"):
            evaluate_reconstruction(tiny_tokenizer, folder, (k,), network=None)
    with pytest.raises(ShapeError, match="multiple of the tokenizer's downsampling 4, got 30"):
        evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=None, size=30)
    with pytest.raises(ConfigError, match="limit of at least 1"):
        evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=None, limit=0)
    for examples in (-1, 65):
        with pytest.raises(ConfigError, match=rf"0\.\.64 examples, .*, got {examples}"):
            evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=None, examples=examples)
    with pytest.raises(ConfigError, match="lite9"):
        evaluate_reconstruction(tiny_tokenizer, folder, (20,), network="lite9")
    with pytest.raises(DataError, match="nothing"):
        evaluate_reconstruction(tiny_tokenizer, tmp_path / "nowhere", (20,), network=None)
    with torch.no_grad():
        next(tiny_tokenizer.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(ShapeError, match="finite"):
        evaluate_reconstruction(tiny_tokenizer, folder, (20,), network=None)
