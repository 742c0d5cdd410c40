"""The generators' transformer: its size, its rotations, its cache and its bit groups."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mergevq.generator.config import GeneratorConfig
from mergevq.generator.transformer import KeyValues, Transformer
from mergevq.layers.rotary import rotate, rotation_1d, rotation_grid
from mergevq.quantize import join_index, split_index

SMALL = GeneratorConfig(
    grid=(3, 4), num_bits=6, groups=(2, 4), num_classes=5, num_tokens=6, width=16, depth=2, group_depth=2, heads=2,
    ffn_multiple=8,
)  # fmt: skip


def randomised(config: GeneratorConfig, seed: int = 0) -> Transformer:
    """A transformer in evaluation mode whose every weight, heads too, is drawn at random."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def empty_cache(config: GeneratorConfig, rows: int, capacity: int) -> KeyValues:
    return KeyValues.empty(config.depth, rows, capacity, config, torch.device("cpu"), torch.float32)


# ----------------------------------------------------------------------------------------------------------------- size


def test_the_released_size_has_as_many_parameters_as_the_paper_counts() -> None:
    config = GeneratorConfig(width=1024, depth=24, heads=16, instruction=False, num_tokens=256)
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 343_570_432


def test_an_untrained_model_predicts_every_index_alike() -> None:
    torch.manual_seed(0)
    model = Transformer(SMALL).eval()
    for logits in model.group_logits(torch.randn(2, 3, 16), torch.zeros(2, 3, dtype=torch.int64)):
        assert not logits.any()
    assert 0.015 < model.blocks[0].attention.qkv.weight.std() < 0.025


# ------------------------------------------------------------------------------------------------------------ rotations


def test_a_rotated_product_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    table = rotation_1d(torch.arange(20), 8, 100.0)
    dots = [rotate(q, table[n : n + 1]) @ rotate(k, table[n + 5 : n + 6]).T for n in (0, 7, 14)]
    assert torch.allclose(dots[0], dots[1], atol=1e-5) and torch.allclose(dots[0], dots[2], atol=1e-5)
    assert not torch.allclose(dots[0], rotate(q, table[:1]) @ rotate(k, table[6:7]).T, atol=1e-2)


def test_pairs_turn_by_row_first_then_by_column() -> None:
    table = rotation_grid(3, 4, 8, 10_000.0)
    assert table.shape == (12, 4, 2)
    row, column = 2, 3
    expected = torch.tensor([row, row / 100, column, column / 100])
    assert torch.allclose(torch.atan2(table[11, :, 1], table[11, :, 0]), torch.atan2(expected.sin(), expected.cos()))
    # Interleaved: channels 4 and 5 are the first pair that turns with the column.
    unit = torch.eye(8)[4:5]
    turned = rotate(unit, table[11:12])[0]
    assert torch.allclose(turned[4:6], torch.tensor([torch.tensor(3.0).cos(), torch.tensor(3.0).sin()]))


def test_low_precision_is_rotated_in_float32() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = rotation_1d(torch.arange(4) * 1000, 8, 10_000.0)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("prefix_position", ["identity", "zero"])
@pytest.mark.parametrize("kv_heads", [0, 1])
def test_slot_by_slot_through_a_cache_is_causal_attention(prefix_position: str, kv_heads: int) -> None:
    config = replace(SMALL, prefix_position=prefix_position, kv_heads=kv_heads)
    model = randomised(config)
    x = torch.randn(2, 7, 16)
    whole = model(x, model.rotation[:7])
    cache, order = empty_cache(config, 2, 9), torch.arange(9)
    for t in range(7):
        bias = torch.zeros(1, 1, 1, 9).masked_fill(order > t, -torch.inf)
        step = model(x[:, t : t + 1], model.rotation[t : t + 1], bias, cache, order[t : t + 1])
        assert torch.allclose(step, whole[:, t : t + 1], atol=1e-5)


def test_images_may_have_rotations_of_their_own() -> None:
    model = randomised(SMALL)
    x = torch.randn(2, 5, 16)  # As many images as heads.
    rotation = torch.stack([model.rotation[:5], model.rotation[5:10]])
    whole = model(x, rotation)
    for image in range(2):
        assert torch.allclose(model(x[image : image + 1], rotation[image])[0], whole[image], atol=1e-5)


