"""Slot by slot through either cache, every token sees exactly what the merge mask lets it see."""

from functools import cache as remember
from typing import Any, Literal

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergevq.generator.cache import FullCache, MergeCache, MergeState, num_slots
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.masks import key_counts, merge_mask
from mergevq.generator.raster import MergeAR, feed_token, fill_prefix

NUM_BITS = 6
GRIDS = ((1, 1), (1, 2), (2, 3), (3, 5), (4, 5))


@remember
def model_of(
    grid: tuple[int, int], mask: MaskConfig, kv_heads: int, prefix_position: Literal["identity", "zero"], instruct: bool
) -> MergeAR:
    """A small model in evaluation mode whose every weight, heads too, is drawn at random, in float64: only what is
    meant to be equal is equal to so many digits.
    """
    config = GeneratorConfig(
        grid=grid, num_bits=NUM_BITS, groups=(2, 4), num_classes=3, num_tokens=1, width=16, depth=2, group_depth=1,
        heads=2, kv_heads=kv_heads, ffn_multiple=8, prefix_position=prefix_position, instruction=instruct, mask=mask,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MergeAR(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    grid = draw(st.sampled_from(GRIDS))
    length = grid[0] * grid[1]
    words = draw(st.lists(st.integers(0, 2**NUM_BITS - 1), min_size=2, max_size=6, unique=True))
    row = st.lists(st.sampled_from(words), min_size=length, max_size=length)
    return {
        "grid": grid,
        "index": draw(st.lists(row, min_size=1, max_size=3)),
        "mask": MaskConfig(
            recent=draw(st.sampled_from((1, 2, 3, 4, 5, 30))),
            keep=draw(st.sampled_from(("first", "last"))),
            proportional=draw(st.booleans()),
        ),
        "kv_heads": draw(st.sampled_from((0, 1))),
        "prefix_position": draw(st.sampled_from(("identity", "zero"))),
        "instruct": draw(st.booleans()),
        "chunk": draw(st.integers(1, 8)),
        "branches": draw(st.integers(1, 2)),
    }


def worst(keep: Any, chunk: int) -> dict[str, Any]:
    """Two images that differ in every way: one is all of one kind, the other has hardly a duplicate."""
    mask = MaskConfig(recent=2, keep=keep, proportional=True)
    varied = {"kv_heads": 1, "prefix_position": "identity", "instruct": True, "branches": 2}
    return {"grid": (4, 5), "index": [[7] * 20, [*range(19), 0]], "mask": mask, "chunk": chunk, **varied}


@torch.no_grad()
def through_cache(model: MergeAR, index: Tensor, classes: Tensor, kind: Any, chunk: int, branches: int) -> Any:
    """Yields step, cache and the hidden vector that predicts the token of that step, for every branch and image."""
    images, transformer = len(index), model.transformer
    cache = kind(model.config, images, branches, chunk=chunk, device=torch.device("cpu"), dtype=torch.float64)
    kept = torch.ones(images * branches, dtype=torch.int64)
    yield 0, cache, fill_prefix(transformer, cache.state, classes, kept)
    for t in range(1, index.shape[1]):
        if (t - 1) % chunk == 0:
            cache.make_room(t)
        yield t, cache, feed_token(transformer, cache.state, kind.advance, torch.tensor([t]), index[:, t - 1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
@example(case=worst("first", 1))
@example(case=worst("last", 5))
def test_both_caches_give_the_logits_of_the_merge_mask_and_the_small_one_stays_small(case: dict[str, Any]) -> None:
    mask, chunk, branches = case["mask"], case["chunk"], case["branches"]
    model = model_of(case["grid"], mask, case["kv_heads"], case["prefix_position"], case["instruct"])
    index = torch.tensor(case["index"])
    # The second branch has no class, as with guidance.
    classes = torch.tensor([0, 1, 2][: len(index)] + [3] * len(index) * (branches - 1))
    repeated = index.repeat(branches, 1)
    with torch.no_grad():
        expected = model(repeated, classes, torch.ones_like(classes))
    most_distinct = max(len(set(row)) for row in case["index"])
    bound = model.config.prefix_length + mask.recent + most_distinct + 2 * chunk
    for kind in (FullCache, MergeCache):
        hidden = []
        for _, cache, vector in through_cache(model, index, classes, kind, chunk, branches):
            hidden.append(vector)
            assert kind is FullCache or num_slots(cache.state) <= bound
        with torch.no_grad():
            logits = model.transformer.group_logits(torch.stack(hidden, 1), repeated)
        for got, want in zip(logits, expected, strict=True):
            assert torch.allclose(got, want, rtol=0, atol=1e-9)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_slots_hold_what_the_mask_says(case: dict[str, Any]) -> None:
    mask: MaskConfig = case["mask"]
    model = model_of(case["grid"], mask, 0, "identity", True)
    index, recent = torch.tensor(case["index"]), mask.recent or 0
    seen, counts = merge_mask(index, mask), key_counts(index, mask)
    classes = torch.zeros(len(index), dtype=torch.int64)
    for t, cache, _ in through_cache(model, index, classes, MergeCache, case["chunk"], 1):
        state: MergeState = cache.state
        for image, row in enumerate(case["index"]):
            slots = list(
                zip(*(part[image].tolist() for part in (state.tokens, state.counts, state.older)), strict=True)
            )
            old = [j for j in range(t - recent) if seen[image, t, j]]
            assert {number: count for number, count, older in slots if older} == {
                row[j]: int(counts[image, t, j]) for j in old
            }
            now = [(number, count) for number, count, older in slots if count and not older]
            assert sorted(now) == sorted((number, 1) for number in row[max(0, t - recent) : t])
            used = int(state.used[image])
            assert used == len(old) + len(now) and not any(count for _, count, _ in slots[used:])
