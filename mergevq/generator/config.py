"""What a generator is made of, as frozen dataclasses that check themselves. No torch is imported here."""

from dataclasses import dataclass, field
from typing import Literal

from mergevq.configuration import check_types
from mergevq.errors import ConfigError


@dataclass(frozen=True)
class MaskConfig:
    """Which earlier tokens the row of token t sees, besides the prefix."""

    recent: int | None = 2
    """R: tokens t-R .. t-1 are always seen. None is plain causal attention (LlamaGen), in which nothing is dropped."""
    keep: Literal["first", "last"] = "first"
    """Of older tokens with equal index only the first is seen, as in the paper, or only the last."""
    proportional: bool = False
    """Add log c to the key of an older token, c the number of older tokens with its index."""
    duplicate: Literal["index", "source"] = "index"
    """When two tokens count as equal in training: equal codebook index, as in sampling, or merged into one token."""

    def __post_init__(self) -> None:
        if self.recent is not None and self.recent < 1:
            raise ConfigError(f"expected mask.recent of at least 1, or None for plain causal, got {self.recent}")
        if self.recent is None and (self.proportional or self.keep != "first" or self.duplicate != "index"):
            raise ConfigError(
                "expected mask.recent beside other mask settings, got None, which drops nothing: leave them at their "
                "defaults"
            )


@dataclass(frozen=True)
class GeneratorConfig:
    """A complete description of a generator; `MergeAR(config)` or `RandomAR(config)` builds it."""

    order: Literal["raster", "random"] = "raster"
    """raster: all L patches, one after the other (MergeAR). random: the K kept tokens in any order (RandomAR)."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of the tokenizer's patch grid; L is their product."""
    num_bits: int = 18
    """Bits of a codebook index."""
    groups: tuple[int, ...] = (6, 12)
    """Bits predicted one group after the other, the lowest bits first; their sum is `num_bits`."""
    num_classes: int = 1000
    """0 is unconditional."""
    class_names: tuple[str, ...] = ()
    """Names that `generate` takes besides numbers; empty, or one for each class."""
    num_tokens: int = 144
    """K that `generate` asks for unless told otherwise."""
    trained_num_tokens: tuple[int, int] = (1, 1_000_000)
    """Smallest and largest K of the training samples; `generate` warns outside."""
    tokenizer: str | None = None
    """Fingerprint of the tokenizer whose tokens it was trained on."""
    width: int = 768
    depth: int = 12
    """Blocks over positions."""
    group_depth: int = 2
    """Blocks over the bit groups of one position."""
    heads: int = 12
    kv_heads: int = 0
    """Heads of keys and values; 0 is as many as `heads`."""
    ffn_multiple: int = 256
    """The feed-forward width is 8/3 of `width`, rounded up to a multiple of this."""
    norm_eps: float = 1e-5
    rotary_base: float = 10_000.0
    prefix_position: Literal["identity", "zero"] = "identity"
    """Rotation of class and instruction: none, or (converted models) queries and keys become 0."""
    instruction: bool = True
    """Put a token that tells the wanted K behind the class."""
    token_dropout: float = 0.1
    """Of what enters the first block."""
    dropout: float = 0.1
    """Of what each attention and feed-forward layer adds."""
    class_dropout: float = 0.1
    """Share of training samples that see the null class, for guidance."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Raster order only."""

    def __post_init__(self) -> None:
        check_types(self)
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ConfigError(f"expected grid to be rows and columns, both at least 1, got {self.grid}")
        if not self.groups or min(self.groups) < 1 or sum(self.groups) != self.num_bits:
            raise ConfigError(
                f"expected groups of at least 1 bit that sum to num_bits {self.num_bits}, got {self.groups}"
            )
        if max(self.groups) > 16:
            raise ConfigError(f"expected groups of at most 16 bits, each is one softmax, got {self.groups}")
        for name in ("width", "depth", "heads", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise ConfigError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.num_classes < 0 or self.group_depth < 0 or self.kv_heads < 0:
            raise ConfigError("expected num_classes, group_depth and kv_heads of at least 0")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ConfigError(
                f"expected width / heads to be a multiple of 4 (two axes of rotated pairs), got {self.width} and "
                f"{self.heads}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(f"expected kv_heads to divide heads {self.heads}, got {self.kv_heads}")
        for name in ("token_dropout", "dropout", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"expected {name} in 0..1, below 1, got {getattr(self, name)}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ConfigError(f"expected {self.num_classes} class_names, got {len(self.class_names)}")
        if not 1 <= self.num_tokens <= self.num_patches:
            raise ConfigError(f"expected num_tokens in 1..{self.num_patches}, got {self.num_tokens}")
        if self.order == "random" and not self.instruction:
            raise ConfigError("expected instruction for order random: it has to know K")

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix_length(self) -> int:
        """Slots before the tokens: class, and instruction if there is one."""
        return 2 if self.instruction else 1

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def ffn_width(self) -> int:
        """Hidden channels of a feed-forward layer: `int(8/3 width)` rounded up to a multiple of `ffn_multiple`."""
        hidden = int(2 * 4 * self.width / 3)
        return -(-hidden // self.ffn_multiple) * self.ffn_multiple
