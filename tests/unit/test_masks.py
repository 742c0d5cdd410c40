"""The merge mask against the paper's picture, and against its definition word by word."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq.generator.config import MaskConfig
from mergevq.generator.masks import attention_bias, key_counts, merge_mask


def test_the_picture_of_nine_tokens() -> None:
    # Figure 6: the number of each token is the first position of its kind. I is the token being produced, which is
    # never a key; R recent and C cached ones are seen, E evicted ones are not.
    source = torch.tensor([[1, 1, 3, 3, 5, 5, 5, 8, 8]])
    picture = (
        "I........",
        "RI.......",
        "RRI......",
        "CRRI.....",
        "CERRI....",
        "CECRRI...",
        "CECERRI..",
        "CECECRRI.",
        "CECECERRI",
    )
    expected = torch.tensor([[letter in "RC" for letter in row] for row in picture])
    assert torch.equal(merge_mask(source, MaskConfig(recent=2))[0], expected)


# ------------------------------------------------------------------------------------------------------ word by word


def sees(index: list[int], t: int, j: int, recent: int, keep: str) -> bool:
    if not j < t:
        return False
    if t - j <= recent:
        return True
    if keep == "first":
        return all(index[i] != index[j] for i in range(len(index)) if i < j)
    return all(index[i] != index[j] for i in range(len(index)) if j < i < t - recent)


def count(index: list[int], t: int, j: int, recent: int) -> int:
    if t - j <= recent:
        return 1
    return sum(index[i] == index[j] for i in range(len(index)) if i < t - recent)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12).flatmap(
        lambda length: st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), min_size=1, max_size=3)
    ),
    recent=st.integers(1, 14),
    keep=st.sampled_from(["first", "last"]),
    prefix=st.integers(1, 2),
)
def test_mask_counts_and_bias_are_their_definition(rows: list[list[int]], recent: int, keep: Any, prefix: int) -> None:
    index, length = torch.tensor(rows), len(rows[0])
    mask = MaskConfig(recent=recent, keep=keep, proportional=True)
    seen, counts = merge_mask(index, mask), key_counts(index, mask)
    bias = attention_bias(index, mask, prefix)
    flat = attention_bias(index, MaskConfig(recent=recent, keep=keep), prefix)
    assert bias is not None and flat is not None and bias.shape[-1] == prefix + length - 1
    for b, row in enumerate(rows):
        for t in range(length):
            slot = prefix - 1 + t
            assert bias[b, 0, slot, :prefix].tolist() == [0] * prefix
            for j in range(length):
                assert bool(seen[b, t, j]) == sees(row, t, j, recent, keep)
                if j == length - 1:
                    continue
                log = math.log(count(row, t, j, recent)) if sees(row, t, j, recent, keep) else -math.inf
                assert bias[b, 0, slot, prefix + j].item() == pytest.approx(log)
                assert flat[b, 0, slot, prefix + j] == (0 if sees(row, t, j, recent, keep) else -math.inf)
                if sees(row, t, j, recent, keep):
                    assert counts[b, t, j] == count(row, t, j, recent)
    for slot in range(prefix - 1):
        assert bias[:, 0, slot].isneginf().equal((torch.arange(bias.shape[-1]) > slot).expand(len(rows), -1))


def test_what_stands_for_older_tokens_adds_up_to_them() -> None:
    index = torch.randint(3, (4, 20), generator=torch.Generator().manual_seed(0))
    old = torch.arange(20)[:, None] - torch.arange(20) > 2
    for keep in ("first", "last"):
        mask = MaskConfig(keep=keep, proportional=True)
        visible_old = merge_mask(index, mask) & old
        total = (key_counts(index, mask) * visible_old).sum(2)
        assert torch.equal(total, (torch.arange(20) - 2).clamp_min(0).expand(4, -1))


def test_plain_causal_needs_no_bias() -> None:
    index = torch.zeros(2, 5, dtype=torch.int64)
    assert attention_bias(index, MaskConfig(recent=None), 2) is None
    assert torch.equal(merge_mask(index, MaskConfig(recent=None))[1], torch.ones(5, 5).tril(-1).bool())
