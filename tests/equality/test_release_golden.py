"""The authors' tokenizer, converted, computes what the authors' code computed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergevq.convert import release_keys, tokenizer_from_release
from mergevq.merging import SourceMap, merge_schedule, unmerge
from mergevq.tokenizer.model import MergeVQ

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
NAME = "tok_c_z10_nohead"
K = 64


@pytest.fixture(scope="module")
def meta() -> dict:
    return json.loads((GOLDEN / "tok_meta.json").read_text())[NAME]


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{NAME}.io.safetensors")


@pytest.fixture(scope="module")
def model(meta: dict) -> MergeVQ:
    weights = load_file(GOLDEN / f"{NAME}.weights.safetensors")
    return tokenizer_from_release({k: v.float() for k, v in weights.items()}, meta["ddconfig"])


def test_stem_stack_and_decoder(model: MergeVQ, io: dict, meta: dict) -> None:
    with torch.no_grad():
        features = model.encoder.stem(io["x"]).flatten(2).mT
        torch.testing.assert_close(features, io[f"K{K}.enc_feat_tokens"], atol=1e-5, rtol=0)
        schedule = merge_schedule(256, K, 4, overflow="clip")
        assert list(schedule) == meta["r_lists"][str(K)]
        out = model.encoder(io["x"], schedule)
        expected = io[f"K{K}.enc_attn_out"]
        torch.testing.assert_close(out.class_token, expected[:, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(out.tokens, expected[:, 1:], atol=1e-5, rtol=0)
        sizes = SourceMap(out.source, torch.full((2,), K)).sizes()
        assert torch.equal(sizes.float(), io[f"K{K}.size"][:, 1:, 0])
        assert torch.equal(out.source, io[f"K{K}.source"][:, 1:, 1:].argmax(1))
        z = model.encoder.to_codes(out.tokens)
        torch.testing.assert_close(z, io[f"K{K}.z"].flatten(2).mT, atol=1e-5, rtol=0)
        quantized = model.quantizer(z)
        torch.testing.assert_close(quantized.codes, io[f"K{K}.quant"].flatten(2).mT, atol=1e-5, rtol=0)
        unmerged = unmerge(quantized.codes, out.source).mT.unflatten(2, (16, 16))
        assert torch.equal(unmerged.sign(), io[f"K{K}.unmerged"].sign())
        torch.testing.assert_close(model.decoder(unmerged), io[f"K{K}.recon"], atol=1e-4, rtol=0)


def test_public_api(model: MergeVQ, io: dict) -> None:
    tokens = model.encode(io["x"], num_tokens=K)
    assert torch.equal(tokens.index.flatten(), io[f"K{K}.indices"])
    assert tokens.source is not None
    assert torch.equal(tokens.source.index, io[f"K{K}.source"][:, 1:, 1:].argmax(1))
    torch.testing.assert_close(model.decode(tokens), io[f"K{K}.recon"], atol=1e-4, rtol=0)


def test_losses_and_gradients(model: MergeVQ, io: dict, meta: dict) -> None:
    model.zero_grad()
    out = model(io["x"], meta["train_K"])
    l1 = (out.reconstruction - io["x"]).abs().mean()
    aux = out.quantized.sample_entropy - out.quantized.codebook_entropy
    total = l1 + 0.1 * aux + 0.25 * out.quantized.commitment
    got = torch.stack(
        [l1, aux, out.quantized.sample_entropy, out.quantized.codebook_entropy, out.quantized.commitment, total]
    )
    torch.testing.assert_close(got, io["train.losses"], rtol=1e-4, atol=1e-6)

    total.backward()
    names = {theirs: ours for ours, theirs in release_keys(model.config).items()}
    gradients = {ours: p.grad for ours, p in model.named_parameters()}
    for theirs, norm in zip(meta["grad_norm_names"], io["train.grad_norms"].tolist(), strict=True):
        got_norm = gradients[names[theirs]].norm().item()
        assert got_norm == pytest.approx(norm, rel=1e-3, abs=1e-7), theirs
    for key, expected in io.items():
        if key.startswith("train.grad."):
            gradient = gradients[names[key.removeprefix("train.grad.")]].view_as(expected)
            assert (gradient - expected).norm() <= 1e-3 * expected.norm(), key
