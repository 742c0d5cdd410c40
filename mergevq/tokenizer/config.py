"""What a tokenizer is made of. Plain frozen dataclasses: importing them loads no torch.

`TokenizerConfig` checks itself and says what would be right; `mergevq.configuration` carries it through model files.
"""

from dataclasses import dataclass, field
from typing import Literal

from mergevq.configuration import check_types
from mergevq.errors import ConfigError


@dataclass(frozen=True)
class EncoderConfig:
    kind: Literal["hybrid", "vit"] = "hybrid"
    """hybrid: convolutions, then attention with merging (G, G+R). vit: patches straight into attention (R)."""
    channels: int = 64
    """Width of the first convolution (hybrid)."""
    multipliers: tuple[int, ...] = (1, 1, 2, 4, 8)
    """Width of each level as a multiple of `channels`, finest level first (hybrid)."""
    blocks: tuple[int, ...] = (4, 4, 4, 4, 4)
    """Residual blocks in each level, finest level first (hybrid)."""
    stem_stride: int = 1
    """Stride of the first convolution; 2 makes small models several times cheaper (hybrid)."""
    patch_size: int = 16
    """Side of a patch in pixels (vit)."""
    vit_width: int = 768
    """Token width (vit); a hybrid's is channels * multipliers[-1]."""
    depth: int = 12
    """Attention blocks; tokens are merged inside each of them."""
    heads: int = 8
    """Attention heads."""
    position: Literal["none", "sincos"] = "none"
    """Position embedding of the patches. A hybrid has its convolutions; a vit without one cannot tell patches apart."""

    @property
    def width(self) -> int:
        return self.channels * self.multipliers[-1] if self.kind == "hybrid" else self.vit_width

    @property
    def downsampling(self) -> int:
        return self.stem_stride * 2 ** (len(self.multipliers) - 1) if self.kind == "hybrid" else self.patch_size


@dataclass(frozen=True)
class MergingConfig:
    schedule: Literal["linear", "constant", "squared"] = "linear"
    """How the merges are spread over the attention blocks."""
    overflow: Literal["carry", "clip"] = "carry"
    """What happens when a block is asked to merge more than half: carry hits K exactly, clip drops the rest (the
    release).
    """
    order: Literal["raster", "merge"] = "raster"
    """Order of the kept tokens: by first raster position, or as merging leaves them (the release)."""


@dataclass(frozen=True)
class QuantizerConfig:
    norm: Literal["none", "layer"] = "none"
    """Normalisation right before the sign: layer is a LayerNorm without parameters."""
    temperature: float = 0.01
    """Softness of the bit probabilities in the entropy terms; no effect on the codes."""
    scope: Literal["global", "local", "grouped"] = "global"
    """Codebook entropy over all processes' tokens, this process's, or as the sum over bit groups (an upper bound)."""
    groups: tuple[int, ...] = (9, 9)
    """Bits of each group, used by scope grouped."""
    eps: float = 0.0
    """Added inside the logarithm of the codebook entropy; the release uses 1e-5."""


@dataclass(frozen=True)
class DecoderConfig:
    channels: int = 64
    """Width of the finest level."""
    multipliers: tuple[int, ...] = (1, 1, 2, 4, 8)
    """Width of each level as a multiple of `channels`, finest level first."""
    blocks: tuple[int, ...] = (4, 5, 5, 5, 5)
    """Residual blocks in each level, finest level first."""
    output_stride: int = 1
    """Pixels drawn at once by the last convolution; mirrors the encoder's `stem_stride`."""
    upsample: Literal["shuffle", "nearest"] = "shuffle"
    """shuffle: convolution to four times the channels and depth-to-space. nearest: repeat, then convolve (no dot
    texture).
    """
    depth: int = 12
    """Attention blocks with a depth-wise convolution in their MLP."""
    heads: int = 8
    """Attention heads."""

    @property
    def width(self) -> int:
        return self.channels * self.multipliers[-1]

    @property
    def downsampling(self) -> int:
        return self.output_stride * 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class RecoveryConfig:
    enabled: bool = True
    """Whether the model can predict the source map from the codes."""
    width: int = 384
    """Token width."""
    cross_depth: int = 2
    """Blocks in which the L queries read the K codes."""
    self_depth: int = 2
    """Blocks in which the queries read one another."""
    heads: int = 8
    """Attention heads."""


@dataclass(frozen=True)
class AlignmentConfig:
    enabled: bool = True
    """Whether the class token has a head that predicts a teacher's output."""
    head: Literal["two", "three"] = "three"
    """Linear layers in the head: two (with a LayerNorm between) or three."""
    teacher_dim: int = 768
    """Width of the teacher's output, or the number of classes when labels are the target."""
    blocks: int = 0
    """Attention blocks between the encoder and the head."""
    view_tokens: Literal["fraction", "all", "same_count"] = "fraction"
    """Kept tokens of the view that is aligned: the same fraction as of the full image, all (it is never merged), or
    what the same number of merges leaves (the release).
    """


