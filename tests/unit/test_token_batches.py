"""The order of token batches: that of (seed, batch number), shared out over processes, continued by a resumed run."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

from mergevq.data.augment import Views
from mergevq.data.cache_writer import write_token_cache
from mergevq.data.folder import ImageFolder
from mergevq.data.loader import Batch, batches_per_epoch, training_batches
from mergevq.data.token_batches import encoded_batches, evaluation_token_batches, token_batches
from mergevq.data.token_cache import TokenBatch, TokenCache
from mergevq.errors import ConfigError, ShapeError
from mergevq.tokenizer.config import (
    AlignmentConfig,
    DecoderConfig,
    EncoderConfig,
    QuantizerConfig,
    RecoveryConfig,
    TokenizerConfig,
)
from mergevq.tokenizer.model import MergeVQ

COUNT = 22


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"{i:03d}.png")
    return ImageFolder(root)


@pytest.fixture(scope="module")
def tok() -> MergeVQ:
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=32,
        num_bits=6,
        num_tokens=20,
        num_groups=4,
        layer_scale=0.1,
        encoder=EncoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), stem_stride=2, depth=2, heads=2),
        quantizer=QuantizerConfig(norm="layer", temperature=1.0, groups=(3, 3)),
        decoder=DecoderConfig(channels=8, multipliers=(1, 2), blocks=(1, 1), output_stride=2, depth=1, heads=2),
        recovery=RecoveryConfig(enabled=False),
        alignment=AlignmentConfig(enabled=False),
    )
    model = MergeVQ(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def cache(tok: MergeVQ, data: ImageFolder, tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    options: dict[str, Any] = {"views": ("crop", "flip"), "shard_size": 6, "batch_size": 6, "workers": 0}
    return write_token_cache(tok, data, tmp_path_factory.mktemp("tokens"), num_tokens=(5, 20, 40), **options)


def take(batches: Iterator[TokenBatch], count: int) -> list[TokenBatch]:
    return list(itertools.islice(batches, count))


def equal(one: Sequence[TokenBatch], other: Sequence[TokenBatch]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


def column(batches: Iterable[TokenBatch], name: str) -> list[int]:
    return [value for batch in batches for value in batch[name].tolist()]


def joined(parts: Sequence[TokenBatch]) -> TokenBatch:
    width = max(part["index"].shape[1] for part in parts)
    wide = [{**part, "index": pad(part["index"], (0, width - part["index"].shape[1]))} for part in parts]
    return {key: torch.cat([part[key] for part in wide]) for key in wide[0]}


# ------------------------------------------------------------------------------------------------------ from a cache


def test_every_sample_is_a_row_of_the_cache_at_its_own_k_and_view(cache: TokenCache) -> None:
    seen = Counter()
    for batch in take(token_batches(cache, batch_size=5, seed=0), 40):
        assert batch["index"].shape == (5, int(batch["num_tokens"].max()))
        for i in range(5):
            k, number = int(batch["num_tokens"][i]), int(batch["number"][i])
            views = [cache.batch([number], k, view) for view in ("crop", "flip")]
            index, source = batch["index"][i], batch["source"][i]
            match = [torch.equal(v["index"][0], index[:k]) and torch.equal(v["source"][0], source) for v in views]
            assert sum(match) == 1 and not index[k:].any()
            seen[k, match.index(True)] += 1
    assert set(seen) == set(itertools.product((5, 20, 40), (0, 1)))
    assert min(seen.values()) > 200 / 6 / 2


def test_an_epoch_sees_each_image_once_and_the_next_in_another_order_with_other_draws(cache: TokenCache) -> None:
    per_epoch = batches_per_epoch(len(cache), 4)
    batches = take(token_batches(cache, batch_size=4, seed=0), 3 * per_epoch)
    epochs = [column(batches[i : i + per_epoch], "number") for i in (0, per_epoch, 2 * per_epoch)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 20
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    counts = [column(batches[i : i + per_epoch], "num_tokens") for i in (0, per_epoch)]
    assert counts[0] != counts[1]
    other = take(token_batches(cache, batch_size=4, seed=1), per_epoch)
    assert column(other, "number") != epochs[0] and column(other, "num_tokens") != counts[0]


def test_resuming_in_mid_epoch_continues_exactly(cache: TokenCache) -> None:
    whole = take(token_batches(cache, batch_size=4, seed=7), 13)
    for start in (0, 3, 5, 12):
        assert equal(take(token_batches(cache, batch_size=4, seed=7, start_batch=start), 13 - start), whole[start:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(cache: TokenCache, world_size: int) -> None:
    one = take(token_batches(cache, batch_size=2 * world_size, seed=3), 14)
    ranks = [
        take(token_batches(cache, batch_size=2, seed=3, rank=rank, world_size=world_size), 14)
        for rank in range(world_size)
    ]
    assert equal([joined(parts) for parts in zip(*ranks, strict=True)], one)


def test_the_order_is_that_of_training_on_images(cache: TokenCache, data: ImageFolder) -> None:
    images = training_batches(data, Views(8), batch_size=4, seed=5, start_batch=3)
    tokens = token_batches(cache, batch_size=4, seed=5, start_batch=3)
    for _ in range(5):
        assert torch.equal(next(images)["number"], next(tokens)["number"])


def test_k_is_drawn_as_likely_as_asked_for(cache: TokenCache) -> None:
    options: dict[str, Any] = {
        "batch_size": 20,
        "seed": 0,
        "num_tokens": (40, 5, 20),
        "num_tokens_probs": (3.0, 0.0, 1.0),
    }
    drawn = Counter(column(take(token_batches(cache, **options), 50), "num_tokens"))
    assert drawn[5] == 0
    # Four standard deviations of 1000 draws.
    assert abs(drawn[40] - 750) < 4 * (1000 * 0.75 * 0.25) ** 0.5
    last = token_batches(cache, batch_size=20, seed=0, num_tokens=(40, 5), num_tokens_probs=(1.0, 0.0))
    assert set(column(take(last, 20), "num_tokens")) == {40}
    crops = take(token_batches(cache, batch_size=20, seed=0, num_tokens=(20,), views=("crop",)), 2)
    for batch in crops:
        assert torch.equal(batch["source"], cache.batch(batch["number"].tolist(), 20)["source"])


def test_a_small_cache_is_repeated_within_the_batch(cache: TokenCache) -> None:
    (batch,) = take(token_batches(cache, batch_size=50, seed=0), 1)
    assert sorted(Counter(batch["number"].tolist()).values()) == [2] * 16 + [3] * 6


def test_evaluation_sees_every_image_once_in_order(cache: TokenCache) -> None:
    batches = list(evaluation_token_batches(cache, batch_size=5, num_tokens=20, view="flip"))
    assert [len(batch["number"]) for batch in batches] == [5, 5, 5, 5, 2]
    assert equal([joined(batches)], [cache.batch(range(COUNT), 20, "flip")])
    shared = [evaluation_token_batches(cache, batch_size=5, num_tokens=5, rank=r, world_size=3) for r in range(3)]
    assert sorted(column(itertools.chain(*shared), "number")) == list(range(COUNT))
    some = list(evaluation_token_batches(cache, batch_size=3, num_tokens=5, limit=4))
    assert column(some, "number") == [0, 5, 11, 16]
    assert len(column(evaluation_token_batches(cache, batch_size=5, num_tokens=5, limit=99), "number")) == COUNT


def test_global_random_state_is_left_alone(cache: TokenCache) -> None:
    torch.manual_seed(0)
    before, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    take(token_batches(cache, batch_size=4, seed=0), 3)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(legacy, np.random.get_state()[1])  # noqa: NPY002


# ------------------------------------------------------------------------------------------------ encoded as they come


def test_encoded_batches_hold_what_encode_returns(tok: MergeVQ, data: ImageFolder) -> None:
    def images(start: int = 0) -> Iterator[Batch]:
        return training_batches(data, Views(32, flip=True), batch_size=4, seed=2, start_batch=start)

    options: dict[str, Any] = {"seed": 2, "num_tokens": (40, 5)}
    batches = take(encoded_batches(tok, images(), **options), 8)
    assert all(len(set(batch["num_tokens"].tolist())) == 1 for batch in batches)
    assert set(column(batches, "num_tokens")) == {40, 5}
    for batch, shown in zip(batches, images(), strict=False):
        tokens = tok.encode(shown["image"], batch["num_tokens"].tolist())
        assert torch.equal(batch["index"], tokens.index)
        assert torch.equal(batch["index"].gather(1, batch["source"]), tokens.full_index())
        assert torch.equal(batch["number"], shown["number"]) and torch.equal(batch["label"], shown["label"])
    assert equal(take(encoded_batches(tok, images(3), start_batch=3, **options), 5), batches[3:])


def test_processes_draw_the_k_of_one(tok: MergeVQ, data: ImageFolder) -> None:
    def drawn(batch_size: int, rank: int, world_size: int) -> list[list[int]]:
        images = training_batches(data, Views(32), batch_size=batch_size, seed=0, rank=rank, world_size=world_size)
        tokens = encoded_batches(tok, images, seed=0, num_tokens=(3, 4, 5))
        return [batch["num_tokens"].tolist() for batch in take(tokens, 6)]

    ranks = [drawn(2, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == drawn(4, 0, 1)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_impossible_arguments_are_told_at_once(cache: TokenCache, tok: MergeVQ, images: torch.Tensor) -> None:
    for wrong, changed in (
        ("num_tokens among 5, 20, 40, got 7", {"num_tokens": (7,)}),
        ("have 3 entries, one for each K, got 2", {"num_tokens_probs": (1.0, 1.0)}),
        ("at least 0 and not all 0", {"num_tokens_probs": (0.0, 0.0, 0.0)}),
        ("at least 0 and not all 0", {"num_tokens_probs": (1.0, -1.0, 1.0)}),
        ("at least 0 and not all 0", {"num_tokens_probs": (1.0, float("nan"), 1.0)}),
        ("batch_size must be at least 1", {"batch_size": 0}),
        (r"rank must lie in 0\.\.1, got 2", {"rank": 2, "world_size": 2}),
        ("start_batch must be at least 0", {"start_batch": -1}),
    ):
        with pytest.raises(ConfigError, match=wrong):
            token_batches(cache, **{"batch_size": 4, "seed": 0, **changed})  # type: ignore[arg-type]
    for wrong, changed in (
        ("num_tokens among 5, 20, 40, got 7", {"num_tokens": 7}),
        ("limit of at least 1, got 4 and 0", {"limit": 0}),
        ("batch_size and a limit of at least 1, got 0", {"batch_size": 0}),
        ("rank must lie in", {"rank": 1}),
    ):
        with pytest.raises(ConfigError, match=wrong):
            evaluation_token_batches(cache, **{"batch_size": 4, "num_tokens": 5, **changed})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one num_tokens"):
        encoded_batches(tok, [], seed=0, num_tokens=())
    batch = {"image": images, "label": torch.zeros(3), "number": torch.zeros(3)}
    with pytest.raises(ShapeError, match=r"1\.\.64"):
        next(encoded_batches(tok, [batch], seed=0, num_tokens=(65,)))
