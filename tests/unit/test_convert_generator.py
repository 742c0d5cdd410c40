"""Reading the authors' generators: options against tensors, strict both ways, out of any of their files."""

import json
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergevq.convert import generator_from_release, read_release, tokenizer_from_release
from mergevq.errors import CheckpointError, ConfigError
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.raster import MergeAR
from mergevq.generator.release import generator_release_keys
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.release import config_from_release, release_keys

# As in the authors' files; what is not said there is their default.
OPTIONS = {
    "vocab_size": 512,
    "block_size": 16,
    "spatial_n_layer": 2,
    "factorized_n_layer": 1,
    "factorized_bits": [4, 6],
    "n_head": 4,
    "dim": 32,
    "cond_dim": 32,
    "token_drop": 0.2,
    "resid_dropout_p": 0.3,
    "token_factorization": True,
    "class_num": 7,
}
FIRST_STAGE = {
    "z_channels": 10,
    "resolution": 32,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "num_att_blocks": 1,
    "num_heads": 4,
    "merge_num": 0,
}
FILE = {
    "trainer": {"devices": 8},
    "model": {
        "class_path": "a.b.Net",
        "init_args": {
            "learning_rate": "3e-4",
            "transformer_config": {"target": "a.b.GPT", "params": OPTIONS},
            "first_stage_config": {"target": "a.b.Tokenizer", "params": {"embed_dim": 10, "ddconfig": FIRST_STAGE}},
        },
    },
}


def release_state(seed: int = 0, ffn: int = 256, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the authors' names."""
    size = {"dim": 32, "classes": 8, "pre": 16, "post": 64, "kv": 32, **sizes}
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "pre_emb.weight": (size["pre"], size["dim"]),
        "post_emb.weight": (size["post"], size["dim"]),
        "class_emb.embedding_table.weight": (size["classes"], size["dim"]),
        "norm.weight": (size["dim"],),
        "head.0.weight": (size["pre"], size["dim"]),
        "head.1.weight": (size["post"], size["dim"]),
    }
    for block in ("spatial_blocks.0", "spatial_blocks.1", "factorized_blocks.0"):
        shapes |= {
            f"{block}.attention.wqkv.weight": (size["dim"] + 2 * size["kv"], size["dim"]),
            f"{block}.attention.wo.weight": (size["dim"], size["dim"]),
            f"{block}.attention_norm.weight": (size["dim"],),
            f"{block}.ffn_norm.weight": (size["dim"],),
            f"{block}.feed_forward.w1.weight": (ffn, size["dim"]),
            f"{block}.feed_forward.w2.weight": (size["dim"], ffn),
            f"{block}.feed_forward.w3.weight": (ffn, size["dim"]),
        }
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def training_state(seed: int = 0) -> dict[str, Tensor]:
    """What their trainer saves after a sample was drawn: prefix, tokenizer, key-value caches."""
    torch.manual_seed(seed)
    first = config_from_release(FIRST_STAGE)
    ours = MergeVQ(first).state_dict()
    tokenizer = {theirs: torch.randn_like(ours[name]) for name, theirs in release_keys(first).items()}
    tokenizer["encoder.conv_out.weight"] = tokenizer["encoder.conv_out.weight"][..., None, None]
    return {
        **{f"transformer.{name}": tensor for name, tensor in release_state(seed).items()},
        **{f"first_stage_model.{name}": tensor for name, tensor in tokenizer.items()},
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(2),
        # The generator saw the tokens of the weights above, not of the averaged ones.
        "first_stage_model.model_ema.decoderconv_outbias": torch.zeros(3),
        "transformer.spatial_blocks.1.attention.kv_cache.k_cache": torch.zeros(2, 4, 24, 8),
        "transformer.factorized_blocks.0.attention.kv_cache.v_cache": torch.zeros(2, 4, 24, 8),
    }


def test_every_tensor_has_its_place() -> None:
    state = release_state()
    model = generator_from_release(state, OPTIONS)
    ours = model.state_dict()
    table = generator_release_keys(model.config)
    assert set(table) == set(ours)
    assert sorted(name for theirs in table.values() for name in theirs) == sorted(state)
    for name, theirs in table.items():
        assert torch.equal(ours[name], torch.cat([state[n] for n in theirs])), name
    assert not model.training


