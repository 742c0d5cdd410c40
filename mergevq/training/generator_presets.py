"""The generators' presets: `{b,l,xl}_256`, small ones, each also in random order. `presets.generator` finds them.

The 256-pixel networks have the sizes of the authors' configuration, their recipe is the paper's table A2.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.training.config import OptimConfig
from mergevq.training.generator_config import GeneratorLoopConfig, GeneratorLossConfig, GeneratorRun

# One epoch of ImageNet-1K at the paper's batch of 1,024, rounded up.
_EPOCH = 1_252

# One row of the 16 x 16 grid, which becomes a row of the tokens' grid (`fit_model`): with what lies above in sight,
# dropping duplicates costs nothing. With the paper's 2 it costs 0.2 nats a token (LOG.md).
_MASK = MaskConfig(recent=16)


def _paper(depth: int, group_depth: int, width: int, heads: int, batch_size: int) -> GeneratorRun:
    """The paper's recipe: batch 1,024 on 8 GPUs, 300 epochs, AdamW at 4e-4 after 6 epochs of warm-up."""
    return GeneratorRun(
        model=GeneratorConfig(depth=depth, group_depth=group_depth, width=width, heads=heads, mask=_MASK),
        loss=GeneratorLossConfig(label_smoothing=0.1),
        optim=OptimConfig(
            lr=4e-4,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            warmup_steps=6 * _EPOCH,
            schedule="step",
            clip_norm=1.0,
            ema_decay=0.9999,
        ),
        loop=GeneratorLoopConfig(
            steps=300 * _EPOCH,
            batch_size=batch_size,
            accumulate=128 // batch_size,
            val_every=5_000,
            val_images=5_000,
            precision="bf16",
        ),
    )


def _small(model: GeneratorConfig, *, steps: int, lr: float = 1e-3, batch_size: int = 64) -> GeneratorRun:
    """One GPU for an hour, or a CPU for longer: tokens of 64-pixel images, 256 patches of 12 bits."""
    return GeneratorRun(
        model=replace(model, mask=_MASK),
        optim=OptimConfig(
            lr=lr,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            warmup_steps=200,
            schedule="cosine",
            final_lr=0.01,
            clip_norm=1.0,
            ema_decay=0.999,
        ),
        loop=GeneratorLoopConfig(
            steps=steps,
            batch_size=batch_size,
            val_every=500,
            val_images=300,
            save_every=500,
            log_every=25,
            precision="bf16",
        ),
    )


def _narrow(depth: int) -> GeneratorConfig:
    return GeneratorConfig(
        num_bits=12,
        groups=(6, 6),
        width=192,
        depth=depth,
        group_depth=1,
        heads=6,
        ffn_multiple=64,
        num_classes=9,
        token_dropout=0.0,
        dropout=0.0,
    )


def _s_64() -> GeneratorRun:
    """Two million parameters, for comparisons in minutes: too short a training to need dropout."""
    return _small(_narrow(depth=4), steps=4_000, lr=1.5e-3)


def _emoji_64() -> GeneratorRun:
    """The weights that come with the package: 47 minutes on one CPU core.

    No dropout: ten passes over the images, each time at another K or mirrored, do not overfit.
    """
    run = _small(_narrow(depth=6), steps=3_500, lr=1.5e-3, batch_size=8)
    return replace(run, loop=replace(run.loop, val_every=1_000))


def _tiny() -> GeneratorRun:
    """The demo's: two minutes on two CPU cores."""
    model = GeneratorConfig(
        num_bits=12,
        groups=(6, 6),
        width=128,
        depth=3,
        group_depth=1,
        heads=4,
        ffn_multiple=64,
        num_classes=9,
        token_dropout=0.0,
        dropout=0.0,
    )
    run = _small(model, steps=20_000, lr=2e-3, batch_size=8)
    return replace(
        run,
        optim=replace(run.optim, warmup_steps=30, ema_decay=0.98),
        loop=replace(run.loop, minutes=2.0, val_images=64, precision="float32"),
    )


def _random(name: str) -> GeneratorRun:
    run = _RASTER[name]()
    return replace(run, model=replace(run.model, order="random"))


_RASTER: dict[str, Callable[[], GeneratorRun]] = {
    "tiny": _tiny,
    "s_64": _s_64,
    "emoji_64": _emoji_64,
    "b_256": lambda: _paper(12, 2, 768, 12, batch_size=64),
    "l_256": lambda: _paper(24, 2, 1024, 16, batch_size=32),
    "xl_256": lambda: _paper(36, 3, 1280, 20, batch_size=16),
}
GENERATORS: dict[str, Callable[[], GeneratorRun]] = {
    **_RASTER,
    **{f"{name}_random": partial(_random, name) for name in _RASTER},
}
"""Name -> what makes the run."""
