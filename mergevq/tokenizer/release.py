"""The authors' tokenizers in our words: which of their tensors and options is what in a tokenizer.

The release defines two things differently from our defaults, and the converted configuration says so: it does not
normalise before the sign, and it leaves the kept tokens in the order that merging produces. Its decoder takes the
source map from the encoder; nothing in it can predict one.
"""

from collections.abc import Mapping
from typing import Any

from mergevq.errors import ConfigError
from mergevq.merging import linear_counts
from mergevq.tokenizer.config import (
    AlignmentConfig,
    DecoderConfig,
    EncoderConfig,
    MergingConfig,
    QuantizerConfig,
    RecoveryConfig,
    TokenizerConfig,
)


def config_from_release(ddconfig: Mapping[str, Any]) -> TokenizerConfig:
    """Returns our configuration for the authors' network options. Options without effect on a trained tokenizer are
    passed over, as their constructor does with what it does not know.

    Raises:
        ConfigError: an option is missing or impossible.
    """
    needed = [name for name in ("z_channels", "resolution", "ch", "ch_mult", "num_att_blocks") if name not in ddconfig]
    if needed:
        raise ConfigError(f"expected the network options of the release, {', '.join(needed)} missing")
    for name in ("in_channels", "out_ch"):
        if ddconfig.get(name, 3) != 3:
            raise ConfigError(f"expected {name} 3, got {ddconfig[name]}: only colour images are supported")
    channels, multipliers = int(ddconfig["ch"]), tuple(int(m) for m in ddconfig["ch_mult"])
    levels, depth, size = len(multipliers), int(ddconfig["num_att_blocks"]), int(ddconfig["resolution"])
    blocks = ddconfig.get("num_res_blocks", 2)
    if isinstance(blocks, int):
        enc_blocks = (blocks,) * levels
        dec_blocks = (blocks, *(blocks + int(ddconfig.get("num_res_extra", 1)),) * (levels - 1))
    else:
        enc_blocks = dec_blocks = tuple(int(b) for b in blocks)
    heads, head_dim = int(ddconfig.get("num_heads", 8)), ddconfig.get("head_dim")
    isotropic = ddconfig.get("isotropic") or 0
    # True, as well as 1, keeps the width of the convolutional encoder.
    width = int(isotropic) if int(isotropic) > 1 else channels * multipliers[-1]

    def num_heads(width: int) -> int:
        return heads if not head_dim else max(width // int(head_dim), heads)

    downsampling = 2 ** (levels - 1)
    patches = (size // downsampling) ** 2
    merged = ddconfig.get("merge_num")
    if merged is None:
        merged = sum(linear_counts(int(ddconfig.get("merge_ratio") or 0), depth))
    head = ddconfig.get("dist_head")
    return TokenizerConfig(
        image_size=size,
        num_bits=int(ddconfig["z_channels"]),
        num_tokens=max(1, patches - int(merged)),
        encoder=EncoderConfig(
            kind="vit" if isotropic else "hybrid",
            channels=channels,
            multipliers=multipliers,
            blocks=enc_blocks,
            # A hybrid reads neither: what it does not read stays as it is in the presets.
            patch_size=downsampling if isotropic else 16,
            vit_width=width if isotropic else 768,
            depth=depth,
            heads=num_heads(width),
            position="none",
        ),
        merging=MergingConfig(overflow="clip", order="merge"),
        quantizer=QuantizerConfig(norm="none", temperature=0.01, scope="local", eps=1e-5),
        decoder=DecoderConfig(
            channels=channels,
            multipliers=multipliers,
            blocks=dec_blocks,
            depth=depth,
            heads=num_heads(channels * multipliers[-1]),
        ),
        recovery=RecoveryConfig(enabled=False),
        alignment=AlignmentConfig(
            enabled=bool(head),
            head="three" if head == "layer3" else "two",
            teacher_dim=int(ddconfig.get("num_classes") or width),
            blocks=int(ddconfig.get("num_rep_blocks") or 0),
            view_tokens="same_count",
        ),
    )


def release_keys(config: TokenizerConfig) -> dict[str, str]:
    """Returns the table from our tensor names to the authors', for every tensor of a tokenizer with this
    configuration.
    """
    enc, dec, n = config.encoder, config.decoder, len(config.decoder.multipliers)
    table = {
        "encoder.class_token": "encoder.attn.cls_token",
        **_both("encoder.norm_out", "encoder.norm_out"),
        **_both("encoder.code_out", "encoder.conv_out"),
        **_both("decoder.conv_in", "decoder.conv_in"),
        **_both("decoder.position", "decoder.attn.pos_embed"),
        **_both("decoder.norm_out", "decoder.norm_out"),
        **_both("decoder.out", "decoder.conv_out"),
    }
    if enc.kind == "vit":
        table |= _both("encoder.stem.conv", "encoder.conv_in.0") | _both("encoder.stem.norm", "encoder.conv_in.1")
    else:
        table["encoder.stem.conv_in.weight"] = "encoder.conv_in.weight"
        width = enc.channels
        for i, count in enumerate(enc.blocks):
            out = enc.channels * enc.multipliers[i]
            for j in range(count):
                table |= _residual(f"encoder.stem.levels.{i}.{j}", f"encoder.down.{i}.block.{j}", width != out)
                width = out
            if i < n - 1:
                table |= _both(f"encoder.stem.downsample.{i}", f"encoder.down.{i}.downsample")
    for i in range(enc.depth):
        table |= _transformer(f"encoder.blocks.{i}", f"encoder.attn.blocks.{i}")
    if config.alignment.enabled:
        for i in range(config.alignment.blocks):
            table |= _transformer(f"alignment.blocks.{i}", f"encoder.rep_attn.blocks.{i}")
        for i in (0, 2, 4) if config.alignment.head == "three" else (0, 2, 3):
            table |= _both(f"alignment.layers.{i}", f"encoder.dist_head.{i}")
    for i in range(dec.depth):
        table |= _transformer(f"decoder.blocks.{i}", f"decoder.attn.blocks.{i}")
        table |= _both(f"decoder.blocks.{i}.mlp.dwconv", f"decoder.attn.blocks.{i}.mlp.dwconv")
    widths = [dec.channels * m for m in dec.multipliers]
    for i, count in enumerate(dec.blocks):
        width = widths[min(i + 1, n - 1)]
        for j in range(count):
            table |= _residual(f"decoder.levels.{i}.{j}", f"decoder.up.{i}.block.{j}", width != widths[i])
            width = widths[i]
        table |= _both(f"decoder.adaptive.{i}.gamma", f"decoder.adaptive.{i}.gamma")
        table |= _both(f"decoder.adaptive.{i}.beta", f"decoder.adaptive.{i}.beta")
        if i > 0:
            table |= _both(f"decoder.upsample.{i - 1}.conv", f"decoder.up.{i}.upsample.conv1")
    return table


def _both(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.weight": f"{theirs}.weight", f"{ours}.bias": f"{theirs}.bias"}


def _residual(ours: str, theirs: str, shortcut: bool) -> dict[str, str]:
    table = _both(f"{ours}.norm1", f"{theirs}.norm1") | _both(f"{ours}.norm2", f"{theirs}.norm2")
    table |= {f"{ours}.{name}.weight": f"{theirs}.{name}.weight" for name in ("conv1", "conv2")}
    if shortcut:
        table[f"{ours}.shortcut.weight"] = f"{theirs}.nin_shortcut.weight"
    return table


def _transformer(ours: str, theirs: str) -> dict[str, str]:
    table = {f"{ours}.ls1": f"{theirs}.ls1.gamma", f"{ours}.ls2": f"{theirs}.ls2.gamma"}
    for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
        table |= _both(f"{ours}.{name}", f"{theirs}.{name}")
    return table
