"""Sampling: guidance, filters and draws against plain references, at the ends of their ranges, and compiled."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergevq.errors import ConfigError
from mergevq.sampling import (
    SamplingOptions,
    draw,
    filter_logits,
    guidance_scale,
    guide,
    image_seeds,
    image_uniforms,
)

KINDS = ("constant", "linear", "cosine", "power_cosine", "interval")


def random_logits(rows: int, size: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def plain_filter(row: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The filters of one row of logits with lists alone, as the definition reads."""
    if temperature == 0:
        return [x if i == row.index(max(row)) else -math.inf for i, x in enumerate(row)]
    row = [x / temperature for x in row]
    if 0 < top_k < len(row):
        smallest = sorted(row, reverse=True)[top_k - 1]
        row = [x if x >= smallest else -math.inf for x in row]
    if top_p < 1:
        weights = [math.exp(x - max(row)) for x in row]
        so_far, kept = 0.0, set()
        for i in sorted(range(len(row)), key=lambda i: -row[i]):  # Stable, as Python's sorting is.
            if so_far > top_p:
                break
            kept.add(i)
            so_far += weights[i] / sum(weights)
        row = [x if i in kept else -math.inf for i, x in enumerate(row)]
    return row


# --------------------------------------------------------------------------------------------------------- guidance


def test_guidance_is_exact_at_both_branches_and_extrapolates_beyond() -> None:
    conditional, unconditional = random_logits(3, 9, 0), random_logits(3, 9, 1)
    assert torch.equal(guide(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guide(conditional, unconditional, 0.0), unconditional)
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 2.5), expected)
    torch.testing.assert_close(guide(conditional, unconditional, torch.tensor(2.5)), expected)
    half = guide(conditional.bfloat16(), unconditional.bfloat16(), torch.tensor(2.5, dtype=torch.float64))
    assert half.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_1_stays_1(kind: str) -> None:
    assert all(guidance_scale(kind, 1.0, p / 7, power=2.5, interval=(0.2, 0.7)) == 1 for p in range(8))


def test_schedules_follow_their_formulas() -> None:
    def at(kind: str, progress: float, **options: object) -> float:
        return guidance_scale(kind, 4.0, progress, **options)  # type: ignore[arg-type]

    assert [at("constant", p) for p in (0.0, 0.3, 1.0)] == [4, 4, 4]
    assert [at("linear", p) for p in (0.0, 0.5, 1.0)] == [1, 2.5, 4]
    for kind in ("cosine", "power_cosine"):
        assert [at(kind, p) for p in (0.0, 1.0)] == [1, 4]
        assert at(kind, 0.5) == pytest.approx(2.5)
    assert at("cosine", 1 / 3, power=9.0) == pytest.approx(1.75)
    assert at("power_cosine", 0.5, power=2.0) == pytest.approx(1 + 3 * (1 - math.sqrt(0.5)) / 2)
    interval = [at("interval", p, interval=(0.25, 0.5)) for p in (0.0, 0.24, 0.25, 0.4, 0.5, 0.51, 1.0)]
    assert interval == [1, 1, 4, 4, 4, 1, 1]


def test_scales_are_given_to_each_group_and_say_which_branches_are_needed() -> None:
    options = SamplingOptions(guidance=(1.9, 3.0), schedule="linear")
    assert options.scales(2, 1.0) == (1.9, 3.0)
    assert options.scales(2, 0.5) == pytest.approx((1.45, 2.0))
    assert options.branches(2) == "both"
    assert SamplingOptions().branches(3) == "conditional"
    assert SamplingOptions(schedule="linear").branches(3) == "conditional"
    assert SamplingOptions(guidance=0).branches(1) == "unconditional"
    assert SamplingOptions(guidance=0, schedule="linear").branches(1) == "both"  # It starts at 1.
    assert SamplingOptions(guidance=(0, 1)).branches(2) == "both"


# ---------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 16, 99])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_filters_agree_with_the_definition(temperature: float, top_k: int, top_p: float) -> None:
    logits = random_logits(20, 16)
    logits[10:] = logits[10:].round()  # With many that are equal.
    expected = [plain_filter(row, temperature, top_k, top_p) for row in logits.double().tolist()]
    torch.testing.assert_close(filter_logits(logits, temperature, top_k, top_p), torch.tensor(expected))


