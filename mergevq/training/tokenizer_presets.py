"""The tokenizers' presets: `{g,gr,r}_{resolution}[_{width}]`, and the demo's. `presets.tokenizer` finds them.

G is made for generation (downsampling 8, many patches merged), G+R for both, R for representation (a plain ViT
encoder). The 256-pixel presets follow the paper's table A1 and the authors' configuration; the smaller ones are ours.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from mergevq.tokenizer.config import (
    AlignmentConfig,
    DecoderConfig,
    EncoderConfig,
    QuantizerConfig,
    RecoveryConfig,
    TokenizerConfig,
)
from mergevq.training.config import (
    DataConfig,
    LossConfig,
    LossWeights,
    TokenizerLoopConfig,
    TokenizerOptimConfig,
    TokenizerRun,
)

# One epoch of ImageNet-1K at the paper's batch of 256.
_EPOCH = 5_005


def _tiny() -> TokenizerRun:
    """The demo's: 64 pixels, 256 patches, 12 bits."""
    return TokenizerRun(
        model=TokenizerConfig(
            image_size=64,
            num_bits=12,
            num_tokens=144,
            num_groups=8,
            layer_scale=0.1,
            encoder=EncoderConfig(channels=48, multipliers=(1, 2), blocks=(1, 1), stem_stride=2, depth=3, heads=4),
            quantizer=QuantizerConfig(norm="layer", temperature=1.0, groups=(6, 6)),
            decoder=DecoderConfig(
                channels=48,
                multipliers=(1, 2),
                blocks=(1, 2),
                output_stride=2,
                # Depth-to-space leaves a dot texture that the stride-2 perceptual network does not see.
                upsample="nearest",
                depth=1,
                heads=4,
            ),
            recovery=RecoveryConfig(enabled=False),
            alignment=AlignmentConfig(enabled=False),
        ),
        loss=LossConfig(
            # Lite0's distance is several times LPIPS's; at weight 1 it drowns the pixels and colours drift.
            # At the usual entropy weight of 0.1 white patches alone spread over 1,300 codes, which no generator
            # can learn, and the images are no better for it (LOG.md).
            weights=LossWeights(perceptual=0.25, adversarial=0.0, entropy=0.01, recovery=0.0, alignment=0.0, lecam=0.0),
            perceptual="lite0",
        ),
        data=DataConfig(flip=True),
        optim=TokenizerOptimConfig(
            lr=2e-3, betas=(0.9, 0.99), warmup_steps=50, schedule="cosine", ema_decay=0.995, clip_norm=1.0
        ),
        loop=TokenizerLoopConfig(
            steps=20_000,
            minutes=4.5,
            batch_size=8,
            num_tokens=_fractions(256),
            val_num_tokens=(256, 144, 64),
            val_every=500,
            val_images=128,
            save_every=500,
            log_every=25,
            channels_last=True,
        ),
    )


def _emoji_64() -> TokenizerRun:
    """The demo's network, trained for 52 minutes on two CPU cores: the weights that come with the package."""
    run = _tiny()
    return replace(
        run,
        # Without the codebook entropy, alike patches get equal codes: what a generator can learn (LOG.md).
        loss=replace(run.loss, weights=replace(run.loss.weights, entropy=0.0)),
        optim=replace(run.optim, warmup_steps=100, ema_decay=0.999),
        loop=replace(
            run.loop,
            steps=4_500,
            minutes=0.0,
            batch_size=16,
            val_every=1_000,
            val_images=299,
            save_every=500,
        ),
    )


# ----------------------------------------------------------------------------------------------------------- 256 pixels


def _paper(
    model: TokenizerConfig,
    *,
    alignment: float,
    recovery: float,
    epochs: int,
    num_tokens: tuple[int, ...],
    probs: tuple[float, ...],
    val_num_tokens: tuple[int, ...],
    schedule: Literal["cosine", "step"] = "step",
    clip_norm: float = 0.0,
    batch_size: int = 16,
) -> TokenizerRun:
    """The paper's recipe: batch 256 on 8 GPUs, Adam at 1e-4, LPIPS, PatchGAN, DINOv2-B."""
    return TokenizerRun(
        model=model,
        loss=LossConfig(weights=LossWeights(alignment=alignment, recovery=recovery)),
        data=DataConfig(train="imagenet/train", val="imagenet/val", workers=8),
        optim=TokenizerOptimConfig(schedule=schedule, clip_norm=clip_norm),
        loop=TokenizerLoopConfig(
            steps=epochs * _EPOCH,
            batch_size=batch_size,
            accumulate=32 // batch_size,
            num_tokens=num_tokens,
            num_tokens_probs=probs,
            val_num_tokens=val_num_tokens,
            precision="bf16",
            channels_last=True,
        ),
    )


