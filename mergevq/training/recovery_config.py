"""Everything the training of recovery depends on, as frozen dataclasses. No torch is imported here."""

from dataclasses import dataclass, field
from typing import ClassVar

from mergevq.errors import ConfigError
from mergevq.tokenizer.config import RecoveryConfig
from mergevq.training.config import FREE_FIELDS, LoopConfig, OptimConfig, Run, check_probabilities, check_run


@dataclass(frozen=True)
class RecoveryDataConfig:
    tokenizer: str = ""
    """The tokenizer whose recovery is trained: a file, a run's folder, or a hub id. It stays as it is."""
    tokens: str = ""
    """Token cache to train on, which `mergevq cache-tokens` wrote with this tokenizer."""
    val_tokens: str = ""
    """Token cache of held-out images."""


@dataclass(frozen=True)
class RecoveryLoopConfig(LoopConfig):
    num_tokens: tuple[int, ...] = ()
    """Numbers of kept tokens to draw from, one draw for each image; empty takes all of the cache's below L."""
    num_tokens_probs: tuple[float, ...] = ()
    """Their probabilities; empty is uniform."""
    val_num_tokens: tuple[int, ...] = ()
    """Numbers of kept tokens in validation and in pictures; empty takes all of the held-out cache's below L."""


def _recovery_optim() -> OptimConfig:
    return OptimConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01, clip_norm=1.0)


@dataclass(frozen=True)
class RecoveryRun(Run):
    """A complete description of a recovery's training; `train_recovery(run, out)` runs it."""

    kind: ClassVar[str] = "recovery-run/1"
    free_fields: ClassVar[tuple[str, ...]] = (
        *FREE_FIELDS,
        "loop.val_num_tokens",
        "data.tokenizer",
        "data.tokens",
        "data.val_tokens",
    )

    fine_tune: bool = True
    """Go on from the tokenizer's own recovery, whatever its shape, if it has one; off trains a new one instead."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    """Shape of a new recovery."""
    data: RecoveryDataConfig = field(default_factory=RecoveryDataConfig)
    optim: OptimConfig = field(default_factory=_recovery_optim)
    loop: RecoveryLoopConfig = field(default_factory=RecoveryLoopConfig)

    def __post_init__(self) -> None:
        check_run(self)
        if not self.recovery.enabled:
            raise ConfigError("expected recovery.enabled to train a recovery, got false: leave it on")
        for name in ("num_tokens", "val_num_tokens"):
            counts = getattr(self.loop, name)
            if counts and min(counts) < 1:
                raise ConfigError(f"loop.{name} must be at least 1, got {min(counts)}")
        if self.loop.num_tokens:
            check_probabilities(self.loop.num_tokens, self.loop.num_tokens_probs)
        elif self.loop.num_tokens_probs:
            raise ConfigError("expected loop.num_tokens with loop.num_tokens_probs, got none: name the K they are of")
