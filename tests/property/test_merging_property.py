"""Properties of merging that must hold for any input."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq.merging import SourceMap, match_and_merge, sort_by_raster


@st.composite
def merges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    patches = draw(st.integers(1, 40))
    kept = draw(st.integers(1, patches))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(2, patches + 1, 3, generator=rng)
    # Few distinct values, so that equal similarities happen.
    metric = torch.randint(-2, 3, (2, patches + 1, 2), generator=rng).float()
    return x, metric, kept


@given(merges())
@settings(max_examples=60, deadline=None)
def test_merging_keeps_every_patch_and_the_weighted_sum(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    x, metric, kept = case
    patches = x.shape[1] - 1
    identity = torch.arange(patches).expand(2, -1)
    merged, sizes, source = match_and_merge(x, torch.ones(x.shape[:2]), identity, metric, patches - kept)
    assert merged.shape[1] == kept + 1
    assert torch.equal(merged[:, 0], x[:, 0])
    tokens, source = sort_by_raster(torch.cat([merged[:, 1:], sizes[:, 1:, None]], -1), source)
    tokens, sizes = tokens[..., :-1], tokens[..., -1]
    known = SourceMap(source, torch.full((2,), kept))
    assert torch.equal(known.sizes().float(), sizes)
    assert (known.sizes() >= 1).all()
    assert (sizes.sum(1) == patches).all()
    # Each kept token is the mean of its patches, and they are ordered by first raster position.
    torch.testing.assert_close(known.to_matrix() @ x[:, 1:] / sizes[..., None], tokens, atol=1e-5, rtol=1e-4)
    assert (known.first().diff(dim=1) > 0).all()


@st.composite
def chains(draw: st.DrawFn) -> list[SourceMap]:
    width = draw(st.integers(1, 20))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    steps = []
    for _ in range(3):
        out = draw(st.integers(1, width))
        extra = torch.randint(0, out, (2, width - out), generator=rng)
        index = torch.cat([torch.arange(out).expand(2, -1), extra], 1)
        steps.append(SourceMap(index[:, torch.randperm(width, generator=rng)], torch.full((2,), out)))
        width = out
    return steps


@given(chains())
@settings(max_examples=60, deadline=None)
def test_then_is_associative_and_is_the_matrix_product(steps: list[SourceMap]) -> None:
    a, b, c = steps
    left, right = a.then(b).then(c), a.then(b.then(c))
    assert torch.equal(left.index, right.index)
    assert torch.equal(left.num_tokens, right.num_tokens)
    torch.testing.assert_close(left.to_matrix(), c.to_matrix() @ b.to_matrix() @ a.to_matrix())
    identity = SourceMap.identity(2, a.index.shape[1])
    assert torch.equal(identity.then(a).index, a.index)
