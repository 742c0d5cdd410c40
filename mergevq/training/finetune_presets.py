"""The presets of fine-tuning: what `presets.finetune` finds."""

from collections.abc import Callable

from mergevq.training.config import LoopConfig
from mergevq.training.finetune_config import (
    FinetuneDataConfig,
    FinetuneLossConfig,
    FinetuneModelConfig,
    FinetuneOptimConfig,
    FinetuneRun,
)

# One epoch of ImageNet-1K at a batch of 1,024, rounded up.
_EPOCH = 1_252


def _imagenet_256() -> FinetuneRun:
    """The paper's protocol (appendix A.4): 100 epochs, AdamW, batch 1,024 (on 8 GPUs), no merging.

    What it does not say is SimMIM's (arXiv 2111.09886) for ViT-B: rate, warm-up, layer decay, drop path, mixing. The
    rate is SimMIM's for this batch. Its random erasing is left out.
    """
    return FinetuneRun(
        model=FinetuneModelConfig(drop_path=0.1),
        loss=FinetuneLossConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0),
        data=FinetuneDataConfig(train="imagenet/train", val="imagenet/val", workers=8, rand_augment=2),
        optim=FinetuneOptimConfig(
            lr=2.5e-3,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_steps=20 * _EPOCH,
            schedule="cosine",
            final_lr=1e-4,
            clip_norm=5.0,
            ema_decay=0.9999,
            layer_decay=0.65,
        ),
        loop=LoopConfig(
            steps=100 * _EPOCH,
            batch_size=64,
            accumulate=2,
            val_every=5 * _EPOCH,
            val_images=10_000,
            save_every=1_000,
            precision="bf16",
        ),
    )


def _tiny() -> FinetuneRun:
    """The tokenizer that comes with the package, on the embedded images: minutes on two CPU cores."""
    return FinetuneRun(
        model=FinetuneModelConfig(features="class+mean", drop_path=0.05),
        data=FinetuneDataConfig(tokenizer="emoji_64", crop="random"),
        optim=FinetuneOptimConfig(
            lr=2e-3,
            betas=(0.9, 0.999),
            weight_decay=0.05,
            warmup_steps=20,
            schedule="cosine",
            final_lr=0.01,
            clip_norm=1.0,
            ema_decay=0.98,
            layer_decay=0.75,
        ),
        loop=LoopConfig(
            steps=300, batch_size=32, val_every=100, val_images=100, save_every=100, log_every=20, precision="bf16"
        ),
    )


FINETUNINGS: dict[str, Callable[[], FinetuneRun]] = {"tiny": _tiny, "imagenet_256": _imagenet_256}
"""Name -> what makes the run."""
