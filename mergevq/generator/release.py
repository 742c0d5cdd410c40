"""The authors' second stage in our words: which of their tensors and options is what in a generator.

Theirs is a plain raster-order model on tokens that were not merged: causal attention in which nothing is dropped, no
merge instruction, two bit groups, and a class slot whose queries and keys are zero.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mergevq.errors import CheckpointError, ConfigError
from mergevq.generator.config import GeneratorConfig, MaskConfig

_EMBEDDINGS = ("pre_emb.weight", "post_emb.weight")
_CLASSES = "class_emb.embedding_table.weight"


def generator_config_from_release(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | GeneratorConfig
) -> GeneratorConfig:
    """Returns our configuration for the authors' weights and options.

    Widths, depths, classes, bit groups and shared heads are read off the tensors; where the options name them too, both
    have to agree. `n_head` and `block_size` are in the options alone. Options without effect on a trained generator are
    passed over.

    Args:
        tensors: theirs by their names, without "transformer." before.
        config: their options, as under `transformer_config.params` of their configuration files; or a configuration of
            ours, in which order, mask, instruction and prefix_position are set to what theirs does.

    Raises:
        ConfigError: an option is missing, impossible, or not what the tensors say.
        CheckpointError: a tensor that sizes are read off is missing or misshaped.
    """
    plain: dict[str, Any] = {
        "order": "raster",
        "mask": MaskConfig(recent=None),
        "instruction": False,
        "prefix_position": "zero",
    }
    if isinstance(config, GeneratorConfig):
        if len(config.groups) != len(_EMBEDDINGS):
            raise ConfigError(f"expected two bit groups, as the release has, got {config.groups}")
        return replace(config, **plain)
    classes, width = _shape(tensors, _CLASSES)
    sizes = [_shape(tensors, name)[0] for name in _EMBEDDINGS]
    if any(size & (size - 1) for size in sizes):
        raise CheckpointError(f"expected embeddings of 2**bits rows, got {' and '.join(map(str, sizes))}")
    groups = tuple(size.bit_length() - 1 for size in sizes)
    depth, group_depth = _count(tensors, "spatial_blocks"), _count(tensors, "factorized_blocks")
    heads, block_size = _whole(config, "n_head", "num_heads"), _whole(config, "block_size")
    if heads is None or block_size is None or min(heads, block_size) < 1:
        raise ConfigError("expected the options of the release's stage 2 with n_head and block_size of at least 1")
    if math.isqrt(block_size) ** 2 != block_size:
        raise ConfigError(f"expected a square block_size, the grid has as many rows as columns, got {block_size}")
    if width % heads:
        raise ConfigError(f"expected n_head to divide the tensors' width {width}, got {heads}")
    kv_heads = (_shape(tensors, "spatial_blocks.0.attention.wqkv.weight")[0] - width) // (2 * (width // heads))
    found = {
        ("dim", "n_embd"): width,
        ("spatial_n_layer", "n_layer"): depth,
        ("factorized_n_layer",): group_depth,
        ("n_kv_head", "num_kv_heads"): kv_heads,
        ("class_num", "num_classes"): classes - 1,
        # Nothing of these can be read off the tensors; the model is one of them.
        ("cls_token_num",): 1,
        ("token_factorization",): 1,
    }
    for names, size in found.items():
        for name in names:
            if _whole(config, name) not in (None, size):
                raise ConfigError(f"expected {name} {size}, as the checkpoint's tensors say, got {config[name]}")
    bits = config.get("factorized_bits")
    if bits is not None and bits not in (groups, list(groups)):
        raise ConfigError(f"expected factorized_bits {list(groups)}, as the checkpoint's tensors say, got {bits}")
    return GeneratorConfig(
        **plain,
        grid=(math.isqrt(block_size),) * 2,
        num_bits=sum(groups),
        groups=groups,
        num_classes=classes - 1,
        # They train on all tokens of an image, unmerged.
        num_tokens=block_size,
        trained_num_tokens=(block_size, block_size),
        width=width,
        depth=depth,
        group_depth=group_depth,
        heads=heads,
        kv_heads=0 if kv_heads == heads else kv_heads,
        ffn_multiple=_ffn_multiple(config, width, _shape(tensors, "spatial_blocks.0.feed_forward.w1.weight")[0]),
        norm_eps=_number(config, 1e-5, "norm_eps"),
        rotary_base=_number(config, 10_000.0, "rope_base"),
        token_dropout=_number(config, 0.1, "token_dropout_p", "token_drop"),
        # Of feed-forward layers they may have another one; it matters to further training alone.
        dropout=_number(config, 0.1, "resid_dropout_p"),
        class_dropout=_number(config, 0.1, "class_dropout_prob"),
    )


def generator_release_keys(config: GeneratorConfig) -> dict[str, tuple[str, ...]]:
    """Returns the table from our tensor names to the authors', for every tensor of a generator with this configuration.
    Several of theirs, one above the other, are one of ours.
    """
    table: dict[str, tuple[str, ...]] = {
        "class_embedding.weight": (_CLASSES,),
        "norm.weight": ("norm.weight",),
        **{f"embeddings.{i}.weight": (name,) for i, name in enumerate(_EMBEDDINGS)},
        **{f"heads.{i}.weight": (f"head.{i}.weight",) for i in range(len(_EMBEDDINGS))},
    }
    for i in range(config.depth):
        table |= _block(f"blocks.{i}", f"spatial_blocks.{i}")
    for i in range(config.group_depth):
        table |= _block(f"group_blocks.{i}", f"factorized_blocks.{i}")
    return {f"transformer.{ours}": theirs for ours, theirs in table.items()}


def is_release_cache(name: str) -> bool:
    """Says whether this is a key-value cache, which their model keeps, and saves, once it has sampled."""
    return re.fullmatch(r"(.*\.)?(spatial|factorized)_blocks\.\d+\.attention\.kv_cache\.[kv]_cache", name) is not None


# ----------------------------------------------------------------------------------------------------------- details


def _block(ours: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{ours}.norm1.weight": (f"{theirs}.attention_norm.weight",),
        f"{ours}.attention.qkv.weight": (f"{theirs}.attention.wqkv.weight",),
        f"{ours}.attention.out.weight": (f"{theirs}.attention.wo.weight",),
        f"{ours}.norm2.weight": (f"{theirs}.ffn_norm.weight",),
        f"{ours}.feed_forward.expand.weight": (f"{theirs}.feed_forward.w1.weight", f"{theirs}.feed_forward.w3.weight"),
        f"{ours}.feed_forward.reduce.weight": (f"{theirs}.feed_forward.w2.weight",),
    }


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors:
        raise CheckpointError(f"expected the tensors of the release's stage 2, {name} is missing: give a generator's")
    if tensors[name].ndim != 2:
        raise CheckpointError(f"expected {name} with rows and columns, got shape {list(tensors[name].shape)}")
    rows, columns = tensors[name].shape
    return rows, columns


def _count(tensors: Mapping[str, Tensor], name: str) -> int:
    """Returns how many blocks there are, going by the largest number; whether any is missing is seen later."""
    numbers = (re.match(rf"{name}\.(\d+)\.", key) for key in tensors)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def _ffn_multiple(config: Mapping[str, Any], width: int, found: int) -> int:
    """Returns the multiple that our rule for the feed-forward width rounds up to what the tensors have."""
    base = int(2 * 4 * width / 3)
    scaled = int(base * _number(config, 1.0, "ffn_dim_multiplier"))
    multiple = max(1, _whole(config, "multiple_of") or 256)
    told = any(config.get(name) is not None for name in ("multiple_of", "ffn_dim_multiplier"))
    if told and -(-scaled // multiple) * multiple != found:
        raise ConfigError(
            f"expected multiple_of and ffn_dim_multiplier that give the tensors' feed-forward width {found}, "
            f"got {-(-scaled // multiple) * multiple}"
        )
    if -(-base // multiple) * multiple == found:
        return multiple
    if found < base:
        raise ConfigError(f"expected a feed-forward width of at least 8/3 of the width, {base}, got {found}")
    return found


def _given(config: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[float]:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        try:
            yield float(value)  # YAML takes 1e-5, without a point, for a word.
        except (TypeError, ValueError):
            raise ConfigError(f"expected {name} to be a number, got {value!r}") from None


def _number(config: Mapping[str, Any], default: float, *names: str) -> float:
    return next(_given(config, names), default)


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    value = next(_given(config, names), None)
    if value is not None and not value.is_integer():
        raise ConfigError(f"expected {names[0]} to be a whole number, got {value}")
    return None if value is None else int(value)
