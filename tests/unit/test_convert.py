"""Reading the authors' files: every configuration, strict both ways, no code from a pickle."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergevq import presets
from mergevq.convert import read_release, tokenizer_from_release
from mergevq.errors import CheckpointError, ConfigError
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.release import config_from_release, release_keys
from mergevq.training.state import differing_fields

SMALL = {
    "double_z": False,
    "z_channels": 10,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "num_att_blocks": 2,
    "num_heads": 4,
    "merge_num": 192,
}
RELEASE = {
    "g_256": {"ch": 64, "ch_mult": [1, 2, 4, 8], "num_heads": 8, "dist_head": True, "merge_num": 768},
    "g_256_d32": {"ch": 32, "ch_mult": [2, 4, 8, 12], "num_heads": 8, "dist_head": True, "merge_num": 768},
    "gr_256": {"ch": 64, "ch_mult": [1, 1, 2, 4, 8], "num_heads": 8, "dist_head": "layer3", "merge_num": 112},
    "gr_256_d96": {"ch": 96, "ch_mult": [1, 1, 2, 4, 8], "num_heads": 12, "dist_head": "layer3", "merge_num": 112},
    "gr_256_d32": {"ch": 32, "ch_mult": [2, 2, 4, 8, 12], "num_heads": 8, "dist_head": "layer3", "merge_num": 112},
    "r_256": {
        "ch": 64,
        "ch_mult": [1, 1, 2, 4, 8],
        "isotropic": 768,
        "head_dim": 64,
        "dist_head": "layer3",
        "merge_num": 192,
        "cand_distribution": "gaussian-6",
    },
}


def release_state(ddconfig: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict under the authors' names, as their trainer saves it, with random weights."""
    config = config_from_release(ddconfig)
    torch.manual_seed(seed)
    ours = MergeVQ(config).state_dict()
    state = {theirs: torch.randn_like(ours[name]) for name, theirs in release_keys(config).items()}
    state["encoder.conv_out.weight"] = state["encoder.conv_out.weight"][..., None, None]
    return state


@pytest.mark.parametrize("name", RELEASE)
def test_every_released_configuration_is_the_preset_it_claims(name: str) -> None:
    common = {"z_channels": 18, "resolution": 256, "num_res_blocks": 4, "num_att_blocks": 12, "num_classes": 768}
    config = config_from_release(common | RELEASE[name])
    preset = presets.tokenizer(name).model
    for part in ("width", "downsampling", "depth", "heads", "kind"):
        assert getattr(config.encoder, part) == getattr(preset.encoder, part), part
    assert config.decoder == preset.decoder
    assert config.alignment == replace(preset.alignment, view_tokens="same_count")
    with torch.device("meta"):
        tensors = MergeVQ(config).state_dict()
    # One to one: each of our tensors has a source, each of theirs a use.
    table = release_keys(config)
    assert set(table) == set(tensors)
    assert len(set(table.values())) == len(table)


@pytest.mark.parametrize("name", RELEASE)
def test_a_training_may_start_from_every_released_tokenizer(name: str) -> None:
    common = {"z_channels": 18, "resolution": 256, "num_res_blocks": 4, "num_att_blocks": 12, "num_classes": 768}
    given, own = config_from_release(common | RELEASE[name]), presets.tokenizer(name).model
    if name == "r_256":  # The release's ViT has no positions: such weights need a run without them.
        assert differing_fields(given, own, ["recovery"]) == ["model.encoder.position ('none' there, 'sincos' here)"]
        own = replace(own, encoder=replace(own.encoder, position="none"))
    assert differing_fields(given, own, ["recovery"]) == []
    # A file that was converted when the field still said something else.
    other = replace(given.encoder, **({"patch_size": 8} if given.encoder.kind == "hybrid" else {"stem_stride": 2}))
    assert differing_fields(replace(given, encoder=other), own, ["recovery"]) == []


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dist_head": True, "num_classes": 20},
        {"dist_head": "layer2"},
        {"dist_head": "layer3", "num_rep_blocks": 2},
        {"isotropic": 64, "head_dim": 16},
        {"isotropic": True, "dist_head": "layer3"},
        {"num_res_blocks": [2, 1, 3]},
        {"num_res_extra": 2},
        {"z_channels": 18, "unheard_of": 1},
        {"merge_num": None, "merge_ratio": 20},
    ],
)
def test_every_option_converts(change: dict) -> None:
    ddconfig = SMALL | change
    state = release_state(ddconfig)
    model = tokenizer_from_release(state, ddconfig)
    for name, theirs in release_keys(model.config).items():
        assert torch.equal(model.state_dict()[name], state[theirs].view_as(model.state_dict()[name])), name
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    tokens = model.encode(images, 100)
    assert tokens.index.shape == (1, 100)
    assert torch.isfinite(model.decode(tokens)).all()


