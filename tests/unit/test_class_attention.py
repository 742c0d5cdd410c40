"""The class token's attention, against a softmax over copies of every token."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from mergevq.errors import ConfigError, ShapeError
from mergevq.layers.attention import SelfAttention
from mergevq.tokenizer.class_attention import class_attention
from mergevq.tokenizer.encoder import MergingBlock
from mergevq.tokenizer.model import MergeVQ


def _recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[MergingBlock, Tensor, Tensor | None, Tensor]]:
    """What went into every merging block: block, tokens, sizes, source."""
    seen = []
    real = MergingBlock.merge

    def merge(self: MergingBlock, x: Tensor, sizes: Tensor | None, source: Tensor, *others: Any) -> Any:
        seen.append((self, x, sizes, source))
        return real(self, x, sizes, source, *others)

    monkeypatch.setattr(MergingBlock, "merge", merge)
    return seen


@pytest.mark.parametrize("num_tokens", [None, 64, 20, 1])
@pytest.mark.parametrize("number", [0, 1])
def test_it_is_the_softmax_over_unmerged_copies(
    tiny_tokenizer: MergeVQ, images: Tensor, monkeypatch: pytest.MonkeyPatch, num_tokens: int | None, number: int
) -> None:
    found = class_attention(tiny_tokenizer, images, num_tokens, block=number)
    assert found.shape == (3, 2, 8, 8)
    seen = _recorded(monkeypatch)
    tiny_tokenizer.encode(images, 64 if num_tokens is None else num_tokens)
    block, x, sizes, source = seen[number]
    assert (sizes is None) == (number == 0 or num_tokens in (None, 64))
    # Attention that is proportional to sizes is plain attention to one copy of the token for each of its patches.
    weight, bias = block.attn.qkv.weight.double(), block.attn.qkv.bias.double()
    for b in range(3):
        copies = torch.cat([x[b, :1], x[b, 1:][source[b]]]).double()
        y = layer_norm(copies, copies.shape[-1:], block.norm1.weight.double(), block.norm1.bias.double())
        q, k = (y @ weight.T + bias)[:, :32].chunk(2, dim=1)
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            logits = torch.stack([(q[0, part] * key[part]).sum() / 8**0.5 for key in k])
            expected = (logits.exp() / logits.exp().sum())[1:].reshape(8, 8)
            torch.testing.assert_close(found[b, head].double(), expected, atol=1e-7, rtol=1e-5)


def test_the_row_is_what_attention_reads_by() -> None:
    rng = torch.Generator().manual_seed(0)
    attn = SelfAttention(12, 3)
    x, sizes = torch.randn(2, 9, 12, generator=rng), torch.randint(1, 5, (2, 9), generator=rng).float()
    values = attn.qkv(x)[..., 24:].unflatten(2, (3, 4)).transpose(1, 2)
    for given in (None, sizes):
        read = (attn.first_row(x, given)[..., None] * values).sum(2).flatten(1)
        torch.testing.assert_close(attn.proj(read), attn(x, given)[0][:, 0])


def test_blocks_are_counted_from_either_end_and_attend_before_they_merge(
    tiny_tokenizer: MergeVQ, images: Tensor
) -> None:
    assert torch.equal(class_attention(tiny_tokenizer, images, 9), class_attention(tiny_tokenizer, images, 9, block=1))
    first = class_attention(tiny_tokenizer, images, block=0)
    assert torch.equal(class_attention(tiny_tokenizer, images, 9, block=-2), first)
    assert not torch.allclose(class_attention(tiny_tokenizer, images, 9), class_attention(tiny_tokenizer, images))
    for block in (2, -3):
        with pytest.raises(ConfigError, match=rf"block in -2..1 \(2 attention blocks\), got {block}"):
            class_attention(tiny_tokenizer, images, block=block)


def test_nothing_stays_behind(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    def held() -> list[tuple[str, list[str], int]]:
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        return [
            (name, sorted(vars(module)), sum(len(getattr(module, hook)) for hook in hooks))
            for name, module in tiny_tokenizer.named_modules()
        ]

    before, weights = held(), {name: value.clone() for name, value in tiny_tokenizer.state_dict().items()}
    tiny_tokenizer.train()
    assert not class_attention(tiny_tokenizer, images, 20).requires_grad
    assert tiny_tokenizer.training and held() == before
    assert all(torch.equal(value, weights[name]) for name, value in tiny_tokenizer.state_dict().items())


def test_it_is_float32_under_autocast(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = class_attention(tiny_tokenizer, images, 20)
    assert torch.equal(found, class_attention(tiny_tokenizer, images, 20))


def test_wrong_input_is_named(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"1\.\.64"):
        class_attention(tiny_tokenizer, images, 65)
    with pytest.raises(ShapeError, match="multiples of 4"):
        class_attention(tiny_tokenizer, images[..., :30])
    with torch.no_grad():
        tiny_tokenizer.encoder.get_parameter("blocks.1.norm1.weight")[0] = torch.nan
    with pytest.raises(ShapeError, match="finite attention"):
        class_attention(tiny_tokenizer, images)
