"""What is gathered at one K over the images, and the row that comes of it."""

import math
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mergevq.errors import ShapeError
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

        Raises:
            ShapeError: that gives neither one number for the batch nor one an image.
        """
        self.add(psnr=psnr(drawn, originals))
        if min(originals.shape[-2:]) >= WINDOW:
            self.add(ssim=ssim(drawn, originals))
        if perceptual is not None:
            self.add(perceptual=one_an_image(perceptual(to_float(drawn), to_float(originals)), len(originals)))

    def look(self, drawn: UInt8[Tensor, "B 3 H W"], network: FeatureNetwork | None) -> None:
        """Adds the features of images; without a network there are none."""
        if network is not None:
            self.features.update(network(drawn))

    @property
    def perfect(self) -> int:
        """Images that are equal to their originals, whose PSNR is infinite."""
        return int(torch.cat(self.values["psnr"]).isinf().sum())

    def mean(self, name: str) -> float:
        """Returns the mean over all images; of PSNR over those that are no perfect copies, infinite if all are."""
        return float(self._counted(name).mean())

    def spread(self, name: str) -> Spread:
        """Returns the mean and the deviation over the images that `mean` counts; infinite and 0 if none differs."""
        values = self._counted(name)
        mean = float(values.mean())
        return Spread(mean, 0.0 if math.isinf(mean) else float(values.std(correction=0)))

    def _counted(self, name: str) -> Tensor:
        values = torch.cat(self.values[name])
        # One perfect copy would make the mean of all infinite.
        return values[~values.isinf()] if name == "psnr" and self.perfect < len(values) else values

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
            "psnr_perfect": self.perfect,
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
            codebook_perplexity=self.codebook.perplexity(),
            bit_balance=tuple(self.codebook.bit_balance().tolist()),
            encode_per_second=images / sum(encode for _, encode, _ in timed),
            decode_per_second=images / sum(decode for _, _, decode in timed),
            predicted=predicted,
        )


def one_an_image(distances: Any, images: int) -> Float[Tensor, " B"]:
    """Returns what a perceptual module gave as one number an image; a mean over the batch stands for each of them.

    Args:
        distances: a tensor [], [1], [B] or [B, 1, 1, 1].
        images: B.

    Raises:
        ShapeError: they are anything else.
    """
    shape = list(distances.shape) if isinstance(distances, Tensor) else None
    if shape is None or math.prod(shape) not in (1, images) or math.prod(shape[1:]) != 1:
        raise ShapeError(
            f"expected of the perceptual module one number for the {images} images, or one an image in a tensor "
            f"[{images}] or [{images}, 1, 1, 1], got {type(distances).__name__ if shape is None else shape}"
        )
    return distances.reshape(-1).expand(images)


def to_float(pixels: UInt8[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Returns bytes as numbers in [-1, 1]."""
    return pixels.float() / 127.5 - 1
