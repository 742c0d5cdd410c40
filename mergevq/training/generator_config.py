"""Everything the training of a generator depends on, as frozen dataclasses. No torch is imported here."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from mergevq.errors import ConfigError
from mergevq.generator.config import GeneratorConfig
from mergevq.training.config import (
    FREE_FIELDS,
    DataConfig,
    LoopConfig,
    OptimConfig,
    Run,
    check_num_tokens,
    check_probabilities,
    check_run,
)


@dataclass(frozen=True)
class GeneratorLossConfig:
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all values of a bit group; in training only."""


@dataclass(frozen=True)
class TokenDataConfig(DataConfig):
    tokens: str = ""
    """Token cache to train on, from `mergevq cache-tokens`. Empty encodes the images of `train` as they come, which
    needs `tokenizer`.
    """
    val_tokens: str = ""
    """Token cache of held-out images; needed with `tokens`."""
    tokenizer: str = ""
    """The tokenizer that made the tokens: a file, a run's folder, a hub id. It draws the samples; without it there are
    no pictures.
    """
    train: str = ""
    """Images to encode as they come: a folder, a .zip, a pattern of them, or embedded."""


@dataclass(frozen=True)
class GeneratorLoopConfig(LoopConfig):
    num_tokens: tuple[int, ...] = ()
    """Numbers of kept tokens to draw from: one draw a sample from a cache, one a micro-batch if images are encoded as
    they come. Empty takes all of the cache's, or the model's own.
    """
    num_tokens_probs: tuple[float, ...] = ()
    """Their probabilities; empty is uniform."""
    val_num_tokens: tuple[int, ...] = ()
    """Numbers of kept tokens in validation; empty takes the one nearest to the model's own."""
    sample_classes: int = 8
    """Rows of the picture of samples at each validation; 0 draws none. Without classes there is one row."""
    sample_images: int = 6
    """Samples of each class in that picture."""
    sample_guidance: float = 2.0
    """Guidance of those samples."""


def _generator_optim() -> OptimConfig:
    return OptimConfig(lr=4e-4, betas=(0.9, 0.95), weight_decay=0.05, clip_norm=1.0, ema_decay=0.9999)


@dataclass(frozen=True)
class GeneratorRun(Run):
    """A complete description of a generator's training; `train_generator(run, out)` runs it.

    What the tokens decide (grid, bits, classes, which K) need not be right: `fit_model` puts it in.
    """

    kind: ClassVar[str] = "generator-run/1"
    free_fields: ClassVar[tuple[str, ...]] = (
        *FREE_FIELDS,
        "loop.val_num_tokens",
        "loop.sample_classes",
        "loop.sample_images",
        "loop.sample_guidance",
        "data.tokens",
        "data.val_tokens",
        "data.tokenizer",
    )

    model: GeneratorConfig = field(default_factory=GeneratorConfig)
    loss: GeneratorLossConfig = field(default_factory=GeneratorLossConfig)
    data: TokenDataConfig = field(default_factory=TokenDataConfig)
    optim: OptimConfig = field(default_factory=_generator_optim)
    loop: GeneratorLoopConfig = field(default_factory=GeneratorLoopConfig)

    def __post_init__(self) -> None:
        check_run(self)
        if not 0 <= self.loss.label_smoothing < 1:
            raise ConfigError(f"loss.label_smoothing must lie in 0..1, below 1, got {self.loss.label_smoothing}")
        for name in ("sample_classes", "sample_images", "sample_guidance"):
            if getattr(self.loop, name) < 0:
                raise ConfigError(f"loop.{name} must be at least 0, got {getattr(self.loop, name)}")
        if self.data.tokens and self.data.train:
            raise ConfigError("expected data.tokens (a cache) or data.train (images), got both: leave one out")
        check_probabilities(self.loop.num_tokens, self.loop.num_tokens_probs)


class TokenFacts(NamedTuple):
    """What tokens decide about a run. A `TokenCache` has the same attributes."""

    grid: tuple[int, int]
    num_bits: int
    num_classes: int
    class_names: tuple[str, ...]
    tokenizer: str
    """Its fingerprint."""
    num_tokens: tuple[int, ...]
    """Every K there is."""


def fit_model(run: GeneratorRun, facts: TokenFacts | Any) -> GeneratorRun:
    """Returns the run with everything filled in that its tokens decide; a run fitted before is returned as it is.

    Bit groups that are the usual ones for the run's bits become the usual ones for the tokens', and a mask's window of
    one row of the run's grid becomes a row of the tokens' grid.

    Args:
        run: what is asked for.
        facts: a `TokenCache`, or the same facts of tokens that are made as they are needed.

    Raises:
        ConfigError: bit groups of one's own do not fit the tokens, or a K is asked for that there is not.
    """
    model, loop = run.model, run.loop
    groups = model.groups
    if sum(groups) != facts.num_bits:
        if groups != usual_groups(model.num_bits):
            near = " ".join(map(str, usual_groups(facts.num_bits)))
            raise ConfigError(
                f"expected model.groups that sum to the tokens' {facts.num_bits} bits, got {groups}: "
                f"use others, {near} for example"
            )
        groups = usual_groups(facts.num_bits)
    counts = loop.num_tokens or facts.num_tokens
    missing = [k for k in counts if k not in facts.num_tokens]
    if missing:
        known = ", ".join(map(str, facts.num_tokens))
        raise ConfigError(
            f"expected loop.num_tokens among the {known} that were encoded, got {missing[0]}: encode the images again"
        )
    # A K of probability 0 is not trained.
    probs = loop.num_tokens_probs or (1.0,) * len(counts)
    drawn = sorted(k for k, p in zip(counts, probs, strict=True) if p > 0)
    check_num_tokens("loop.num_tokens", counts, facts.grid[0] * facts.grid[1])
    own = drawn[len(drawn) // 2]
    if drawn[0] <= model.num_tokens <= drawn[-1]:  # Within, but perhaps not one of them; of two as near the smaller.
        own = min(drawn, key=lambda k: (abs(k - model.num_tokens), k))
    mask = model.mask
    if mask.recent == model.grid[1]:
        mask = replace(mask, recent=facts.grid[1])
    model = replace(
        model,
        mask=mask,
        grid=facts.grid,
        num_bits=facts.num_bits,
        groups=groups,
        num_classes=facts.num_classes,
        class_names=facts.class_names,
        num_tokens=own,
        trained_num_tokens=(drawn[0], drawn[-1]),
        tokenizer=facts.tokenizer,
    )
    val = loop.val_num_tokens or (own,)
    check_num_tokens("loop.val_num_tokens", val, model.num_patches)
    return replace(run, model=model, loop=replace(loop, num_tokens=counts, val_num_tokens=val))


def usual_groups(num_bits: int) -> tuple[int, ...]:
    """Returns the bit groups of the paper for 18 bits, two halves otherwise, and the bit itself for one."""
    if num_bits == 18:
        return 6, 12
    half = num_bits // 2
    return (half, num_bits - half) if half else (num_bits,)
