"""The references that the benchmarks compare with compute the same thing."""

from dataclasses import replace

import pytest
import torch

from benchmarks import lfq
from benchmarks.measure import extra_memory, markdown
from benchmarks.plain_tokenizer import PlainTokenizer
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ


def test_the_plain_tokenizer_is_the_same_network(tiny_config: TokenizerConfig) -> None:
    encoder = replace(tiny_config.encoder, stem_stride=1)
    decoder = replace(tiny_config.decoder, output_stride=1)
    quantizer = replace(tiny_config.quantizer, norm="none")
    config = replace(tiny_config, encoder=encoder, decoder=decoder, quantizer=quantizer)
    torch.manual_seed(0)
    model = MergeVQ(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = PlainTokenizer(config, model.state_dict())
    for kept in (256, 100, 70):
        with torch.no_grad():
            torch.testing.assert_close(
                plain.reconstruct(images, kept), model.reconstruct(images, kept), atol=1e-4, rtol=1e-4
            )


def test_brute_force_is_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfq, "BITS", 8)
    z = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * 0.05
    torch.testing.assert_close(lfq.ours(z), lfq.brute_force(z))


def test_tables() -> None:
    table = markdown("T", [{"a": 1, "b": 0.12345}, {"a": 2, "b": None}], "note")
    assert table.splitlines()[-1] == "| 2 | - |"
    assert "| 1 | 0.123 |" in table


def test_extra_memory_is_the_childs_own() -> None:
    held = torch.ones(60 * 2**20)  # 240 MiB in this process must not count, nor hide what the child takes
    code = "def warm(): torch.ones(10)\ndef step(): return torch.ones(50 * 2**20).sum()"
    extra = extra_memory(code)
    assert extra is None or 190 < extra < 230
    assert held.sum() == held.numel()
