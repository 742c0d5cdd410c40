"""`mergevq convert` of a training state that holds a generator and its tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergevq.cli.main import main
from mergevq.generator.raster import MergeAR
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokenizer.release import config_from_release, release_keys

OPTIONS = {"n_head": 2, "block_size": 64, "factorized_bits": [4, 6], "class_num": 3}
FIRST_STAGE = {
    **{"z_channels": 10, "resolution": 32, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "num_att_blocks": 1},
    **{"num_heads": 4, "merge_num": 0},
}


@pytest.fixture
def release(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoint and configuration, as their trainer would leave them."""
    shapes = {
        "pre_emb.weight": (16, 8),
        "post_emb.weight": (64, 8),
        "class_emb.embedding_table.weight": (4, 8),
        "norm.weight": (8,),
        "head.0.weight": (16, 8),
        "head.1.weight": (64, 8),
    }
    for block in ("spatial_blocks.0", "factorized_blocks.0"):
        shapes |= {f"{block}.attention.wqkv.weight": (24, 8), f"{block}.attention.wo.weight": (8, 8)}
        shapes |= {f"{block}.attention_norm.weight": (8,), f"{block}.ffn_norm.weight": (8,)}
        shapes |= {f"{block}.feed_forward.{name}.weight": (256, 8) for name in ("w1", "w3")}
        shapes |= {f"{block}.feed_forward.w2.weight": (8, 256)}
    torch.manual_seed(0)
    state = {f"transformer.{name}": torch.randn(shape) for name, shape in shapes.items()}
    config = config_from_release(FIRST_STAGE)
    ours = MergeVQ(config).state_dict()
    for name, theirs in release_keys(config).items():
        state[f"first_stage_model.{theirs}"] = ours[name].clone()
    kernel = state["first_stage_model.encoder.conv_out.weight"]
    state["first_stage_model.encoder.conv_out.weight"] = kernel[..., None, None]
    save_file(state, tmp_path / "last.safetensors")
    init = {
        "transformer_config": {"params": OPTIONS},
        "first_stage_config": {"params": {"ddconfig": FIRST_STAGE}},
    }
    (tmp_path / "file.json").write_text(json.dumps({"model": {"init_args": init}}))
    return tmp_path / "last.safetensors", tmp_path / "file.json"


def test_the_generator_is_converted_unless_its_tokenizer_is_asked_for(
    tmp_path: Path, release: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, file = release
    command = ["convert", str(checkpoint), "--from", "release", "--config", str(file), "-o"]
    assert main([*command, str(tmp_path / "g.safetensors")]) == 0
    gen = MergeAR.from_pretrained(tmp_path / "g.safetensors")
    assert gen.config.grid == (8, 8) and not gen.config.instruction
    said = capsys.readouterr().out
    assert f"generator {gen.fingerprint()[:12]}" in said
    assert f"{sum(p.numel() for p in gen.parameters()):,} parameters" in said
    assert main(["info", str(tmp_path / "g.safetensors")]) == 0
    said = capsys.readouterr().out
    assert gen.fingerprint() in said and "plain causal mask" in said and "10 bits in groups of 4, 6" in said
    assert main([*command, str(tmp_path / "t.safetensors"), "--part", "tokenizer"]) == 0
    tok = MergeVQ.from_pretrained(tmp_path / "t.safetensors")
    assert f"tokenizer {tok.fingerprint()[:12]}" in capsys.readouterr().out
    gen.check_tokens_of(grid=(8, 8), num_bits=tok.config.num_bits, tokenizer=tok.fingerprint())
    images = tok.decode(gen.generate([2, 0], guidance=(1.9, 2.0), seeds=[1, 2]))
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    assert main([*command, str(tmp_path / "g.safetensors")]) == 2
    assert "exists already" in capsys.readouterr().err
