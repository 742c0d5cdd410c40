"""What a predicted source map costs, against the decoder's own answers computed here by hand."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mergevq.data.images import read_images, write_images
from mergevq.errors import CheckpointError
from mergevq.evaluation.reconstruction import evaluate_reconstruction
from mergevq.metrics.distribution import frechet_distance, kernel_distance
from mergevq.metrics.image import psnr, to_uint8
from mergevq.tokenizer.model import MergeVQ


class Corners(nn.Module):
    """Features of an image: the mean colour of each quarter."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class Oracle(nn.Module):
    """A recovery that knows the answer."""

    def __init__(self, source: torch.Tensor) -> None:
        super().__init__()
        self.source = source

    def forward(self, codes: torch.Tensor, num_tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return nn.functional.one_hot(self.source, codes.shape[1]).float()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five PNG files of 32 x 32 smooth, different images."""
    coarse = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    write_images(tmp_path / "images", nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(-1, 1))
    return tmp_path / "images"


def test_the_predicted_part_is_what_decoding_without_the_map_gives(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    network = Corners()
    plain = evaluate_reconstruction(tiny_tokenizer, folder, (20, 10), network=network)
    report = evaluate_reconstruction(
        tiny_tokenizer, folder, (20, 10), network=network, predict_source=True, examples=5, batch_size=2
    )
    images = read_images(folder, 32)
    for row, before in zip(report.rows, plain.rows, strict=True):
        assert before.predicted is None and row.predicted is not None
        tokens = tiny_tokenizer.encode(images, row.num_tokens)
        guess = tiny_tokenizer.recover(tokens)
        assert guess.source is not None and tokens.source is not None
        drawn = to_uint8(tiny_tokenizer.decode(tokens.without_source()))
        quality = psnr(drawn, to_uint8(images)).double()
        assert row.predicted.psnr.mean == pytest.approx(quality.mean().item(), abs=1e-4)
        assert row.predicted.psnr.std == pytest.approx(quality.std(correction=0).item(), abs=1e-4)
        assert row.predicted.psnr != row.psnr
        features = [network(pixels.float() / 127.5 - 1) for pixels in (to_uint8(images), drawn)]
        assert row.predicted.frechet == pytest.approx(frechet_distance(*features), rel=1e-4)
        assert row.predicted.kernel == pytest.approx(kernel_distance(*features, paired=True), rel=1e-3)
        right = [
            [tokens.index[b, guess.source.index[b, p]] == tokens.index[b, tokens.source.index[b, p]] for p in range(64)]
            for b in range(5)
        ]
        assert row.predicted.accuracy == pytest.approx(torch.tensor(right).double().mean().item())
        for i, example in enumerate(report.examples):
            assert torch.equal(example.predicted_index[row.num_tokens], guess.source.index[i])
            # Batches of another size round otherwise.
            expected = drawn[i].float() / 127.5 - 1
            torch.testing.assert_close(example.predicted[row.num_tokens], expected, atol=1.01 / 127.5, rtol=0)
    assert len(report.protocol["recovery"]) == 64 and plain.protocol["recovery"] is None


def test_a_recovery_that_is_right_loses_nothing(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    tokens = tiny_tokenizer.encode(read_images(folder, 32), 20)
    assert tokens.source is not None
    tiny_tokenizer.recovery = Oracle(tokens.source.index)  # type: ignore[assignment]
    (row,) = evaluate_reconstruction(tiny_tokenizer, folder, 20, network=Corners(), predict_source=True).rows
    assert row.predicted is not None and row.predicted.accuracy == 1
    assert (row.predicted.psnr, row.predicted.frechet, row.predicted.kernel) == (row.psnr, row.frechet, row.kernel)


def test_without_merging_the_identity_is_right(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    (row,) = evaluate_reconstruction(tiny_tokenizer, folder, 64, network=None, predict_source=True).rows
    assert row.predicted is not None and row.predicted.accuracy == 1 and row.predicted.psnr == row.psnr


def test_table_json_and_page_show_both(tiny_tokenizer: MergeVQ, folder: Path, tmp_path: Path) -> None:
    report = evaluate_reconstruction(
        tiny_tokenizer, folder, (20, 10), network=None, predict_source=True, limit=3, examples=2
    )
    text = str(report)
    assert text.count("with predicted source") == 2, "below PSNR and SSIM, and where nothing was measured no line"
    row = report.rows[0]
    assert row.predicted is not None and f"{row.predicted.accuracy:.3f}" in text
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["rows"][0]["predicted"]["psnr"]["mean"] == row.predicted.psnr.mean
    report.write_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    # The plot, and per example an original and at each K twice a picture with its map.
    assert page.count("<img ") == 1 + 2 * (1 + 2 * 2 * 2)
    assert "<b>K = 20, source predicted</b>" in page


def test_a_tokenizer_without_recovery_is_refused(tiny_tokenizer: MergeVQ, folder: Path) -> None:
    tiny_tokenizer.recovery = None
    with pytest.raises(CheckpointError, match=r"recovery model.*mergevq train recovery"):
        evaluate_reconstruction(tiny_tokenizer, folder, 20, network=None, predict_source=True)