def test_a_prefix_without_position_has_no_say_in_its_own_attention() -> None:
    config = replace(SMALL, prefix_position="zero")
    model = randomised(config)
    x = torch.randn(1, 3, 16)
    cache = empty_cache(config, 1, 3)
    model(x, model.rotation[:3], torch.zeros(1, 1, 3, 3), cache, torch.arange(3))
    for keys, values in zip(*cache, strict=True):
        assert not keys[:, :, :2].any() and keys[:, :, 2].any() and values[:, :, :2].any()


# ----------------------------------------------------------------------------------------------------------- bit groups


def test_the_slots_of_one_position_turn_like_prefix_and_first_cells() -> None:
    for prefix_position, first in (("zero", (0.0, 0.0)), ("identity", (1.0, 0.0))):
        model = Transformer(replace(SMALL, groups=(1, 1, 1, 1, 1, 1), prefix_position=prefix_position))
        assert model.group_rotation[0].unique(dim=0).tolist() == [list(first)]
        # Five cells: a row of four, and the first of the next.
        cells = rotation_grid(3, 4, SMALL.head_width, SMALL.rotary_base)
        assert torch.equal(model.group_rotation[1:], cells[:5])
        assert torch.equal(model.rotation, torch.cat([model.group_rotation[:1].repeat(2, 1, 1), cells]))


@pytest.mark.parametrize("groups", [(6,), (2, 4), (1, 2, 3)])
@pytest.mark.parametrize("group_depth", [0, 2])
@pytest.mark.parametrize("prefix_position", ["identity", "zero"])
def test_sampling_groups_sees_the_teacher_forced_logits(
    groups: tuple[int, ...], group_depth: int, prefix_position: str
) -> None:
    config = replace(SMALL, groups=groups, group_depth=group_depth, prefix_position=prefix_position, kv_heads=1)
    model = randomised(config)
    hidden = torch.randn(4, 16)
    index = torch.randint(64, (2,))
    expected = model.group_logits(hidden[:, None], index.repeat(2)[:, None])
    parts = split_index(index, groups)
    seen: list[Tensor] = []

    def choose(group: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return parts[:, group]

    assert torch.equal(model.sample_groups(hidden, choose), index)
    for got, want in zip(seen, expected, strict=True):
        assert torch.allclose(got, want[:, 0], atol=1e-5)


@pytest.mark.parametrize("group_depth", [0, 1])
def test_a_group_knows_the_position_and_the_groups_before_it_only(group_depth: int) -> None:
    config = replace(SMALL, groups=(1, 2, 3), group_depth=group_depth)
    model = randomised(config)
    hidden = torch.randn(1, 1, 16)
    parts = torch.tensor([[1, 2, 5]])
    base = model.group_logits(hidden, join_index(parts, config.groups)[None])
    for changed in range(3):
        other = parts.clone()
        other[0, changed] ^= 1
        logits = model.group_logits(hidden, join_index(other, config.groups)[None])
        moved = [not torch.allclose(a, b, atol=1e-6) for a, b in zip(base, logits, strict=True)]
        assert moved == [group > changed for group in range(3)]
    elsewhere = model.group_logits(hidden + 1, join_index(parts, config.groups)[None])
    assert all(not torch.allclose(a, b, atol=1e-6) for a, b in zip(base, elsewhere, strict=True))


# --------------------------------------------------------------------------------------------------------------- prefix


def test_class_and_instruction_come_before_the_tokens() -> None:
    model = randomised(SMALL)
    classes, kept = torch.tensor([0, 5, 0]), torch.tensor([6, 6, 7])
    prefix = model.prefix(classes, kept)
    assert torch.equal(prefix[0, 0], prefix[2, 0]) and not torch.equal(prefix[0, 0], prefix[1, 0])
    assert torch.equal(prefix[0, 1], prefix[1, 1]) and not torch.allclose(prefix[0, 1], prefix[2, 1], atol=1e-3)
    assert torch.equal(prefix[1, 0], model.class_embedding.weight[-1])
    bare = randomised(replace(SMALL, instruction=False))
    assert bare.prefix(classes, kept).shape == (3, 1, 16)


def test_dropout_is_of_training_only_and_reaches_the_prefix() -> None:
    config = replace(SMALL, token_dropout=0.5, dropout=0.0)
    model = randomised(config)
    x = torch.ones(1, 2, 16)
    assert torch.equal(model(x, model.rotation[:2]), model(x, model.rotation[:2]))
    model.blocks = nn.ModuleList()
    model.train()
    torch.manual_seed(0)
    dropped = model(x, model.rotation[:2])
    assert all(set(slot.tolist()) == {0.0, 2.0} for slot in dropped[0])
