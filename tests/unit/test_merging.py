"""Token merging against a loop written from the paper, schedules, and the source map."""

import json
from pathlib import Path

import pytest
import torch

from mergevq.errors import ConfigError, ShapeError
from mergevq.merging import (
    SourceMap,
    check_num_tokens,
    match_and_merge,
    match_tokens,
    merge_schedule,
    merge_tokens,
    sort_by_raster,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden" / "misc.json").read_text())


def merge_by_loop(x: torch.Tensor, sizes: torch.Tensor, metric: torch.Tensor, num_merged: int):
    """One image, ToMe section 3, token by token: the new tokens, their sizes, and the members of each."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    pairs = []
    for i in even[1:]:  # the class token at position 0 never merges
        scores = [float(metric[i] @ metric[j]) for j in odd]
        best = max(range(len(odd)), key=lambda n: scores[n])
        pairs.append((scores[best], i, odd[best]))
    chosen = sorted(pairs, key=lambda p: -p[0])[:num_merged]
    into = {i: j for _, i, j in chosen}
    members = [[i] for i in even if i not in into]
    members += [[j, *(i for i, target in into.items() if target == j)] for j in odd]
    new = torch.stack([sum(x[i] * sizes[i] for i in group) / sum(sizes[i] for i in group) for group in members])
    return new, torch.stack([sum(sizes[i] for i in group) for group in members]), members


@pytest.mark.parametrize(("tokens", "num_merged"), [(17, 1), (17, 8), (18, 5), (9, 4), (3, 1)])
def test_match_and_merge_equals_the_loop(tokens: int, num_merged: int) -> None:
    rng = torch.Generator().manual_seed(tokens * 100 + num_merged)
    x = torch.randn(4, tokens, 6, generator=rng)
    metric = torch.randn(4, tokens, 5, generator=rng)
    sizes = torch.randint(1, 5, (4, tokens), generator=rng).float()
    source = torch.arange(tokens - 1).expand(4, -1)
    merged, new_sizes, new_source = match_and_merge(x, sizes, source, metric, num_merged)
    for b in range(4):
        expected, expected_sizes, members = merge_by_loop(x[b], sizes[b], metric[b], num_merged)
        torch.testing.assert_close(merged[b], expected)
        torch.testing.assert_close(new_sizes[b], expected_sizes)
        for position, group in enumerate(members):
            for token in group:
                if token > 0:
                    assert new_source[b, token - 1] == position - 1


def test_class_token_is_never_merged() -> None:
    # The class token is the best match of everybody, and everybody of it.
    metric = torch.ones(2, 11, 4)
    target = match_tokens(metric, 5)
    assert (target[:, 0] == 0).all()
    assert (target[:, 1:] > 0).all()


def test_zero_and_equal_keys_stay_finite_and_ordered() -> None:
    metric = torch.zeros(1, 9, 4)
    assert torch.equal(match_tokens(metric, 2), match_tokens(metric.clone(), 2))
    x, sizes, source = match_and_merge(
        torch.randn(1, 9, 3), torch.ones(1, 9), torch.arange(8)[None], metric, num_merged=7
    )
    assert torch.isfinite(x).all()
    assert sizes[0, 1:].sum() == 8
    assert source.max() == 0


def test_mean_is_weighted_by_size() -> None:
    x = torch.tensor([[[9.0], [1.0], [5.0]]])
    merged, sizes = merge_tokens(x, torch.tensor([[1.0, 3.0, 1.0]]), torch.tensor([[0, 1, 1]]), 2)
    assert merged.flatten().tolist() == [9.0, 2.0]
    assert sizes.tolist() == [[1.0, 4.0]]


def test_raster_order() -> None:
    source = torch.tensor([[2, 0, 2, 1, 0]])
    x = torch.tensor([[[0.0], [1.0], [2.0]]])
    ordered, new = sort_by_raster(x, source)
    assert new.tolist() == [[0, 1, 0, 2, 1]]
    assert ordered.flatten().tolist() == [2.0, 0.0, 1.0]


# ------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("case", GOLDEN["merge_schedules"])
def test_linear_schedule_is_the_release(case: str) -> None:
    patches, depth, kept = map(int, case.split("/"))
    assert list(merge_schedule(patches, kept, depth)) == GOLDEN["merge_schedules"][case]["final"]


@pytest.mark.parametrize("kind", ["linear", "constant", "squared"])
@pytest.mark.parametrize("depth", [1, 2, 3, 12])
@pytest.mark.parametrize("patches", [1, 2, 49, 64, 256])
def test_every_k_is_met_and_no_layer_but_the_last_merges_more_than_half(kind: str, depth: int, patches: int) -> None:
    for kept in range(1, patches + 1):
        schedule = merge_schedule(patches, kept, depth, kind)
        assert len(schedule) == depth
        assert patches - sum(schedule) == kept
        left = patches
        for merged in schedule[:-1]:
            assert 0 <= merged <= left // 2
            left -= merged
        assert schedule[-1] >= 0


def test_squared_falls_with_the_square() -> None:
    assert merge_schedule(1024, 1024 - 650, 12, "squared") == (144, 121, 100, 81, 64, 49, 36, 25, 16, 9, 4, 1)


@pytest.mark.parametrize(
    ("patches", "full", "kept", "left"),
    [(196, 256, 49, 3), (196, 256, 64, 6), (196, 256, 100, 40), (784, 1024, 225, 15), (784, 1024, 529, 289)],
)
def test_clip_reproduces_the_releases_smaller_view(patches: int, full: int, kept: int, left: int) -> None:
    schedule = merge_schedule(patches, patches - (full - kept), 12, overflow="clip")
    assert patches - sum(schedule) == left


@pytest.mark.parametrize(("patches", "kept", "depth"), [(16, 0, 3), (16, 17, 3), (16, -1, 3), (16, 4, 0)])
def test_impossible_schedules_are_refused(patches: int, kept: int, depth: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        merge_schedule(patches, kept, depth)


@pytest.mark.parametrize("bad", [0, 17, -3, True, [4, 4], [4, 99, 4], [True, 1, 1], 4.0, "444", None])
@pytest.mark.usefixtures("unchecked")
def test_bad_num_tokens_are_refused(bad: object) -> None:
    with pytest.raises(ShapeError, match="expected"):
        check_num_tokens(bad, 3, 16)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- source map


def test_source_map_by_hand() -> None:
    source = SourceMap(torch.tensor([[0, 1, 0, 2], [0, 0, 1, 1]]), torch.tensor([3, 2]))
    assert source.sizes().tolist() == [[2, 1, 1], [2, 2, 0]]
    assert source.first().tolist() == [[0, 1, 3], [0, 2, 4]]
    tokens = torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [0.0]]])
    assert source.unmerge(tokens).squeeze(-1).tolist() == [[1, 2, 1, 3], [4, 4, 5, 5]]
    matrix = source.to_matrix()
    assert matrix[0].tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    for kind in (torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool):
        back = SourceMap.from_matrix(matrix.to(kind), source.num_tokens)
        assert torch.equal(back.index, source.index), kind


def test_unmerge_is_the_transposed_matrix_product() -> None:
    rng = torch.Generator().manual_seed(3)
    index = torch.randint(0, 7, (2, 20), generator=rng)
    source = SourceMap(index, torch.tensor([7, 7]))
    tokens = torch.randn(2, 7, 4, generator=rng)
    torch.testing.assert_close(source.unmerge(tokens), source.to_matrix().mT @ tokens)


def test_maps_that_do_not_fit_are_refused() -> None:
    first = SourceMap(torch.tensor([[0, 1, 1]]), torch.tensor([2]))
    with pytest.raises(ShapeError, match="expected a step over 2 tokens"):
        first.then(SourceMap.identity(1, 3))
    with pytest.raises(ShapeError, match="exactly one 1"):
        SourceMap.from_matrix(torch.ones(1, 2, 3))


def test_matching_is_float32_under_autocast() -> None:
    # A common offset leaves little between the similarities: bf16 could not tell them apart.
    metric = torch.randn(1, 257, 16, generator=torch.Generator().manual_seed(0)) + 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = match_tokens(metric, 60)
    assert torch.equal(inside, match_tokens(metric, 60))


@pytest.mark.compile
def test_maps_compile_without_graph_breaks() -> None:
    def follow(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        joined = SourceMap(a, torch.full((2,), 6)).then(SourceMap(b, torch.full((2,), 3)))
        return joined.index, joined.sizes(3), joined.first(3)

    a, b = torch.randint(0, 6, (2, 9)), torch.randint(0, 3, (2, 6))
    for got, expected in zip(
        torch.compile(follow, fullgraph=True, backend="aot_eager")(a, b), follow(a, b), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.compile
def test_merging_compiles_without_graph_breaks() -> None:
    def step(x: torch.Tensor, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = torch.ones(x.shape[:2])
        source = torch.arange(x.shape[1] - 1).expand(x.shape[0], -1)
        x, sizes, source = match_and_merge(x, sizes, source, metric, 12)
        tokens, source = sort_by_raster(x[:, 1:], source)
        return tokens, sizes, source

    x, metric = torch.randn(2, 17, 4), torch.randn(2, 17, 4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, metric), step(x, metric), strict=True):
        torch.testing.assert_close(got, expected)