def _g_256(channels: int = 64, multipliers: tuple[int, ...] = (1, 2, 4, 8), candidates: int = 9) -> TokenizerRun:
    model = TokenizerConfig(
        num_tokens=256,
        encoder=EncoderConfig(channels=channels, multipliers=multipliers, blocks=(4,) * 4),
        decoder=DecoderConfig(channels=channels, multipliers=multipliers, blocks=(4, 5, 5, 5)),
        alignment=AlignmentConfig(head="two"),
    )
    # Squares around 256 with the authors' peaked law, and the unmerged grid that the results are also reported at.
    sides = range(15, 15 + candidates)
    law = [math.exp(-2 * (i - 1) ** 2) + 0.05 for i in range(len(sides))]
    return _paper(
        model,
        alignment=0.1,
        recovery=0.5,
        epochs=270,
        num_tokens=(*(side**2 for side in sides), 1024),
        probs=(*(0.9 * p / sum(law) for p in law), 0.1),
        val_num_tokens=(1024, 576, 400, 256, 196),
        batch_size=8,
    )


def _gr_256(
    channels: int = 64, multipliers: tuple[int, ...] = (1, 1, 2, 4, 8), heads: int = 8, clip_norm: float = 0.0
) -> TokenizerRun:
    model = TokenizerConfig(
        encoder=EncoderConfig(channels=channels, multipliers=multipliers, heads=heads),
        decoder=DecoderConfig(channels=channels, multipliers=multipliers, heads=heads),
    )
    return _paper(
        model,
        alignment=1.0,
        recovery=0.5,
        epochs=270,
        num_tokens=(36, 64, 100, 121, 144, 169, 196, 256),
        probs=(0.03, 0.05, 0.10, 0.12, 0.45, 0.10, 0.05, 0.10),
        val_num_tokens=(256, 196, 144, 100, 64),
        clip_norm=clip_norm,
    )


def _r_256() -> TokenizerRun:
    model = TokenizerConfig(
        num_tokens=36,
        encoder=EncoderConfig(kind="vit", patch_size=16, vit_width=768, heads=12, position="sincos"),
    )
    return _paper(
        model,
        alignment=1.0,
        recovery=1.0,
        epochs=300,
        num_tokens=(36, 49, 64, 81, 100, 144, 256),
        probs=(0.5, *(0.5 / 6,) * 6),
        val_num_tokens=(256, 144, 100, 64, 36),
        schedule="cosine",
        clip_norm=5.0,
    )


# ---------------------------------------------------------------------------------------------------- 128 and 64 pixels


