"""What probes look at: features of the tokenizer, and what they are compared with under the same protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mergevq.errors import ConfigError, ShapeError
from mergevq.layers.teachers import Teacher
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.features import FeatureKind, check_features
from mergevq.tokenizer.model import MergeVQ

SourceName = Literal["tokenizer", "random", "teacher", "pixels"]


@dataclass(frozen=True)
class FeatureSetting:
    """The features of one row of a result."""

    source: SourceName
    """tokenizer; random: the same configuration with random weights; teacher; pixels."""
    kind: FeatureKind | None = None
    """Of a tokenizer, random or not."""
    num_tokens: int | None = None
    """K; L merges nothing. None without tokens."""
    merged: bool = False
    """Whether K is less than L."""
    quantized: bool = False
    """Codes instead of semantic tokens."""

    def arrays(self) -> tuple[str, ...]:
        """Returns the stored arrays that lie side by side in these features."""
        if self.kind is None:
            return (self.source,)
        mean = "codes" if self.quantized else "mean"
        parts = {"class": ("class",), "mean": (mean,), "class+mean": ("class", mean)}[self.kind]
        return tuple(f"{self.source}.{self.num_tokens}.{part}" for part in parts)

    def name(self) -> str:
        """Returns what to call them."""
        if self.kind is None:
            return {"pixels": "pixels", "teacher": "teacher"}[self.source]
        class_token, mean = "class token", "mean of tokens"
        kind = {"class": class_token, "mean": mean, "class+mean": f"{class_token} + {mean}"}[self.kind]
        if self.quantized:
            kind = kind.replace("tokens", "codes")
        start = "random weights, " if self.source == "random" else ""
        return f"{start}{kind}, K = {self.num_tokens}"


def feature_settings(
    source: SourceName, counts: Sequence[int], num_patches: int, kinds: Sequence[str], quantized: Sequence[bool]
) -> list[FeatureSetting]:
    """Returns every kind at every K, before and after quantization as asked for; the class token has no quantized form.

    Args:
        source: the tokenizer, or random weights.
        counts: each K.
        num_patches: L.
        kinds: of features, one vector an image.
        quantized: whether to take codes; one answer or both.

    Raises:
        ConfigError: a kind is no vector, or nothing is left to look at.
    """
    for kind in kinds:
        check_features(kind, False)
        if kind == "patches":
            raise ConfigError(
                "expected features of kind class, mean or class+mean, got patches: a probe sees one vector an image"
            )
    found = [
        FeatureSetting(source, cast(FeatureKind, kind), count, count < num_patches, coded)
        for count in counts
        for kind in dict.fromkeys(kinds)
        for coded in sorted(set(quantized))
        if not (coded and kind == "class")
    ]
    if not found:
        raise ConfigError(
            "expected a kind of features to look at, got none: the class token has no quantized form, ask for mean"
        )
    return found


@runtime_checkable
class FeatureSource(Protocol):
    """Gives named arrays of a batch of images, one row an image."""

    def facts(self) -> dict[str, Any]:
        """Returns what identifies it in a result, "fingerprint" among it."""

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]: ...


class TokenizerFeatures:
    """Class token, mean of the tokens and mean of the codes at each K, as far as settings ask for them.

    Args:
        tok: in evaluation mode.
        settings: rows of this source.
        seed: of the weights, if they are random.
    """

    def __init__(self, tok: MergeVQ, settings: Sequence[FeatureSetting], seed: int | None = None) -> None:
        self.tok, self.seed, self.source = tok, seed, settings[0].source
        self._wanted: dict[int, set[str]] = {}
        for setting in settings:
            assert setting.num_tokens is not None
            parts = {name.rsplit(".", 1)[1] for name in setting.arrays()}
            self._wanted.setdefault(setting.num_tokens, set()).update(parts)

    def facts(self) -> dict[str, Any]:
        """Returns fingerprint and sizes."""
        facts = {"fingerprint": self.tok.fingerprint(), "width": self.tok.config.encoder.width}
        return {**facts, "num_bits": self.tok.config.num_bits, **({} if self.seed is None else {"seed": self.seed})}

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """Runs what comes before attention once, and attention once for each K."""
        embedded = self.tok.embed(images)
        found: dict[str, Tensor] = {}
        for count, parts in self._wanted.items():
            pooled = self.tok.pool_embedded(embedded, count)
            rows = {"class": pooled.class_token, "mean": pooled.mean, "codes": pooled.codes}
            found |= {f"{self.source}.{count}.{part}": rows[part] for part in sorted(parts)}
        return found


class PixelFeatures:
    """Images averaged down to a small square, as one vector.

    Args:
        side: pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def facts(self) -> dict[str, Any]:
        """Returns how pixels become features."""
        return {"fingerprint": f"area {self.side}", "side": self.side, "width": 3 * self.side**2, "resized": "area"}

    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """Averages equal areas."""
        return {"pixels": F.interpolate(images, (self.side, self.side), mode="area").flatten(1)}


class TeacherFeatures:
    """The output of another network.

    Args:
        teacher: resizes and normalises by itself.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def facts(self) -> dict[str, Any]:
        """Returns name, checksum of the weights, and what is done to images first."""
        teacher = self.teacher
        return {
            "name": teacher.name,
            "fingerprint": teacher.checksum(),
            "preprocessing": teacher.preprocessing(),
        }

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        """Runs it.

        Raises:
            ShapeError: it does not give one vector an image.
        """
        out: Tensor = self.teacher(images)
        if out.ndim != 2 or len(out) != len(images):
            raise ShapeError(f"expected a teacher that gives one vector an image, [B, D], got {list(out.shape)}")
        return {"teacher": out}


def random_tokenizer(config: TokenizerConfig, seed: int) -> MergeVQ:
    """Returns a tokenizer as it is before training.

    Args:
        config: what it is.
        seed: of its weights. The global random state is put back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MergeVQ(config).eval()