def test_top_p_changes_nothing_that_stays_and_sorts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(20, 64) * 3
    logits[10:] = logits[10:].round()
    logits[15:, ::3] = -torch.inf
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    before = ordered.softmax(-1).cumsum(-1, dtype=torch.float64).roll(1, -1)
    before[..., 0] = 0
    expected = {
        p: logits.masked_fill((before > p).gather(-1, order.argsort(-1)), -torch.inf) for p in (0.2, 0.9, 0.999)
    }
    monkeypatch.setattr(torch.Tensor, "argsort", None)
    for top_p, kept in expected.items():
        assert torch.equal(filter_logits(logits, top_p=top_p), kept)


def test_ties_at_the_kth_logit_all_stay() -> None:
    kept = filter_logits(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), top_k=2).isfinite()
    assert kept.tolist() == [[False, True, True, True, False]]


def test_top_p_keeps_the_one_that_exceeds_it_and_always_the_first() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    kept = {p: filter_logits(logits, top_p=p).isfinite()[0].tolist() for p in (0.01, 0.5, 0.51, 0.75, 0.76)}
    assert kept[0.01] == [False, True, False, False]
    # The sum reaches 0.5 with the first and does not exceed it, so the next one is still kept.
    assert kept[0.5] == kept[0.51] == [True, True, False, False]
    assert kept[0.75] == kept[0.76] == [True, True, True, False]


def test_extreme_temperatures_stay_finite_numbers() -> None:
    logits = random_logits(4, 8, spread=30.0)
    uniform = torch.rand(4)
    for temperature in (0, 1e-320, 1e-9, 1e-7):
        assert torch.equal(draw(filter_logits(logits, temperature), uniform), logits.argmax(-1))
    assert draw(filter_logits(logits, 1e30), torch.full((4,), 0.55)).tolist() == [4] * 4  # All alike.


def test_half_precision_logits_are_filtered_in_float32() -> None:
    logits = random_logits(2, 6).bfloat16()
    assert torch.equal(filter_logits(logits, 0.7), logits.float() / 0.7)


# ------------------------------------------------------------------------------------------------------------ drawing


def test_draws_follow_softmax_exactly() -> None:
    """On a grid of uniforms, the share of each number is its probability up to one grid step; no luck involved."""
    steps = 20_000
    grid = (torch.arange(steps) + 0.5) / steps
    for seed in range(5):
        logits = random_logits(1, 12, seed)
        logits[0, seed] = -torch.inf
        drawn = draw(logits.expand(steps, -1), grid)
        share = torch.bincount(drawn, minlength=12) / steps
        torch.testing.assert_close(share, logits.softmax(-1)[0], rtol=0, atol=1.01 / steps)
        assert torch.equal(drawn, drawn.sort().values)  # The inverse of a distribution function.


def test_rare_numbers_at_the_end_of_a_large_vocabulary_are_drawn() -> None:
    """2**16 equal logits have a float32 sum whose last steps would be rounded away."""
    size = 2**16
    middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    wanted = torch.tensor([0, 1, 777, size // 2, size - 2, size - 1])
    logits = torch.zeros(len(wanted), size)
    assert torch.equal(draw(logits, middle[wanted].float()), wanted)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-200, 200, width=32) | st.just(-math.inf), min_size=1, max_size=40).filter(
        lambda row: max(row) > -math.inf
    ),
    uniform=st.floats(0, 1, width=32) | st.sampled_from([0.0, 1 - 2**-24, 1.0]),
)
def test_what_is_masked_is_never_drawn(logits: list[float], uniform: float) -> None:
    row = torch.tensor([logits])
    drawn = draw(row, torch.tensor([uniform]))
    assert row[0, drawn.item()] > -torch.inf
    assert row.softmax(-1)[0, drawn.item()] > 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1),
    uniform=st.sampled_from([0.0, 0.5, 1 - 2**-24]),
)
def test_a_filtered_draw_stays_in_what_the_filters_leave(
    seed: int, temperature: float, top_k: int, top_p: float, uniform: float
) -> None:
    logits = random_logits(3, 10, seed)
    left = filter_logits(logits, temperature, top_k, top_p)
    drawn = draw(left, torch.full((3,), uniform))
    assert left.gather(-1, drawn[:, None]).isfinite().all()
    assert left.isfinite().gather(-1, logits.argmax(-1, keepdim=True)).all()
    assert temperature > 0 or torch.equal(drawn, logits.argmax(-1))


