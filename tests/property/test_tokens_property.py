"""Tokens of any kind survive a file, and from_full_index does what its definition says."""

import math
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq.files import load_tensors
from mergevq.merging import SourceMap
from mergevq.tokens import MergedTokens, load_tokens, save_tokens


@st.composite
def merged_tokens(draw: st.DrawFn) -> MergedTokens:
    """Tokens of any grid, num_bits and mix of K, with and without a source map, which need not use every token."""
    grid = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    patches = grid[0] * grid[1]
    counts = draw(st.lists(st.integers(1, patches), min_size=1, max_size=6))
    num_bits = draw(st.integers(1, 30))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_tokens = torch.tensor(counts)
    index = torch.randint(2**num_bits, (len(counts), max(counts)), generator=rng)
    index[torch.arange(max(counts)) >= num_tokens[:, None]] = 0
    source = None
    if draw(st.booleans()):
        draws = torch.rand(len(counts), patches, generator=rng, dtype=torch.float64)
        source = SourceMap((draws * num_tokens[:, None]).long(), num_tokens)
    tokenizer = draw(st.none() | st.text(max_size=8))
    return MergedTokens(index, source, grid, num_bits, tokenizer, num_tokens)


@settings(max_examples=60, deadline=None)
@given(tokens=merged_tokens())
def test_a_file_returns_what_it_was_given_and_has_the_promised_size(tokens: MergedTokens) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.mvq"
        save_tokens(path, tokens)
        assert load_tokens(path).equal(tokens)
        tensors, _ = load_tensors(path)
    counts = tokens.num_tokens.tolist()
    patches = tokens.grid[0] * tokens.grid[1]
    assert tensors["index"].numel() == sum(math.ceil(k * tokens.num_bits / 8) for k in counts)
    if tokens.source is None:
        assert "source" not in tensors
    else:
        assert tensors["source"].numel() == sum(math.ceil(patches * math.ceil(math.log2(k)) / 8) for k in counts)


@settings(max_examples=60, deadline=None)
@given(tokens=merged_tokens())
def test_parts_joined_are_the_whole(tokens: MergedTokens) -> None:
    assert MergedTokens.join(list(tokens)).equal(tokens)


@settings(max_examples=100, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 4),
    num_bits=st.integers(1, 6) | st.just(30),
    seed=st.integers(0, 2**31),
)
def test_from_full_index_equals_its_definition(grid: tuple[int, int], batch: int, num_bits: int, seed: int) -> None:
    patches = grid[0] * grid[1]
    full = torch.randint(2**num_bits, (batch, patches), generator=torch.Generator().manual_seed(seed))
    tokens = MergedTokens.from_full_index(full, grid, num_bits)
    assert torch.equal(tokens.full_index(), full)
    assert tokens.source is not None
    for b, row in enumerate(full.tolist()):
        position_cache = [row.index(value) for value in row]
        firsts = [t for t in range(patches) if position_cache[t] == t]
        assert tokens.num_tokens[b] == len(firsts)
        assert tokens.index[b, : len(firsts)].tolist() == [row[t] for t in firsts]
        assert tokens.source.index[b].tolist() == [firsts.index(first) for first in position_cache]
        assert tokens.source.first()[b, : len(firsts)].tolist() == firsts