def test_configuration_is_that_of_the_release() -> None:
    config = generator_from_release(release_state(), OPTIONS).config
    assert config == GeneratorConfig(
        order="raster",
        grid=(4, 4),
        num_bits=10,
        groups=(4, 6),
        num_classes=7,
        num_tokens=16,
        trained_num_tokens=(16, 16),
        width=32,
        depth=2,
        group_depth=1,
        heads=4,
        prefix_position="zero",
        instruction=False,
        token_dropout=0.2,
        dropout=0.3,
        mask=MaskConfig(recent=None),
    )


def test_the_table_of_converted_fields_is_the_conversion() -> None:
    text = (Path(__file__).parents[2] / "docs" / "differences.md").read_text()
    section = text.split("## Converted checkpoints")[1].split("### Generators")[1].split("###")[0]
    rows = {
        cells[0]: cells[1:3]
        for cells in ([cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in section.splitlines())
        if len(cells) == 4
    }
    converted = generator_from_release(release_state(), OPTIONS).config
    for name in ("mask.recent", "instruction", "prefix_position", "tokenizer"):
        value = attrgetter(name)(converted)
        assert rows[name][0] == str(value).lower(), name
        assert name == "tokenizer" or rows[name][1] == str(attrgetter(name)(GeneratorConfig())).lower(), name
    explained = {name.split(".")[0] for name in rows}
    differing = {f.name for f in fields(converted) if getattr(converted, f.name) != getattr(GeneratorConfig(), f.name)}
    sizes = {"grid", "num_bits", "groups", "num_classes", "num_tokens", "width", "depth", "group_depth", "heads"}
    assert differing - sizes - {"token_dropout"} <= explained


@pytest.mark.parametrize(
    ("options", "sizes", "field", "value"),
    [
        ({"n_kv_head": 2}, {"kv": 16}, "kv_heads", 2),
        ({}, {"kv": 8}, "kv_heads", 1),
        ({"norm_eps": "1e-6"}, {}, "norm_eps", 1e-6),
        ({"rope_base": 500}, {}, "rotary_base", 500.0),
        ({"multiple_of": 32}, {"ffn": 96}, "ffn_width", 96),
        ({"multiple_of": 16, "ffn_dim_multiplier": 1.5}, {"ffn": 128}, "ffn_width", 128),
        ({}, {"ffn": 100}, "ffn_width", 100),
        ({"token_drop": None, "token_dropout_p": 0.25}, {}, "token_dropout", 0.25),
        ({"class_dropout_prob": 0.2}, {}, "class_dropout", 0.2),
        ({"dim": None, "n_embd": 32, "spatial_n_layer": None, "n_layer": 2}, {}, "width", 32),
        ({"class_num": None}, {"classes": 3}, "num_classes", 2),
        ({"factorized_bits": None}, {"pre": 8, "post": 32}, "groups", (3, 5)),
    ],
)
def test_options_and_tensors_give_the_field(options: dict, sizes: dict, field: str, value: object) -> None:
    model = generator_from_release(release_state(**sizes), OPTIONS | options)
    assert getattr(model.config, field) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 64}, "expected dim 32, as the checkpoint's tensors say, got 64"),
        ({"n_embd": 64}, "n_embd 32"),
        ({"spatial_n_layer": 3}, "spatial_n_layer 2"),
        ({"factorized_n_layer": 2}, "factorized_n_layer 1"),
        ({"n_kv_head": 2}, "n_kv_head 4"),
        ({"class_num": 8}, "class_num 7"),
        ({"factorized_bits": [6, 4]}, r"factorized_bits \[4, 6\]"),
        ({"multiple_of": 32}, "feed-forward width 256, got 96"),
        ({"token_factorization": False}, "token_factorization 1"),
        ({"cls_token_num": 4}, "cls_token_num 1"),
        ({"n_head": None}, "n_head and block_size"),
        ({"block_size": None}, "n_head and block_size"),
        ({"block_size": 15}, "square block_size"),
        ({"n_head": 5}, "n_head to divide"),
        ({"n_head": "many"}, "n_head to be a number"),
        ({"n_head": 2.5}, "n_head to be a whole number"),
        ({"resid_dropout_p": 1.0}, "dropout in 0..1"),
    ],
)
def test_contradictions_are_refused_in_one_line(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        generator_from_release(release_state(), OPTIONS | options)
    assert "\n" not in str(caught.value)


def test_a_narrow_feed_forward_layer_cannot_be_ours() -> None:
    with pytest.raises(ConfigError, match="at least 8/3 of the width, 85, got 64"):
        generator_from_release(release_state(ffn=64), OPTIONS)


def test_conversion_is_strict_both_ways() -> None:
    state = release_state()
    for name in ("spatial_blocks.1.attention.wo.weight", "head.1.weight", "class_emb.embedding_table.weight"):
        with pytest.raises(CheckpointError, match=rf"missing.*{name}|{name} is missing"):
            generator_from_release({k: v for k, v in state.items() if k != name}, OPTIONS)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(surprise\)"):
        generator_from_release({**state, "surprise": torch.zeros(1)}, OPTIONS)
    gap = {k.replace("spatial_blocks.1", "spatial_blocks.2"): v for k, v in state.items()}
    with pytest.raises(CheckpointError, match=r"7 tensors missing \(spatial_blocks.1"):
        generator_from_release(gap, OPTIONS | {"spatial_n_layer": 3})
    for name, shape in {
        "norm.weight": (31,),
        "head.0.weight": (64, 32),
        "spatial_blocks.0.feed_forward.w3.weight": (256, 31),
        "factorized_blocks.0.feed_forward.w1.weight": (255, 32),
        "pre_emb.weight": (15, 32),
        "post_emb.weight": (64,),
    }.items():
        with pytest.raises(CheckpointError) as caught:
            generator_from_release({**state, name: torch.zeros(shape)}, OPTIONS)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="release's stage 2"):
        generator_from_release({"encoder.conv_in.weight": torch.zeros(1)}, OPTIONS)


