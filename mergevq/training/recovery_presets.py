"""The presets of recovery: what `presets.recovery` finds."""

from collections.abc import Callable

from mergevq.tokenizer.config import RecoveryConfig
from mergevq.training.config import OptimConfig
from mergevq.training.recovery_config import RecoveryLoopConfig, RecoveryRun

# One epoch of ImageNet-1K at a batch of 256.
_EPOCH = 5_005


def _paper() -> RecoveryRun:
    """Five epochs at 1e-4 after the first stage, batch 256 on 8 GPUs."""
    return RecoveryRun(
        recovery=RecoveryConfig(),
        optim=OptimConfig(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01, warmup_steps=1_000, clip_norm=1.0),
        loop=RecoveryLoopConfig(
            steps=5 * _EPOCH, batch_size=32, val_every=_EPOCH, val_images=5_000, save_every=1_000, precision="bf16"
        ),
    )


def _emoji_64() -> RecoveryRun:
    """The recovery of the tokenizer that comes with the package: an hour or two on two CPU cores."""
    return RecoveryRun(
        recovery=RecoveryConfig(width=128, heads=4),
        optim=OptimConfig(
            lr=2e-3,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            warmup_steps=200,
            schedule="cosine",
            final_lr=0.01,
            clip_norm=1.0,
        ),
        loop=RecoveryLoopConfig(
            steps=6_000, batch_size=32, val_every=500, val_images=300, save_every=500, log_every=25, precision="bf16"
        ),
    )


RECOVERIES: dict[str, Callable[[], RecoveryRun]] = {"emoji_64": _emoji_64, "256": _paper}
"""Name -> what makes the run."""