@dataclass(frozen=True)
class TokenizerConfig:
    """A complete description of a tokenizer; `MergeVQ(config)` builds it."""

    image_size: int = 256
    """Side of the training images in pixels; other sizes that the downsampling divides work too."""
    num_bits: int = 18
    """Bits per token; the codebook has 2**num_bits entries."""
    num_tokens: int = 144
    """Kept tokens when the caller does not say."""
    num_groups: int = 32
    """Groups of every GroupNorm."""
    layer_scale: float = 1e-5
    """Initial scale of the residual branches of attention blocks."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    merging: MergingConfig = field(default_factory=MergingConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)

    @property
    def downsampling(self) -> int:
        """Pixels per side of one patch."""
        return self.encoder.downsampling

    @property
    def num_patches(self) -> int:
        """L, the patches of an image of `image_size`."""
        return (self.image_size // self.downsampling) ** 2

    def __post_init__(self) -> None:
        check_types(self)
        enc, dec, rec = self.encoder, self.decoder, self.recovery
        _check_sizes(self)
        _require(
            min(rec.cross_depth, rec.self_depth + 1) >= 1,
            f"recovery needs at least one cross block and no negative number of self blocks, got {rec.cross_depth} "
            f"and {rec.self_depth}",
        )
        clips = self.merging.overflow == "clip"
        _require(
            not (clips and rec.enabled),
            "merging.overflow must be carry with recovery: with clip, K is not known beforehand",
        )
        _require(
            clips or self.alignment.view_tokens != "same_count",
            "alignment.view_tokens must be fraction or all with merging.overflow carry: a smaller view may have fewer "
            "patches than are merged",
        )
        _require(enc.stem_stride in (1, 2), f"encoder.stem_stride must be 1 or 2, got {enc.stem_stride}")
        _require(dec.output_stride in (1, 2), f"decoder.output_stride must be 1 or 2, got {dec.output_stride}")
        _require(1 <= self.num_bits <= 30, f"num_bits must be 1..30, got {self.num_bits}")
        for name, part in (("encoder", enc), ("decoder", dec)):
            if name == "decoder" or enc.kind == "hybrid":
                _require(
                    len(part.blocks) == len(part.multipliers),
                    f"{name}.blocks and {name}.multipliers need one entry a level, got {len(part.blocks)} and "
                    f"{len(part.multipliers)}",
                )
                _require(min(part.blocks) >= 1, f"{name}.blocks must be at least 1 in each level, got {part.blocks}")
            for width in _normalised_widths(part):
                _require(
                    width % self.num_groups == 0,
                    f"{name} widths must be multiples of num_groups {self.num_groups}, got {width}",
                )
            _require(
                part.width % part.heads == 0, f"{name} width {part.width} must be a multiple of its {part.heads} heads"
            )
            _require(part.width % 4 == 0, f"{name} width {part.width} must be a multiple of 4")
            _require(part.depth >= 1, f"{name}.depth must be at least 1, got {part.depth}")
        _require(
            enc.downsampling == dec.downsampling,
            f"encoder and decoder must have the same downsampling, got {enc.downsampling} and {dec.downsampling}",
        )
        _require(
            self.image_size > 0 and self.image_size % enc.downsampling == 0,
            f"image_size must be a multiple of the downsampling {enc.downsampling}, got {self.image_size}",
        )
        _require(
            1 <= self.num_tokens <= self.num_patches,
            f"num_tokens must be 1..{self.num_patches} (image_size {self.image_size}, downsampling "
            f"{enc.downsampling}), got {self.num_tokens}",
        )
        _require(
            self.quantizer.temperature > 0, f"quantizer.temperature must be positive, got {self.quantizer.temperature}"
        )
        _require(
            self.quantizer.scope != "grouped" or sum(self.quantizer.groups) == self.num_bits,
            f"quantizer.groups must sum to num_bits {self.num_bits}, got {self.quantizer.groups}",
        )
        _require(
            not self.recovery.enabled or self.recovery.width % (4 * self.recovery.heads) == 0,
            f"recovery.width must be a multiple of 4 * heads, got {self.recovery.width}",
        )


def _check_sizes(config: TokenizerConfig) -> None:
    """Checks what others are divided by, or multiplied with, before they are."""
    enc, dec = config.encoder, config.decoder
    sizes = {
        "num_groups": config.num_groups,
        "encoder.heads": enc.heads,
        "decoder.heads": dec.heads,
        "decoder.channels": dec.channels,
        "recovery.heads": config.recovery.heads,
        "recovery.width": config.recovery.width,
        "alignment.teacher_dim": config.alignment.teacher_dim,
    }
    levels = {"decoder.multipliers": dec.multipliers}
    if enc.kind == "hybrid":
        sizes["encoder.channels"] = enc.channels
        levels["encoder.multipliers"] = enc.multipliers
    else:
        sizes |= {"encoder.vit_width": enc.vit_width, "encoder.patch_size": enc.patch_size}
    for name, size in sizes.items():
        _require(size >= 1, f"{name} must be at least 1, got {size}")
    for name, multipliers in levels.items():
        _require(
            min(multipliers, default=0) >= 1,
            f"{name} must be at least 1 in each of one or more levels, got {multipliers}",
        )
    _require(config.alignment.blocks >= 0, f"alignment.blocks must be at least 0, got {config.alignment.blocks}")


def _normalised_widths(part: EncoderConfig | DecoderConfig) -> list[int]:
    """Returns the widths that a part has group norms of."""
    if isinstance(part, EncoderConfig):
        # The first convolution of a hybrid is followed by a norm of its own width, whatever the first multiplier is.
        return [part.vit_width] if part.kind == "vit" else [part.channels * m for m in (1, *part.multipliers)]
    return [part.channels * m for m in part.multipliers]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
