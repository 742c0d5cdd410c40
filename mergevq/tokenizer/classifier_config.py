"""What a classifier is made of, as a frozen dataclass. No torch is imported here."""

from dataclasses import dataclass, field
from typing import Literal

from mergevq.configuration import check_types
from mergevq.errors import ConfigError
from mergevq.tokenizer.config import TokenizerConfig

PooledFeatures = Literal["class", "mean", "class+mean"]
"""The kinds of features that are one vector an image; see `mergevq.tokenizer.features.FeatureKind`."""


@dataclass(frozen=True)
class ClassifierConfig:
    """A complete description of a classifier; `Classifier(config)` builds it."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Of the tokenizer whose encoder it began with; only what shapes the encoder is used."""
    features: PooledFeatures = "class"
    """What is classified by: class token, mean of the semantic tokens by size, or both."""
    image_size: int = 256
    """Side in pixels of the images it was trained on."""
    num_tokens: int = 256
    """K it was trained with, and takes if it is told none; L of `image_size` merges nothing."""
    class_names: tuple[str, ...] = ("0", "1")
    """In the order of the logits."""
    began_as: str = ""
    """Fingerprint of the tokenizer whose encoder it began with."""

    @property
    def num_patches(self) -> int:
        """L, the patches of an image of `image_size`."""
        return (self.image_size // self.tokenizer.downsampling) ** 2

    @property
    def width(self) -> int:
        """Numbers in the features of an image."""
        return self.tokenizer.encoder.width * (2 if self.features == "class+mean" else 1)

    def __post_init__(self) -> None:
        check_types(self)
        step = self.tokenizer.downsampling
        if self.image_size < step or self.image_size % step:
            raise ConfigError(
                f"image_size must be a multiple of the tokenizer's downsampling {step}, got {self.image_size}"
            )
        if not 1 <= self.num_tokens <= self.num_patches:
            raise ConfigError(
                f"num_tokens must lie in 1..{self.num_patches} (image_size {self.image_size}, downsampling {step}), "
                f"got {self.num_tokens}"
            )
        if len(self.class_names) < 2:
            raise ConfigError(f"expected at least two class_names, got {len(self.class_names)}")