def test_not_finite_logits_still_give_a_valid_number() -> None:
    """What is drawn indexes an embedding before anybody may look at it; out of range would end a GPU process."""
    drawn = draw(torch.full((2, 5), torch.nan), torch.tensor([0.0, 0.9]))
    assert ((drawn >= 0) & (drawn < 5)).all()


# --------------------------------------------------------------------------------------------------------- randomness


def test_seeds_of_the_first_images_do_not_depend_on_how_many_follow() -> None:
    few = image_seeds(torch.Generator().manual_seed(3), 4)
    many = image_seeds(torch.Generator().manual_seed(3), 100)
    assert many[:4] == few
    assert len(set(many)) == 100
    rng = torch.Generator().manual_seed(3)
    assert image_seeds(rng, 4) == few
    assert image_seeds(rng, 4) != few


def test_without_an_rng_torch_manual_seed_decides() -> None:
    torch.manual_seed(5)
    first = image_seeds(None, 2)
    torch.manual_seed(5)
    assert image_seeds(None, 2) == first


def test_uniforms_belong_to_the_seed_and_the_position() -> None:
    noise = image_uniforms(11, 300, 2)
    assert torch.equal(image_uniforms(11, 20, 2), noise[:20])
    assert not torch.equal(image_uniforms(12, 300, 2), noise)
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.unique().numel() > 590
    for seed in (-(2**63), 2**64 - 1):
        image_uniforms(seed, 1, 1)
    with pytest.raises(ConfigError, match="at most 64 bits"):
        image_uniforms(2**64, 1, 1)


# ------------------------------------------------------------------------------------------------------------ options


def test_one_value_is_given_to_all_groups_and_many_to_each() -> None:
    groups = SamplingOptions(temperature=(1.1, 1.0), top_k=(0, 600), top_p=0.96, guidance=(1.9, 2.0)).per_group(2)
    assert [tuple(g) for g in groups] == [(1.1, 0, 0.96, 1.9), (1.0, 600, 0.96, 2.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature of at least 0"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": (1.0, math.inf)}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "whole number"),
        ({"top_p": 0}, "top_p above 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"guidance": -1}, "guidance of at least 0"),
        ({"guidance": (1.0, math.nan)}, "guidance"),
        ({"guidance": 1e39}, r"at most 1e\+06, got 1e\+39"),
        ({"guidance": (1.0, 1.0, 1.0)}, "one for each of the 2 bit groups, got 3"),
        ({"temperature": ()}, "got 0"),
        ({"schedule": "stepwise"}, "power_cosine"),
        ({"power": 0}, "power above 0"),
        ({"power": math.nan}, "power"),
        ({"interval": (0.5, 0.5)}, "increases"),
        ({"interval": (0.5, 1.5)}, "within 0..1"),
        ({"interval": (math.nan, 1)}, "interval"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(unchecked: None, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SamplingOptions(**options).check(2)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_progress_outside_its_range_is_refused() -> None:
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="progress"):
            guidance_scale("linear", 2.0, progress)


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.compile
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_whole_choice_compiles_as_one_graph(temperature: float) -> None:
    def choose(conditional: Tensor, unconditional: Tensor, scale: Tensor, uniform: Tensor) -> Tensor:
        return draw(filter_logits(guide(conditional, unconditional, scale), temperature, 5, 0.9), uniform)

    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    for seed in range(3):
        arguments = (
            random_logits(6, 20, seed),
            random_logits(6, 20, seed + 9),
            torch.tensor(1.5 + seed),
            torch.rand(6, generator=torch.Generator().manual_seed(seed)),
        )
        assert torch.equal(compiled(*arguments), choose(*arguments))


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws() -> None:
    """Its sums run in another order, so a number may differ where the noise meets an edge; nothing masked is drawn."""
    logits = random_logits(2_000, 4096)
    logits[:, ::3] = -torch.inf
    noise = torch.cat([torch.rand(1_998, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1.0])])
    here = draw(filter_logits(logits, 0.9, 1000, 0.95), noise)
    there = draw(filter_logits(logits.cuda(), 0.9, 1000, 0.95), noise.cuda()).cpu()
    assert (there % 3 != 0).all()
    assert (here == there).float().mean() > 0.999
    assert torch.equal(draw(filter_logits(logits.cuda(), 0), noise.cuda()).cpu(), logits.argmax(-1))
