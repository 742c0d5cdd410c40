"""What is gathered at one K over the images, and the row that comes of it."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mergevq.evaluation.result import PredictedSource, ReconstructionRow, Spread
from mergevq.metrics.codebook import CodebookUsage
from mergevq.metrics.distribution import FeatureSet, FeatureStore, frechet_distance, kernel_distance
from mergevq.metrics.features import FeatureNetwork
from mergevq.metrics.image import WINDOW, psnr, ssim


class Quality:
    """How near images decoded in one way come to the originals."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}
        """Per image, one tensor a batch."""
        self.features = FeatureStore()

    def add(self, **values: Tensor) -> None:
        """Adds named numbers of some images, one an image."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach().cpu().double())

    def compare(
        self, drawn: UInt8[Tensor, "B 3 H W"], originals: UInt8[Tensor, "B 3 H W"], perceptual: nn.Module | None
    ) -> None:
        """Adds what `drawn` is worth beside `originals`, image by image.

        Args:
            drawn: bytes.
            originals: bytes.
            perceptual: a distance of (image, image); None leaves it out.
        """
        self.add(psnr=psnr(drawn, originals))
        if min(originals.shape[-2:]) >= WINDOW:
            self.add(ssim=ssim(drawn, originals))
        if perceptual is not None:
            # A mean over the batch, so that the mean over all images comes out right with one entry an image.
            mean: Tensor = perceptual(to_float(drawn), to_float(originals))
            self.add(perceptual=mean.reshape(1).expand(len(originals)))

    def look(self, drawn: UInt8[Tensor, "B 3 H W"], network: FeatureNetwork | None) -> None:
        """Adds the features of images; without a network there are none."""
        if network is not None:
            self.features.update(network(drawn))

    def mean(self, name: str) -> float:
        """Returns the mean over all images."""
        return float(torch.cat(self.values[name]).mean())

    def spread(self, name: str) -> Spread:
        """Returns the mean and the deviation over all images."""
        values = torch.cat(self.values[name])
        return Spread(float(values.mean()), float(values.std(correction=0)))

    def fields(self, originals: FeatureSet | None) -> dict[str, Any]:
        """Returns what `ReconstructionRow` and `PredictedSource` both say.

        Args:
            originals: features of the originals; None leaves the distances out.
        """
        mine = None if originals is None else FeatureSet(self.features.features)
        return {
            "psnr": self.spread("psnr"),
            "ssim": self.spread("ssim") if "ssim" in self.values else None,
            "perceptual": self.mean("perceptual") if "perceptual" in self.values else None,
            "frechet": None if originals is None or mine is None else frechet_distance(originals, mine),
            "kernel": None if originals is None or mine is None else kernel_distance(originals, mine, paired=True),
        }


class Tally:
    """What is gathered at one K."""

    def __init__(self, num_tokens: int, num_bits: int, predict_source: bool) -> None:
        self.num_tokens = num_tokens
        self.codebook = CodebookUsage(num_bits)
        self.known = Quality()
        self.predicted = Quality() if predict_source else None
        self.seconds: list[tuple[int, float, float]] = []
        """Images, encoding and decoding time of each batch."""

    def row(self, originals: FeatureSet | None) -> ReconstructionRow:
        """Returns the means over all images; without features of the originals, no distances."""
        # The first batch pays for memory and kernels that later ones reuse.
        timed = self.seconds[1:] or self.seconds
        images = sum(count for count, _, _ in timed)
        predicted = None
        if self.predicted is not None:
            predicted = PredictedSource(accuracy=self.predicted.mean("accuracy"), **self.predicted.fields(originals))
        return ReconstructionRow(
            num_tokens=self.num_tokens,
            bits_index=self.known.mean("bits_index"),
            bits_source=self.known.mean("bits_source"),
            **self.known.fields(originals),
            distinct_tokens=self.known.mean("distinct"),
            codebook_used=self.codebook.distinct,
            codebook_size=2**self.codebook.num_bits,
            bit_balance=tuple(self.codebook.bit_balance().tolist()),
            encode_per_second=images / sum(encode for _, encode, _ in timed),
            decode_per_second=images / sum(decode for _, _, decode in timed),
            predicted=predicted,
        )


def to_float(pixels: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Returns bytes as numbers in [-1, 1]."""
    return pixels.float() / 127.5 - 1
