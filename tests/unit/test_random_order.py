"""Random order: what a token sees in training, how many each step samples, and generation as a user meets it."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mergevq.errors import CheckpointError, ConfigError, ShapeError
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import load_generator
from mergevq.generator.parallel import group_sizes, next_group
from mergevq.generator.random_order import RandomAR
from mergevq.quantize import split_index
from mergevq.sampling import image_uniforms
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import load_tokens, save_tokens

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


# ---------------------------------------------------------------------------------------------------------- generation


def test_the_result_has_k_tokens_and_no_source(model: RandomAR) -> None:
    for k in range(1, NUM_PATCHES + 1):
        tokens = model.generate(classes=[1], num_tokens=k, steps=min(3, k), seeds=[k])
        assert tokens.num_tokens.tolist() == [k] and tokens.index.shape == (1, k)
        assert tokens.source is None and tokens.grid == (3, 4) and tokens.num_bits == 6
    assert model.generate(num_images=2).num_tokens.tolist() == [9, 9]


def test_images_depend_on_their_seed_alone(model: RandomAR) -> None:
    """Not on the batch, its size, the other images, or where among them an image stands."""
    classes, counts, seeds = [0, 1, 2, 0, 1], [5, 12, 5, 1, 12], [7, 8, 9, 10, 11]
    options: dict[str, Any] = {"guidance": 1.7, "steps": 1}
    together = model.generate(classes=classes, num_tokens=counts, seeds=seeds, **options)
    assert together.num_tokens.tolist() == counts
    small = model.generate(classes=classes, num_tokens=counts, seeds=seeds, batch_size=1, **options)
    assert together.equal(small)
    for row, k in enumerate(counts):
        alone = model.generate(classes=classes[row : row + 1], num_tokens=k, seeds=seeds[row : row + 1], **options)
        assert together[row].equal(alone)
    assert not torch.equal(together.index[1], together.index[4])


def test_rng_gives_the_seeds(model: RandomAR) -> None:
    def run(seed: int) -> torch.Tensor:
        return model.generate(num_images=3, rng=torch.Generator().manual_seed(seed)).index

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_temperature_0_is_determined_by_the_order(model: RandomAR) -> None:
    """Seeds that put three ranks in the same order give the same tokens, whatever their noise."""
    seeds: dict[tuple[int, ...], list[int]] = {}
    for seed in range(30):
        order = image_uniforms(seed, 3, 3)[:, -1].argsort(stable=True)
        seeds.setdefault(tuple(order.tolist()), []).append(seed)
    assert len(seeds) == 6
    firsts = []
    for same in seeds.values():
        tokens = model.generate(classes=[1] * len(same), num_tokens=3, temperature=0, seeds=same)
        assert len(same) > 1 and (tokens.index == tokens.index[0]).all()
        firsts.append(tokens.index[0])
    # The order does make a difference to this model.
    assert len(torch.stack(firsts).unique(dim=0)) > 1


def test_order_and_noise_are_independent() -> None:
    """The rank that comes first says nothing about the noise of its own draws, though one seed gives both."""
    noise = torch.stack([image_uniforms(seed, 8, 3) for seed in range(2000)])
    first = noise[..., -1].argmin(1)
    mean = noise[torch.arange(2000), first, :2].mean(0)
    assert (mean - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / 2000)


def test_guidance_0_and_no_classes_are_one(model: RandomAR) -> None:
    options: dict[str, Any] = {"num_tokens": 6, "seeds": [1, 2], "steps": 4}
    unconditional = model.generate(num_images=2, **options)
    assert torch.equal(model.generate(classes=[0, 1], guidance=0, **options).index, unconditional.index)
    assert torch.equal(model.generate(num_images=2, guidance=3.0, **options).index, unconditional.index)
    assert not torch.equal(model.generate(classes=[0, 1], **options).index, unconditional.index)


def test_costs(model: RandomAR) -> None:
    seen: list[int] = []
    _, stats = model.generate_with_stats(
        classes=[0, 1, 2, 0, 1], num_tokens=[12, 5, 12, 12, 5], steps=4, guidance=2.0, batch_size=2, seeds=range(5),
        on_images=seen.append,
    )  # fmt: skip
    assert sorted(seen) == [1, 2, 2] and stats.images == 5
    assert stats.forwards == 12  # 4 steps of 3 batches.
    assert stats.cache_slots == 2 + 2 * 12 - 1
    # Keys and values, 2 blocks, 2 images with guidance, 2 heads of 8 channels in float32.
    assert stats.cache_bytes == 2 * 2 * 4 * 2 * 25 * 8 * 4
    assert stats.seconds > 0


def test_generating_leaves_the_model_as_it_was(model: RandomAR) -> None:
    names = set(vars(model.transformer))
    model.train()
    before = torch.get_rng_state()
    tokens = model.generate(classes=[0], seeds=[3])
    assert model.training and torch.equal(torch.get_rng_state(), before)
    model.eval()
    assert tokens.equal(model.generate(classes=[0], seeds=[3]))
    assert set(vars(model.transformer)) == names


def test_half_precision_follows_float32(model: RandomAR) -> None:
    options: dict[str, Any] = {"classes": [0, 1, 2], "seeds": [1, 2, 3], "temperature": 0.1, "steps": 5}
    lower = model.generate(dtype=torch.bfloat16, **options)
    assert (lower.index == model.generate(**options).index).float().mean() > 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(**options).equal(model.generate(dtype=torch.float32, **options))


def test_tokens_are_drawn_by_the_tokenizer(tiny_tokenizer: MergeVQ, tmp_path: Path) -> None:
    """K = L needs no map; fewer tokens are placed by recovery; a file carries both."""
    config = GeneratorConfig(
        order="random", grid=(8, 8), num_bits=6, groups=(3, 3), num_classes=2, num_tokens=20, width=16, depth=1,
        group_depth=1, heads=2, ffn_multiple=16, tokenizer=tiny_tokenizer.fingerprint(),
    )  # fmt: skip
    generator = RandomAR(config).eval()
    tokens = generator.generate(classes=[0, 1, 1], num_tokens=[20, 64, 5], seeds=[1, 2, 3], steps=5)
    save_tokens(tmp_path / "generated.mvq", tokens)
    loaded = load_tokens(tmp_path / "generated.mvq", expect_tokenizer=tiny_tokenizer.fingerprint())
    assert loaded.equal(tokens)
    assert torch.equal(tiny_tokenizer.decode(loaded), tiny_tokenizer.decode(tiny_tokenizer.recover(tokens)))


def test_saving_and_loading(model: RandomAR, tmp_path: Path) -> None:
    path = model.save_pretrained(tmp_path)
    for loaded in (RandomAR.from_pretrained(tmp_path), load_generator(path)):
        assert isinstance(loaded, RandomAR)
        assert loaded.generate(classes=[2], seeds=[0]).equal(model.generate(classes=[2], seeds=[0]))


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"expected steps in 1\.\.9.*got 0"),
        ({"steps": 10}, r"expected steps in 1\.\.9.*got 10"),
        ({"num_images": 2, "num_tokens": [12, 4], "steps": 5}, r"expected steps in 1\.\.4.*got 5"),
        ({"num_tokens": 0}, r"expected num_tokens in 1\.\.12, got 0"),
        ({"num_tokens": 13}, r"expected num_tokens in 1\.\.12, got .*13"),
        ({"classes": [3]}, r"expected classes 0\.\.2, got 3"),
        ({"classes": [1.7]}, r"classes that are whole numbers or names, got 1\.7"),
        ({"num_tokens": 8.0}, r"num_tokens of whole numbers, got 8\.0"),
        ({"num_tokens": [4.5]}, r"num_tokens of whole numbers, got \[4\.5\]"),
        ({"guidance": -1.0}, "guidance"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": (1, 2, 3)}, "top_k"),
        ({"batch_size": 0}, "batch_size"),
        ({"seeds": [1, 2]}, "seeds"),
        ({"seeds": [1.5]}, r"a seed that is a whole number, got 1\.5"),
        ({"seeds": 5}, "a list of seeds, one an image, got 5"),
        ({"seeds": [2**64]}, "a seed of at most 64 bits, got 18446744073709551616"),
        ({"seeds": np.array([0.5])}, "a seed that is a whole number"),
        ({"seeds": torch.tensor([0.5])}, "a seed that is a whole number"),
    ],
)
def test_bad_input_gets_one_line(model: RandomAR, unchecked: None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        model.generate(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_numbers_of_numpy_and_torch_are_numbers(model: RandomAR, unchecked: None, kind: Any) -> None:
    expected = model.generate([1, 2], seeds=[3, 4], num_tokens=5)
    assert model.generate(kind([1, 2]), seeds=kind([3, 4]), num_tokens=kind(5)).equal(expected)
    assert model.generate([kind(1), kind(2)], seeds=[kind(3), kind(4)], num_tokens=kind([5, 5])).equal(expected)


def test_a_raster_configuration_or_file_is_refused(model: RandomAR, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected order random, got raster: build MergeAR"):
        RandomAR(replace(model.config, order="raster"))
    from mergevq.generator.raster import MergeAR

    path = model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected a generator of order raster.*load it with RandomAR"):
        MergeAR.from_pretrained(path)


def test_damaged_weights_are_noticed(model: RandomAR) -> None:
    damaged = RandomAR(model.config).eval()
    damaged.rank_instruction.vector.data[0] = torch.nan
    with pytest.raises(ShapeError, match="expected finite numbers in the logits, got NaN"):
        damaged.generate(num_images=2, steps=2)


def test_numbers_that_only_guidance_makes_infinite_are_noticed(model: RandomAR) -> None:
    large = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in large.transformer.heads.parameters():
            parameter.mul_(1e34)
    large.generate([0], steps=2, seeds=[1])
    with pytest.raises(ShapeError, match="finite numbers in the logits, got NaN or infinity"):
        large.generate([0], steps=2, seeds=[1], guidance=1e6)


def test_nothing_is_copied_from_the_host_in_every_step(model: RandomAR, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **options: made.append(args) or real(*args, **options))
    counts = []
    for steps in (2, 9):
        made.clear()
        model.generate([0], steps=steps, guidance=2.0, guidance_schedule="linear", seeds=[1])
        counts.append(len(made))
    assert counts[0] == counts[1]


# ------------------------------------------------------------------------------------------------------------- learning


def test_it_learns_four_images_by_heart() -> None:
    """Trained on random orders of four images with a class each, it reproduces them in any order it is asked."""
    config = GeneratorConfig(
        order="random", grid=(3, 3), num_bits=4, groups=(2, 2), num_classes=4, num_tokens=8, width=32, depth=2,
        group_depth=1, heads=4, ffn_multiple=16, token_dropout=0.0, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RandomAR(config)
    rng = torch.Generator().manual_seed(1)
    counts = torch.tensor([8, 8, 5, 3])
    real = torch.arange(8) < counts[:, None]
    index = torch.randint(16, (4, 8), generator=rng) * real
    classes = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for _ in range(150):
        # Padding sorts behind every rank.
        order = (torch.rand(4, 8, generator=rng) + 2 * ~real).argsort(1)
        logits = model(index, classes, counts, order)
        parts = split_index(index, config.groups)
        loss = sum(cross_entropy(part[real], parts[..., group][real]) for group, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for seed in range(3):
        tokens = model.generate(
            classes=classes.tolist(), num_tokens=counts.tolist(), temperature=0, seeds=range(seed, seed + 4)
        )
        assert torch.equal(tokens.index, index)


# ------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.compile
def test_a_step_compiles_as_one_graph(model: RandomAR, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few graphs serve every step, whatever its size, and every guidance scale."""
    graphs = 0

    def count(graph: Callable[..., Any], _: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph

    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        assert function is next_group
        return real(function, backend=count, **{**options, "fullgraph": True})

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compiler)
    small = RandomAR(replace(model.config, depth=1, num_bits=4, groups=(4,))).eval()
    for guidance in (2.0, 3.0):
        arguments: dict[str, Any] = {
            "classes": [0, 1], "num_tokens": 12, "seeds": [1, 2], "steps": 5, "guidance": guidance,
            "guidance_schedule": "linear",
        }  # fmt: skip
        assert small.generate(compile=True, **arguments).equal(small.generate(**arguments))
    assert 1 <= graphs <= 4