def test_training_state_gives_the_generator_alone_and_a_whole_file_its_options() -> None:
    plain, whole = generator_from_release(release_state(), OPTIONS), generator_from_release(training_state(), FILE)
    assert plain.fingerprint() == whole.fingerprint()


def test_averaged_weights_win() -> None:
    state, averaged = training_state(1), release_state(2)
    state |= {"model_ema." + f"transformer.{name}".replace(".", ""): tensor for name, tensor in averaged.items()}
    state["model_ema.decay"] = torch.tensor(0.999)
    assert generator_from_release(state, FILE).fingerprint() == generator_from_release(averaged, FILE).fingerprint()
    raw = generator_from_release(state, FILE, weights="raw")
    assert raw.fingerprint() == generator_from_release(release_state(1), FILE).fingerprint()
    with pytest.raises(CheckpointError, match="found none"):
        generator_from_release(release_state(), OPTIONS, weights="ema")


def test_a_configuration_of_ours_is_made_to_be_the_release() -> None:
    expected = generator_from_release(release_state(), OPTIONS)
    config = replace(expected.config, instruction=True, prefix_position="identity", mask=MaskConfig(recent=2))
    model = generator_from_release(release_state(), config)
    assert model.config == expected.config
    with pytest.raises(ConfigError, match="two bit groups"):
        generator_from_release(release_state(), replace(config, groups=(10,)))
    with pytest.raises(CheckpointError, match="misshaped"):
        generator_from_release(release_state(), replace(config, groups=(6, 4)))


def test_half_precision_becomes_float32() -> None:
    state = {name: tensor.half() for name, tensor in release_state().items()}
    model = generator_from_release(state, OPTIONS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_files_say_themselves_what_they_hold(tmp_path: Path) -> None:
    state = training_state()
    save_file(state, tmp_path / "second.safetensors")
    torch.save({"state_dict": release_state()}, tmp_path / "bare.ckpt")
    (tmp_path / "file.json").write_text(json.dumps(FILE))
    (tmp_path / "params.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in OPTIONS.items()))
    both = read_release(tmp_path / "second.safetensors", tmp_path / "file.json")
    bare = read_release(tmp_path / "bare.ckpt", tmp_path / "params.yaml")
    assert isinstance(both, MergeAR)
    assert isinstance(bare, MergeAR)
    assert both.fingerprint() == bare.fingerprint()
    inside = read_release(tmp_path / "second.safetensors", tmp_path / "file.json", part="tokenizer")
    first = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in state.items()
        if name.startswith("first_stage_model.")
    }
    assert isinstance(inside, MergeVQ)
    assert inside.fingerprint() == tokenizer_from_release(first, FIRST_STAGE, weights="raw").fingerprint()
    with pytest.raises(CheckpointError, match="stage 2"):
        save_file(first, tmp_path / "first.safetensors")
        read_release(tmp_path / "first.safetensors", tmp_path / "file.json", part="generator")
    (tmp_path / "odd.json").write_text(json.dumps({"model": {"init_args": {"transformer_config": [1]}}}))
    with pytest.raises(ConfigError, match="under transformer_config"):
        read_release(tmp_path / "bare.ckpt", tmp_path / "odd.json")
