"""Random order: the sequence of training, and parallel decoding against forwards that remember nothing."""

import math

import pytest
import torch

from mergevq.errors import ConfigError
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.random_order import RandomAR, group_sizes

NUM_CLASSES = 3
NUM_PATCHES = 12


@pytest.fixture(scope="module")
def model() -> RandomAR:
    """L = 12, 6 bits in two groups, every weight drawn at random and large enough to matter."""
    config = GeneratorConfig(
        order="random", grid=(3, 4), num_bits=6, groups=(2, 4), num_classes=NUM_CLASSES, num_tokens=9, width=32,
        depth=2, group_depth=1, heads=4, kv_heads=2, ffn_multiple=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RandomAR(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def sample_batch(counts: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns index, classes, num_tokens and order for images of these K."""
    rng = torch.Generator().manual_seed(seed)
    width = max(counts)
    index, order = torch.zeros(len(counts), width, dtype=torch.int64), torch.arange(width).repeat(len(counts), 1)
    for row, k in enumerate(counts):
        index[row, :k] = torch.randint(64, (k,), generator=rng)
        order[row, :k] = torch.randperm(k, generator=rng)
    return index, torch.randint(NUM_CLASSES + 1, (len(counts),), generator=rng), torch.tensor(counts), order


# --------------------------------------------------------------------------------------------------------- group sizes


def test_group_sizes_for_every_k_and_every_number_of_steps() -> None:
    for k in range(1, 65):
        for steps in range(1, k + 1):
            sizes = group_sizes(k, steps)
            assert len(sizes) == steps and sum(sizes) == k and min(sizes) >= 1
            assert list(sizes) == sorted(sizes)
        assert group_sizes(k, k) == (1,) * k
        assert group_sizes(k, 1) == (k,)


def test_group_sizes_follow_the_cosine() -> None:
    assert group_sizes(64, 4) == (5, 14, 21, 24)  # 64 (1 - cos(pi s / 8)) = 4.87, 18.75, 39.51, 64.
    done = torch.tensor(group_sizes(1024, 32)).cumsum(0)
    wanted = 1024 * (1 - torch.cos(torch.pi / 64 * torch.arange(1, 33, dtype=torch.float64)))
    assert (done - wanted).abs().max() <= 0.51


@pytest.mark.parametrize(("k", "steps"), [(9, 0), (9, 10), (9, -1), (1, 2)])
def test_steps_outside_the_tokens_are_refused(k: int, steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"expected steps in 1\.\.{k}.*got {steps}$"):
        group_sizes(k, steps)


# ------------------------------------------------------------------------------------------------------------ training


@torch.no_grad()
def test_a_token_depends_on_what_comes_before_it_in_the_order_and_on_nothing_else(model: RandomAR) -> None:
    index, classes, num_tokens, order = sample_batch([9])
    logits = model(index, classes, num_tokens, order)
    for changed in range(9):
        other = index.clone()
        other[0, changed] ^= 0b111111
        differs = [
            (a != b).flatten(2).any(2)[0] for a, b in zip(logits, model(other, classes, num_tokens, order), strict=True)
        ]
        place = order[0].tolist().index(changed)
        for rank in range(9):
            later = order[0].tolist().index(rank) > place
            assert bool(differs[0][rank]) == later
            # The second group knows the first group of its own token.
            assert bool(differs[1][rank]) == (later or rank == changed)


@torch.no_grad()
def test_the_order_of_what_comes_before_matters_only_as_far_as_it_is_seen(model: RandomAR) -> None:
    index, classes, num_tokens, _ = sample_batch([6])
    first = model(index, classes, num_tokens, torch.tensor([[4, 1, 0, 5, 3, 2]]))
    second = model(index, classes, num_tokens, torch.tensor([[4, 1, 0, 2, 5, 3]]))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a[0, [4, 1, 0]], b[0, [4, 1, 0]], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(a[0, [5, 3, 2]], b[0, [5, 3, 2]], atol=1e-3)


@torch.no_grad()
def test_rank_class_and_number_of_tokens_are_told(model: RandomAR) -> None:
    """The first token predicted knows its rank, K and the class, though no token precedes it."""
    index = torch.zeros(1, 4, dtype=torch.int64)

    def first(rank: int, label: int, k: int) -> torch.Tensor:
        order = torch.tensor([[rank, *(r for r in range(4) if r != rank)]])
        logits: torch.Tensor = model(index, torch.tensor([label]), torch.tensor([k]), order)[0][0, rank]
        return logits

    base = first(1, 0, 4)
    for other in (first(2, 0, 4), first(1, 3, 4), first(1, 0, 5)):
        assert (base - other).abs().max() > 1e-3


@torch.no_grad()
def test_padding_and_other_images_do_not_matter(model: RandomAR) -> None:
    counts = [9, 4, 12, 1]
    index, classes, num_tokens, order = sample_batch(counts)
    together = model(index, classes, num_tokens, order)
    for row, k in enumerate(counts):
        one = slice(row, row + 1)
        alone = model(index[one, :k], classes[one], num_tokens[one], order[one, :k])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[one, :k], b, atol=1e-5, rtol=1e-5)
    junk = index.masked_fill(torch.arange(12) >= num_tokens[:, None], 63)
    for a, b in zip(together, model(junk, classes, num_tokens, order), strict=True):
        for row, k in enumerate(counts):
            assert torch.equal(a[row, :k], b[row, :k])


def test_padding_gets_no_gradient_when_its_logits_are_left_out(model: RandomAR) -> None:
    index, classes, num_tokens, order = sample_batch([5, 2])
    index[1, 2:] = torch.tensor([40, 41, 42])
    real = torch.arange(5) < num_tokens[:, None]
    weight = model.transformer.embeddings[1].weight
    loss = sum(part[real].square().sum() for part in model(index, classes, num_tokens, order))
    (gradient,) = torch.autograd.grad(loss, weight)
    used = {int(i) >> 2 for i in index[real]}
    padding = {int(i) >> 2 for i in index[~real]} - used
    assert padding and all(gradient[i].count_nonzero() == 0 for i in padding)
    assert all(math.isfinite(v) for v in gradient.flatten().tolist())
