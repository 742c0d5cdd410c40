"""From the features and tokens of generated and real images to the numbers of a report."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.errors import DataError
from mergevq.evaluation.generation_pass import in_order
from mergevq.evaluation.generation_result import GenerationRow, ReferenceRow, Setting
from mergevq.evaluation.result import Spread
from mergevq.evaluation.training_neighbours import TrainingSet
from mergevq.metrics.distribution import FeatureSet, frechet_distance, kernel_distance
from mergevq.metrics.features import FeatureNetwork
from mergevq.metrics.inception import inception_score
from mergevq.metrics.neighbours import Manifold, Nearest, precision_recall

NEIGHBOURS = 3
"""k of precision and recall."""

_BLOCK = 4096  # Rows that the classifier is given at a time.


class Measure:
    """Compares sets of generated images with the reference.

    Args:
        seen: what `Worker.look` found in the reference, of all processes.
        counts: each K whose distinct tokens were counted there.
        training: the training images; None looks for none.
        training_is_reference: they are the reference images.
        network: of the features; None leaves all that needs them out.
    """

    def __init__(
        self,
        seen: Mapping[str, Tensor],
        counts: Sequence[int],
        training: TrainingSet | None,
        training_is_reference: bool,
        network: FeatureNetwork | None,
    ) -> None:
        self.images = len(seen.get("number", ()))
        self.training, self.network = training, network
        self._seen, self._counts, self._training_is_reference = seen, counts, training_is_reference

    @cached_property
    def _features(self) -> Tensor | None:
        return in_order(self._seen, "features")[0] if self.network is not None else None

    @cached_property
    def _set(self) -> FeatureSet | None:
        return None if self._features is None or self.images < 2 else FeatureSet(self._features)

    @cached_property
    def _manifold(self) -> Manifold | None:
        return None if self._features is None or self.images <= NEIGHBOURS else Manifold(self._features, NEIGHBOURS)

    def row(self, setting: Setting, made: Mapping[str, Tensor]) -> tuple[GenerationRow, Nearest | None]:
        """Returns what was measured in a setting, and the training image closest to each generated one.

        Args:
            setting: what was generated with.
            made: what `Worker.generate` found, of all processes.
        """
        distinct, length = (values.double() for values in in_order(made, "distinct", "length"))
        features = in_order(made, "features")[0] if self.network is not None else None
        found = None if features is None or self.training is None else self.training.nearest(features)
        frechet, kernel, precision, recall = self._against_reference(features)
        process, images, cache = made["batch"].double().T
        generating, decoding = made["seconds"].T
        row = GenerationRow(
            setting=setting,
            frechet=frechet,
            kernel=kernel,
            inception_score=inception_score_of(self.network, features),
            precision=precision,
            recall=recall,
            close_to_training=None if self.training is None else self.training.share_close(found),
            distinct_tokens=_spread(distinct),
            duplicate_rate=float((1 - distinct / length).mean()),
            cache_bytes=int(cache.max()),
            cache_bytes_per_image=float((cache / images).max()),
            generate_per_second=_rate(process, images, generating),
            decode_per_second=_rate(process, images, decoding),
            seconds=max(float((generating + decoding)[process == p].sum()) for p in process.unique()),
        )
        return row, found

    def reference_row(self, num_images: int, seed: int) -> ReferenceRow:
        """Returns the same of two random halves of the reference; the inception score is of as many as were generated.

        Args:
            num_images: generated; a half is no larger.
            seed: of the halves, and of the images of the inception score.

        Raises:
            DataError: no reference image could be read.
        """
        if not self.images:
            raise DataError("expected readable reference images, all of them are broken")
        half = min(self.images // 2, num_images)
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed))
        frechet = kernel = precision = recall = None
        if self._features is not None:
            a, b = self._features[order[:half]], self._features[order[half : 2 * half]]
            if half >= 2:
                frechet, kernel = frechet_distance(a, b), kernel_distance(a, b)
            if half > NEIGHBOURS:
                precision, recall = precision_recall(a, b, NEIGHBOURS)
        close = None
        if self.training is not None and self._features is not None and not self._training_is_reference:
            close = self.training.share_close(self.training.nearest(self._features))
        scored = order[: min(self.images, num_images)].sort().values
        distinct = in_order(self._seen, "distinct", by="encoded")[0].T if "encoded" in self._seen else ()
        return ReferenceRow(
            images=half,
            frechet=frechet,
            kernel=kernel,
            inception_score=inception_score_of(
                self.network, None if self._features is None else self._features[scored]
            ),
            precision=precision,
            recall=recall,
            close_to_training=close,
            distinct_tokens={k: _spread(values.double()) for k, values in zip(self._counts, distinct, strict=False)},
            inception_images=len(scored),
        )

    def _against_reference(
        self, features: Float[Tensor, "n D"] | None
    ) -> tuple[float | None, float | None, float | None, float | None]:
        """Fréchet distance, kernel distance, precision, recall."""
        frechet = kernel = precision = recall = None
        if features is not None and self._set is not None and len(features) >= 2:
            mine = FeatureSet(features)
            frechet, kernel = frechet_distance(self._set, mine), kernel_distance(self._set, mine)
        if features is not None and self._manifold is not None and len(features) > NEIGHBOURS:
            precision, recall = precision_recall(self._manifold, Manifold(features, NEIGHBOURS))
        return frechet, kernel, precision, recall


def inception_score_of(network: FeatureNetwork | None, features: Float[Tensor, "n D"] | None) -> float | None:
    """Returns the inception score of images with these features; None without features or a classifier of them."""
    if features is None or network is None or network.classifier is None:
        return None
    place = next(network.classifier.parameters()).device
    return inception_score(torch.cat([network.logits(part.to(place)).cpu() for part in features.split(_BLOCK)]))


def _rate(process: Tensor, images: Tensor, seconds: Tensor) -> float:
    """Images a second of all processes together."""
    total = 0.0
    for p in process.unique():
        mine = (process == p).nonzero()[:, 0]
        # The first batch pays for memory and kernels that later ones reuse.
        timed = mine[1:] if len(mine) > 1 else mine
        total += float(images[timed].sum() / seconds[timed].sum())
    return total


def _spread(values: Tensor) -> Spread:
    return Spread(float(values.mean()), float(values.std(correction=0)))
