"""What a probe sees of an image: the class token, and the semantic tokens or their codes, pooled or on the grid."""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mergevq.errors import ConfigError
from mergevq.merging import SourceMap, unmerge

FeatureKind = Literal["class", "mean", "class+mean", "patches"]
"""class: the class token as the attention stack leaves it, before the alignment head [B, D]. mean: the tokens, each
weighted by its size, so that every patch counts the same [B, D]. class+mean: both side by side, the class token first
[B, 2 D]. patches: the tokens copied to their patches, for dense tasks [B, D, rows, columns]."""


class PooledFeatures(NamedTuple):
    """One vector an image of every kind that a probe takes apart."""

    class_token: Float[Tensor, "B D"]
    mean: Float[Tensor, "B D"]
    codes: Float[Tensor, "B N"]
    """The mean of the codes, -1 or +1, by size."""


def check_features(kind: str, quantized: bool) -> None:
    """Checks that there are such features.

    Raises:
        ConfigError: there is no such kind, or it has no quantized form.
    """
    if kind not in get_args(FeatureKind):
        raise ConfigError(f"expected features of kind {', '.join(get_args(FeatureKind))}, got {kind!r}")
    if quantized and kind == "class":
        raise ConfigError(
            "expected quantized features of kind mean, class+mean or patches, got class: the class token is never "
            "quantized"
        )


def choose_features(
    kind: FeatureKind,
    class_token: Float[Tensor, "B D"],
    tokens: Float[Tensor, "B K C"],
    source: Int[Tensor, "B L"],
    grid: tuple[int, int],
) -> Float[Tensor, "B F *grid"]:
    """Returns the features of a kind; differentiable.

    Args:
        kind: which.
        class_token: as the attention stack leaves it.
        tokens: semantic tokens, or their codes.
        source: kept token of each patch.
        grid: rows and columns of patches.
    """
    if kind == "class":
        return class_token
    if kind == "patches":
        return unmerge(tokens, source).mT.unflatten(2, grid)
    num_patches = source.shape[1]
    sizes = SourceMap(source, source.new_full((source.shape[0],), tokens.shape[1])).sizes(tokens.shape[1])
    mean = (tokens * sizes[..., None]).sum(1) / num_patches
    return mean if kind == "mean" else torch.cat([class_token, mean], 1)
