"""Which training images generated ones resemble: by features and by pixels, one by one and as a share."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mergevq.data.folder import ImageFolder
from mergevq.data.images import center_square, to_tensor
from mergevq.data.loader import evaluation_batches
from mergevq.evaluation.generation_pass import in_order
from mergevq.evaluation.generation_result import Neighbour
from mergevq.metrics.neighbours import Nearest, nearest

CLOSE = 0.05
"""Quantile of the training images' distances to their nearest other one, below which an image counts as close."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """The training images with what their distances are judged by."""

    images: ImageFolder
    side: int
    """Pixels; their middle squares are resized to it."""
    numbers: tuple[int, ...]
    """Of each image that could be read, in `images`."""
    features: Float[Tensor, "n D"] | None
    """None without a feature network."""

    @staticmethod
    def of(images: ImageFolder, side: int, found: Mapping[str, Tensor]) -> "TrainingSet":
        """Returns the set of the images that were looked at.

        Args:
            images: all of them.
            side: pixels.
            found: what `Worker.look` returned.
        """
        if "number" not in found:
            return TrainingSet(images, side, (), None)
        number, features = in_order(found, "number", "features")
        return TrainingSet(images, side, tuple(number.tolist()), features if "features" in found else None)

    @cached_property
    def threshold(self) -> float | None:
        """The distance below which an image counts as close; None without features, or of fewer than two images."""
        if self.features is None or len(self.features) < 2:
            return None
        apart = nearest(self.features, self.features, same=True).distance[:, 0].sort().values
        return float(apart[int(CLOSE * len(apart))])

    def nearest(self, features: Float[Tensor, "m D"]) -> Nearest | None:
        """Returns the closest training image of each image, as its place in `numbers`; None without features."""
        return None if self.features is None else nearest(features, self.features)

    def share_close(self, found: Nearest | None) -> float | None:
        """Returns the share of images that are no farther from a training image than the threshold."""
        if found is None or self.threshold is None:
            return None
        return float((found.distance[:, 0] <= self.threshold).double().mean())

    def by_features(self, found: Nearest | None, query: int) -> Neighbour | None:
        """Returns the image that `nearest` found for a query."""
        if found is None:
            return None
        return self.neighbour(self.numbers[int(found.index[query, 0])], float(found.distance[query, 0]))

    def neighbour(self, number: int, distance: float) -> Neighbour:
        """Returns training image `number`, read again."""
        sample = self.images.read(number)
        return Neighbour(sample.name, distance, to_tensor(center_square(sample.image, self.side)))

    def nearest_in_pixels(
        self, pixels: UInt8[Tensor, "m 3 H W"], batch_size: int, limit: int | None = None
    ) -> list[tuple[int, float]]:
        """Returns number and root mean squared difference (0 to 255) of the closest training image of each image.

        Args:
            pixels: images in bytes, of this set's size.
            batch_size: training images read at a time.
            limit: look at so many training images, evenly spread; None takes all.
        """
        # In float64 the sums of squared bytes are exact.
        queries = pixels.flatten(1).double()
        least = torch.full((len(queries),), torch.inf, dtype=torch.float64)
        closest = torch.zeros(len(queries), dtype=torch.int64)
        for batch in evaluation_batches(self.images, self.side, batch_size=batch_size, limit=limit):
            points = ((batch["image"] + 1) * 127.5).round().flatten(1).double()
            lengths = queries.square().sum(1)[:, None] + points.square().sum(1)
            squared = (lengths - 2 * queries @ points.T).clamp_min(0).min(1)
            nearer = squared.values < least
            least = torch.where(nearer, squared.values, least)
            closest = torch.where(nearer, batch["number"][squared.indices], closest)
        apart = (least / queries.shape[1]).sqrt()
        return list(zip(closest.tolist(), apart.tolist(), strict=True))
