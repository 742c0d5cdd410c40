"""The generators' presets and the released configurations have the sizes that they claim; nothing here has values."""

from dataclasses import replace

import pytest
import torch

from mergevq import presets
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.generator.release import generator_config_from_release, generator_release_keys

SIZES = {"b_256": 106_271_232, "l_256": 343_570_432, "xl_256": 804_362_240}


def num_parameters(config: GeneratorConfig) -> int:
    with torch.device("meta"):
        model = (MergeAR if config.order == "raster" else RandomAR)(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_sizes(name: str) -> None:
    config = presets.generator(name).model
    assert num_parameters(replace(config, instruction=False)) == SIZES[name]
    # Vector and MLP of the merge instruction.
    told = config.width + 2 * config.width**2
    assert num_parameters(config) == SIZES[name] + told
    # The instruction of ranks is such a thing too.
    assert num_parameters(presets.generator(f"{name}_random").model) == SIZES[name] + 2 * told


@pytest.mark.parametrize("name", presets.generator_names())
def test_every_preset_builds_in_its_order(name: str) -> None:
    config = presets.generator(name).model
    assert config.order == ("random" if name.endswith("_random") else "raster")
    size = num_parameters(config)
    # In half precision; a file that comes with the package has at most 12 MB.
    assert not name.startswith("emoji") or 2 * size < 11.9e6


# Depth, depth of groups, width, heads, tokens of the authors' configuration files.
RELEASED = {
    "B, 256 tokens": (24, 2, 1024, 16, 256, "l_256"),
    "B, 1024 tokens": (24, 2, 1024, 16, 1024, "l_256"),
    "L": (36, 3, 1280, 20, 256, "xl_256"),
    "XL": (48, 4, 1536, 24, 256, None),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_the_presets(name: str) -> None:
    depth, group_depth, width, heads, tokens, preset = RELEASED[name]
    hidden = {1024: 2816, 1280: 3584, 1536: 4096}[width]
    shapes = {
        "pre_emb.weight": (64, width),
        "post_emb.weight": (4096, width),
        "class_emb.embedding_table.weight": (1001, width),
        "norm.weight": (width,),
        "head.0.weight": (64, width),
        "head.1.weight": (4096, width),
    }
    blocks = [f"spatial_blocks.{i}" for i in range(depth)] + [f"factorized_blocks.{i}" for i in range(group_depth)]
    for block in blocks:
        shapes |= {f"{block}.attention.wqkv.weight": (3 * width, width), f"{block}.attention.wo.weight": (width, width)}
        shapes |= {f"{block}.feed_forward.{w}.weight": (hidden, width) for w in ("w1", "w3")}
        shapes |= {f"{block}.feed_forward.w2.weight": (width, hidden)}
        shapes |= {f"{block}.{norm}.weight": (width,) for norm in ("attention_norm", "ffn_norm")}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    options = {
        **{"vocab_size": 512, "block_size": tokens, "spatial_n_layer": depth, "factorized_n_layer": group_depth},
        **{"factorized_bits": [6, 12], "n_head": heads, "dim": width, "cond_dim": width, "token_drop": 0.1},
        **{"resid_dropout_p": 0.1, "token_factorization": True, "class_num": 1000},
    }
    config = generator_config_from_release(tensors, options)
    table = generator_release_keys(config)
    with torch.device("meta"):
        ours = MergeAR(config).state_dict()
    assert set(table) == set(ours)
    assert sorted(key for theirs in table.values() for key in theirs) == sorted(tensors)
    for key, theirs in table.items():
        assert ours[key].shape == torch.cat([tensors[t] for t in theirs]).shape, key
    if preset is not None:
        # All that makes the network; the prefix, the mask and K are the release's own.
        own = {"prefix_position": "zero", "instruction": False, "mask": MaskConfig(recent=None)}
        side = {256: 16, 1024: 32}[tokens]
        kept = {"grid": (side, side), "num_tokens": tokens, "trained_num_tokens": (tokens, tokens)}
        assert config == replace(presets.generator(preset).model, **own, **kept)
        assert sum(t.numel() for t in ours.values()) == SIZES[preset]