def test_merge_ratio_is_merges_per_block() -> None:
    # 1.5 * 20 falling to 10 over two blocks.
    assert config_from_release(SMALL | {"merge_num": None, "merge_ratio": 20}).num_tokens == 256 - 40


def test_averaged_weights_win_and_other_networks_are_left_out() -> None:
    raw, averaged = release_state(SMALL, 1), release_state(SMALL, 2)
    full = {
        **raw,
        **{"model_ema." + name.replace(".", ""): tensor for name, tensor in averaged.items()},
        "model_ema.decay": torch.tensor(0.999),
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "dist_model.embeddings.cls_token": torch.zeros(2),
        "recovery.rec_tokens": torch.zeros(2),
    }
    assert torch.equal(tokenizer_from_release(full, SMALL).decoder.out.weight, averaged["decoder.conv_out.weight"])
    last = tokenizer_from_release(full, SMALL, weights="raw")
    assert torch.equal(last.decoder.out.weight, raw["decoder.conv_out.weight"])
    with pytest.raises(CheckpointError, match="found none"):
        tokenizer_from_release(raw, SMALL, weights="ema")


def test_conversion_is_strict_both_ways() -> None:
    state = release_state(SMALL)
    missing = {k: v for k, v in state.items() if k != "decoder.conv_in.bias"}
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(decoder.conv_in.bias\)"):
        tokenizer_from_release(missing, SMALL)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(encoder.surprise\)"):
        tokenizer_from_release({**state, "encoder.surprise": torch.zeros(1)}, SMALL)
    with pytest.raises(CheckpointError, match="conv_in"):
        tokenizer_from_release({**state, "decoder.conv_in.bias": torch.zeros(3)}, SMALL)
    with pytest.raises(ConfigError, match="ch_mult missing"):
        config_from_release({k: v for k, v in SMALL.items() if k != "ch_mult"})


def test_files(tmp_path: Path) -> None:
    state = release_state(SMALL)
    (tmp_path / "c.json").write_text(json.dumps({"model": {"init_args": {"ddconfig": SMALL}}}))
    (tmp_path / "c.yaml").write_text("ddconfig:\n" + "".join(f"  {k}: {json.dumps(v)}\n" for k, v in SMALL.items()))
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "x.ckpt")
    save_file(state, tmp_path / "x.safetensors")
    models = [
        read_release(tmp_path / ckpt, tmp_path / config)
        for ckpt, config in (("x.ckpt", "c.json"), ("x.safetensors", "c.yaml"))
    ]
    assert models[0].fingerprint() == models[1].fingerprint()

    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    (tmp_path / "bomb.ckpt").write_bytes(pickle.dumps(Bomb()))
    torch.save({"state_dict": {"x": Bomb()}}, tmp_path / "bomb2.ckpt")
    for bad in ("bomb.ckpt", "bomb2.ckpt", "absent.ckpt"):
        with pytest.raises(CheckpointError, match=r"not unpickled|not there") as caught:
            read_release(tmp_path / bad, tmp_path / "c.json")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()
    for name, text in {"a.yaml": "[1, 2", "b.yaml": "- 1", "c2.json": "{", "absent.yaml": None}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match="expected"):
            read_release(tmp_path / "x.ckpt", tmp_path / name)
