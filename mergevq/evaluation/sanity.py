"""What every metric says of images whose quality is known: a scale to read its numbers by."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mergevq.configuration import check_seed
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import evaluation_batches
from mergevq.data.sources import evaluation_images
from mergevq.errors import ConfigError
from mergevq.evaluation.generation_measure import NEIGHBOURS, inception_score_of
from mergevq.evaluation.protocol import PREPARATION, data_name, hardware, precision, versions
from mergevq.evaluation.reconstruction import halves, perceptual_facts
from mergevq.evaluation.sanity_result import ROWS, SanityReport, SanityRow
from mergevq.evaluation.tally import Quality
from mergevq.losses.perceptual import build_perceptual
from mergevq.metrics.distribution import FeatureSet, frechet_distance, kernel_distance
from mergevq.metrics.features import FeatureNetwork, feature_network
from mergevq.metrics.image import to_uint8
from mergevq.metrics.neighbours import precision_recall

MOST_IMAGES = 500
"""Images looked at by default, at most."""

NOISE = 16
"""Standard deviation of the noise, of 255 steps."""

_BLUR = 64  # The blur's sigma is the image's side divided by this.


def evaluate_sanity(
    data: str | Path | ImageFolder,
    size: int,
    *,
    network: str | nn.Module | None = "lite1",
    perceptual: str | nn.Module | None = None,
    limit: int | None = MOST_IMAGES,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_images: Callable[[int], None] | None = None,
) -> SanityReport:
    """Returns what the metrics say of the originals themselves, shuffled, blurred, noised, and of two halves of them.

    PSNR, SSIM and the perceptual distance compare images one by one; Fréchet and kernel distance, inception score,
    precision and recall look at sets. The kernel distance takes the i-th image for the partner of the i-th, as with
    reconstructions, but for the two halves.

    Args:
        data: a folder, a .zip, a pattern that names several .zip files, "embedded", or a data set. Of a source with
            parts, the held-out part.
        size: side in pixels.
        network: of the features, as for `evaluate_reconstruction`; None leaves out all that needs them.
        perceptual: likewise.
        limit: look at so many images, evenly spread; None takes all.
        batch_size: images at a time.
        device: where to compute; the networks are moved there.
        seed: of the order, of the noise, and of the halves, which are those of `evaluate_reconstruction`.
        on_images: called after each batch with its number of images.

    Raises:
        ConfigError: `limit`, `batch_size` or `seed` is out of range, or there is no such network.
        DataError: the images are missing, or none can be read.
        MissingDependencyError, CheckpointError: a network cannot be had.
    """
    check_seed(seed)
    if limit is not None and limit < 1:
        raise ConfigError(f"expected a limit of at least 1 image, got {limit}")
    images, place = evaluation_images(data), torch.device(device)
    features = None if network is None else feature_network(network).to(place)
    distance = build_perceptual(perceptual) if isinstance(perceptual, str) else perceptual
    distance = None if distance is None else distance.to(place).eval()
    total = min(len(images), limit or len(images))
    # In random order, so that the image before is any other one and not the next of its class.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = images.select([i * len(images) // total for i in order])
    sigma = size / _BLUR
    run = _Pass(features, distance, sigma, torch.Generator().manual_seed(seed))
    workers = 2 if total > 256 else 0
    for batch in evaluation_batches(chosen, size, batch_size=batch_size, workers=workers):
        run.measure(batch["image"].to(place), torch.tensor(order)[batch["number"]])
        if on_images is not None:
            on_images(len(batch["image"]))
    run.close()
    protocol = {
        "data": data_name(data, images),
        "images": run.seen,
        "images_unreadable": total - run.seen,
        "images_available": len(images),
        "fingerprint": images.fingerprint(),
        "image_size": size,
        "preparation": PREPARATION,
        "rounding": "blurred and noised images clamped to [-1, 1] and rounded to bytes",
        "blur_sigma": sigma,
        "noise_sigma": NOISE,
        "network": None
        if features is None
        else {"name": features.name, "sha256": features.checksum, "classifier_sha256": features.classifier_checksum},
        "perceptual": None if distance is None else perceptual_facts(perceptual, distance),
        "precision_recall_neighbours": NEIGHBOURS,
        "precision": precision(place),
        "batch_size": batch_size,
        "seed": seed,
        "hardware": hardware(place),
        "versions": versions(),
    }
    rows = run.rows(seed)
    return SanityReport(rows, protocol, _notes(rows, run.seen, total, features))


class _Pass:
    """The pass over the images."""

    def __init__(
        self, network: FeatureNetwork | None, perceptual: nn.Module | None, sigma: float, rng: torch.Generator
    ) -> None:
        self.network, self.perceptual, self.sigma, self.rng = network, perceptual, sigma, rng
        self.found = {name: Quality() for name in ROWS[:-1]}
        self.places: list[Tensor] = []
        self.first: Tensor | None = None
        self.before: Tensor | None = None

    @property
    def seen(self) -> int:
        return sum(map(len, self.places))

    @torch.no_grad()
    def measure(self, images: Float[Tensor, "B 3 H W"], places: Int[Tensor, " B"]) -> None:
        originals = to_uint8(images)
        noise = torch.randn(images.shape, generator=self.rng).to(images.device) * (NOISE / 127.5)
        drawn = {
            "identical": originals,
            "blurred": to_uint8(gaussian_blur(images, self.sigma)),
            "noised": to_uint8(images + noise),
        }
        for name, pixels in drawn.items():
            self.found[name].compare(pixels, originals, self.perceptual)
            self.found[name].look(pixels, self.network)
        if self.before is None:
            self.first = originals[:1]
            self._shuffled(originals[:-1], originals[1:])
        else:
            self._shuffled(torch.cat([self.before, originals[:-1]]), originals)
        self.before = originals[-1:]
        self.places.append(places)

    @torch.no_grad()
    def close(self) -> None:
        """Compares the first image with the last, so that each one was compared with another."""
        if self.first is not None and self.before is not None and self.seen > 1:
            self._shuffled(self.before, self.first)

    def _shuffled(self, drawn: UInt8[Tensor, "B 3 H W"], originals: UInt8[Tensor, "B 3 H W"]) -> None:
        if len(drawn):
            self.found["shuffled"].compare(drawn, originals, self.perceptual)

    def rows(self, seed: int) -> tuple[SanityRow, ...]:
        """Returns what the metrics say, of each set of images that there are enough of."""
        features = self._features()
        rows = []
        for name, quality in self.found.items():
            if not quality.values:  # Of one image there is no other.
                continue
            means: dict[str, Any] = {what: quality.mean(what) for what in quality.values}
            sets = self._compare(features.get("identical"), features.get(name), paired=True)
            rows.append(SanityRow(name, self.seen, **means, **sets, psnr_perfect=quality.perfect))
        if features and self.seen >= 4:
            a, b = halves(features["identical"], seed)
            sets = self._compare(a, b, paired=False)
            rows.append(SanityRow("halves", len(a), **sets))
        return tuple(rows)

    def _features(self) -> dict[str, Tensor]:
        """Of each set, in the order of the data set, by whose places its halves are drawn."""
        if self.network is None:
            return {}
        back = torch.cat(self.places).argsort()
        found = {name: of.features.features for name, of in self.found.items() if name != "shuffled"}
        return {name: rows[back] for name, rows in {**found, "shuffled": found["identical"].roll(1, 0)}.items()}

    def _compare(self, a: Tensor | None, b: Tensor | None, *, paired: bool) -> dict[str, Any]:
        """The metrics of sets, as far as there are enough images."""
        found: dict[str, Any] = {}
        if a is None or b is None:
            return found
        if len(a) >= 2:
            one, other = FeatureSet(a), FeatureSet(b)
            found["frechet"] = frechet_distance(one, other)
            found["kernel"] = kernel_distance(one, other, paired=paired)
        if len(a) > NEIGHBOURS:
            found["precision"], found["recall"] = precision_recall(a, b, NEIGHBOURS)
        found["inception_score"] = inception_score_of(self.network, b)
        return found


def gaussian_blur(images: Float[Tensor, "B C H W"], sigma: float) -> Float[Tensor, "B C H W"]:
    """Returns blurred images, mirrored at their edges; the window reaches to three sigma.

    Args:
        images: of at least 2 x 2 pixels.
        sigma: in pixels.
    """
    radius = min(max(1, math.ceil(3 * sigma)), min(images.shape[-2:]) - 1)
    position = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    window = torch.exp(-(position**2) / (2 * sigma**2))
    window = window / window.sum()
    planes = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[:, None]
    rows = F.conv2d(planes, window[None, None, :, None])
    return F.conv2d(rows, window[None, None, None, :])[:, 0].unflatten(0, images.shape[:2])


def _notes(rows: Sequence[SanityRow], seen: int, total: int, network: FeatureNetwork | None) -> tuple[str, ...]:
    notes = []
    copies = [f"{row.psnr_perfect:,} {row.name}" for row in rows if row.psnr_perfect and row.name != "identical"]
    if copies:
        notes.append(f"PSNR is a mean over the images that differ from their originals; equal are {', '.join(copies)}.")
    if seen < total:
        notes.append(f"{total - seen} of {total} images could not be read and were left out.")
    if network is not None and seen < 4:
        notes.append(f"Distances need at least 2 images, two halves at least 4, got {seen}.")
    if network is not None and seen >= 2:
        notes.append(
            "The kernel distance takes image number i of one side for the partner of number i of the other, so that "
            "copies are exactly 0 apart; shuffling takes the partners apart and costs it a little."
        )
    return tuple(notes)