def _small(
    size: int,
    encoder: EncoderConfig,
    decoder: DecoderConfig,
    *,
    num_bits: int,
    alignment: float,
    recovery: float,
    num_tokens: int,
) -> TokenizerRun:
    """One GPU, a day or less; perceptual network and teacher come from a package, so nothing is downloaded. Upsampling
    and perceptual weight are the demo's, for the reasons given there.
    """
    half = num_bits // 2
    model = TokenizerConfig(
        image_size=size,
        num_bits=num_bits,
        num_tokens=num_tokens,
        num_groups=16,
        layer_scale=0.1,
        encoder=encoder,
        quantizer=QuantizerConfig(norm="layer", temperature=1.0, groups=(num_bits - half, half)),
        decoder=replace(decoder, upsample="nearest"),
        recovery=RecoveryConfig(width=256),
        alignment=AlignmentConfig(head="two", teacher_dim=1280),
    )
    patches = model.num_patches
    return TokenizerRun(
        model=model,
        loss=LossConfig(
            weights=LossWeights(perceptual=0.25, alignment=alignment, recovery=recovery),
            perceptual="lite0",
            teacher="lite0",
            disc_start=5_000,
            disc_channels=32,
            disc_layers=2,
        ),
        data=DataConfig(flip=True, workers=8),
        optim=TokenizerOptimConfig(
            lr=4e-4, disc_lr=2e-4, betas=(0.9, 0.99), warmup_steps=500, schedule="cosine", clip_norm=1.0
        ),
        loop=TokenizerLoopConfig(
            steps=100_000,
            batch_size=64,
            num_tokens=_fractions(patches),
            val_num_tokens=(patches, patches * 9 // 16, patches // 4),
            precision="bf16",
            channels_last=True,
        ),
    )


def _g_128() -> TokenizerRun:
    return _small(
        128,
        EncoderConfig(channels=48, multipliers=(1, 2, 4, 8), blocks=(2,) * 4, depth=8, heads=6),
        DecoderConfig(channels=48, multipliers=(1, 2, 4, 8), blocks=(2, 3, 3, 3), depth=8, heads=6),
        num_bits=18,
        alignment=0.1,
        recovery=0.5,
        num_tokens=144,
    )


def _gr_128() -> TokenizerRun:
    return _small(
        128,
        EncoderConfig(channels=48, multipliers=(1, 1, 2, 4, 8), blocks=(2,) * 5, depth=8, heads=6),
        DecoderConfig(channels=48, multipliers=(1, 1, 2, 4, 8), blocks=(2, 3, 3, 3, 3), depth=8, heads=6),
        num_bits=18,
        alignment=1.0,
        recovery=0.5,
        num_tokens=36,
    )


def _g_64() -> TokenizerRun:
    return _small(
        64,
        EncoderConfig(channels=64, multipliers=(1, 2, 4), blocks=(2,) * 3, depth=6, heads=4),
        DecoderConfig(channels=64, multipliers=(1, 2, 4), blocks=(2, 3, 3), depth=6, heads=4),
        num_bits=14,
        alignment=0.1,
        recovery=0.5,
        num_tokens=144,
    )


def _gr_64() -> TokenizerRun:
    return _small(
        64,
        EncoderConfig(channels=64, multipliers=(1, 2, 4, 4), blocks=(2,) * 4, depth=6, heads=4),
        DecoderConfig(channels=64, multipliers=(1, 2, 4, 4), blocks=(2, 3, 3, 3), depth=6, heads=4),
        num_bits=14,
        alignment=1.0,
        recovery=0.5,
        num_tokens=36,
    )


def _r_64() -> TokenizerRun:
    return _small(
        64,
        EncoderConfig(kind="vit", patch_size=8, vit_width=384, depth=12, heads=6, position="sincos"),
        DecoderConfig(channels=64, multipliers=(1, 2, 4, 4), blocks=(2, 3, 3, 3), depth=6, heads=4),
        num_bits=14,
        alignment=1.0,
        recovery=1.0,
        num_tokens=16,
    )


def _quick(run: TokenizerRun, encoder: EncoderConfig, channels: int, multipliers: tuple[int, ...]) -> TokenizerRun:
    """The same idea in three quarters of an hour on two CPU cores, or minutes on a GPU, to compare one with the other.

    No discriminator: it would not have begun to matter.
    """
    decoder = DecoderConfig(
        channels=channels,
        multipliers=multipliers,
        blocks=(1,) + (2,) * (len(multipliers) - 1),
        output_stride=2,
        upsample="nearest",
        depth=2,
        heads=4,
    )
    recovery = RecoveryConfig(width=128, heads=4, cross_depth=1, self_depth=1)
    return replace(
        run,
        model=replace(run.model, num_groups=8, encoder=encoder, decoder=decoder, recovery=recovery),
        loss=replace(run.loss, weights=replace(run.loss.weights, adversarial=0.0, lecam=0.0)),
        data=replace(run.data, workers=2),
        optim=replace(run.optim, lr=1e-3, warmup_steps=200, ema_decay=0.998),
        loop=replace(run.loop, steps=2_500, batch_size=32, val_every=500, val_images=500, save_every=250),
    )


def _g_64_d32() -> TokenizerRun:
    encoder = EncoderConfig(channels=32, multipliers=(2, 4), blocks=(1, 1), stem_stride=2, depth=4, heads=4)
    return _quick(_g_64(), encoder, 32, (2, 4))


def _gr_64_d32() -> TokenizerRun:
    encoder = EncoderConfig(channels=32, multipliers=(2, 4, 4), blocks=(1, 1, 1), stem_stride=2, depth=4, heads=4)
    return _quick(_gr_64(), encoder, 32, (2, 4, 4))


def _r_64_d32() -> TokenizerRun:
    encoder = EncoderConfig(kind="vit", patch_size=8, vit_width=192, depth=6, heads=4, position="sincos")
    return _quick(_r_64(), encoder, 32, (2, 4, 4))


def _fractions(num_patches: int) -> tuple[int, ...]:
    """All, three quarters, nine sixteenths, two fifths and a quarter of the patches."""
    return tuple(round(num_patches * part) for part in (1, 3 / 4, 9 / 16, 2 / 5, 1 / 4))


TOKENIZERS: dict[str, Callable[[], TokenizerRun]] = {
    "tiny": _tiny,
    "emoji_64": _emoji_64,
    "g_64": _g_64,
    "gr_64": _gr_64,
    "r_64": _r_64,
    "g_64_d32": _g_64_d32,
    "gr_64_d32": _gr_64_d32,
    "r_64_d32": _r_64_d32,
    "g_128": _g_128,
    "gr_128": _gr_128,
    "g_256": _g_256,
    "g_256_d32": lambda: _g_256(channels=32, multipliers=(2, 4, 8, 12), candidates=8),
    "gr_256": _gr_256,
    "gr_256_d32": lambda: _gr_256(channels=32, multipliers=(2, 2, 4, 8, 12)),
    "gr_256_d96": lambda: _gr_256(channels=96, heads=12, clip_norm=5.0),
    "r_256": _r_256,
}
"""Name -> what makes the run."""
