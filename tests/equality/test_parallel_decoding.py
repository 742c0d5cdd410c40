"""Parallel decoding against whole forwards under a mask written out, at every step, and against training."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergevq.generator.config import GeneratorConfig
from mergevq.generator.parallel import group_sizes
from mergevq.generator.random_order import RandomAR
from mergevq.layers.rotary import rotation_1d
from mergevq.sampling import GuidanceSchedule, draw, filter_logits, guidance_scale, guide, image_uniforms

NO_CLASS = 3


def random_model(groups: tuple[int, ...] = (2, 4), kv_heads: int = 2) -> RandomAR:
    """L = 12; every weight drawn at random, large enough that every key matters."""
    config = GeneratorConfig(
        order="random", grid=(3, 4), num_bits=sum(groups), groups=groups, num_classes=NO_CLASS, num_tokens=9,
        width=32, depth=2, group_depth=1, heads=4, kv_heads=kv_heads, ffn_multiple=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = RandomAR(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


MODEL = random_model()


class Recorded(NamedTuple):
    """What a run of `generate` gave."""

    index: torch.Tensor
    """[B, K] in order of rank."""
    logits: list[list[torch.Tensor]]
    """Of each step and bit group, before guidance, [branches, B, N, 2**bits]."""


def record(model: RandomAR, monkeypatch: pytest.MonkeyPatch, branches: int = 1, **options: object) -> Recorded:
    """Generates, and keeps the logits of every step."""
    logits: list[list[torch.Tensor]] = []
    original = model.transformer.sample_groups
    images = len(options["seeds"])  # type: ignore[arg-type]

    def listen(hidden: torch.Tensor, choose: Callable[[int, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        logits.append([])

        def heard(group: int, part: torch.Tensor) -> torch.Tensor:
            logits[-1].append(part.unflatten(0, (branches, images, -1)))
            return choose(group, part)

        return original(hidden, heard)

    with monkeypatch.context() as patch:
        patch.setattr(model.transformer, "sample_groups", listen)
        tokens = model.generate(**options)  # type: ignore[arg-type]
    return Recorded(tokens.index, logits)


@torch.no_grad()
def whole_forward(
    model: RandomAR, label: int, num_tokens: int, known: list[tuple[int, int]], asked: list[int]
) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Feeds one image without a cache: prefix, then known pairs (rank, index), then the instructions of `asked` ranks,
    which do not see one another. Returns the function from true tokens of the asked to their logits.
    """
    transformer, config = model.transformer, model.config
    k = torch.tensor([num_tokens])
    parts = [transformer.prefix(torch.tensor([label]), k)[0]]
    turns = [torch.tensor([[1.0, 0.0]]).expand(2, config.head_width // 2, 2)]

    def turn(rank: int) -> torch.Tensor:
        return rotation_1d(torch.tensor([rank]), config.head_width, config.rotary_base)

    for rank, index in known:
        parts += [
            model.rank_instruction(torch.tensor([rank / num_tokens])),
            transformer.embed(torch.tensor([[index]]))[0],
        ]
        turns += [turn(rank), turn(rank)]
    for rank in asked:
        parts.append(model.rank_instruction(torch.tensor([rank / num_tokens])))
        turns.append(turn(rank))
    x, rotation = torch.cat(parts)[None], torch.cat(turns)
    length, finished = x.shape[1], 2 + 2 * len(known)
    bias = torch.full((length, length), -torch.inf)
    for row in range(length):
        for key in range(length):
            if key == row or (key < row and key < finished):
                bias[row, key] = 0
    hidden = transformer(x, rotation, bias[None, None])[:, finished:]
    return lambda index: transformer.group_logits(hidden, index[None])


@torch.no_grad()
def sample_plainly(
    model: RandomAR,
    label: int,
    seed: int,
    num_tokens: int,
    sizes: list[int],
    guidance: float,
    schedule: GuidanceSchedule = "constant",
    **filters: float,
) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Samples one image by whole forwards. Returns its tokens in order of rank, and logits [branches, N, V]."""
    groups = len(model.config.groups)
    noise = image_uniforms(seed, num_tokens, groups + 1)
    order = noise[:, -1].argsort(stable=True).tolist()
    known: list[tuple[int, int]] = []
    steps = []
    for size in sizes:
        asked = order[len(known) : len(known) + size]
        scale = guidance_scale(schedule, guidance, len(known) / max(1, num_tokens - 1))
        branches = [label] if guidance == 1 else [label, NO_CLASS]
        forwards = [whole_forward(model, branch, num_tokens, known, asked) for branch in branches]
        index, low, step = torch.zeros(size, dtype=torch.int64), 0, []
        for group, bits in enumerate(model.config.groups):
            logits = torch.cat([forward(index)[group] for forward in forwards])
            step.append(logits)
            guided = logits[0] if guidance == 1 else guide(logits[0], logits[1], scale)
            index += draw(filter_logits(guided, **filters), noise[asked, group]) << low  # type: ignore[arg-type]
            low += bits
        steps.append(step)
        known += zip(asked, index.tolist(), strict=True)
    return torch.tensor([index for _, index in sorted(known)]), steps


def compare(
    model: RandomAR, recorded: Recorded, row: int, plain: tuple[torch.Tensor, list[list[torch.Tensor]]]
) -> None:
    """The same tokens, and logits within 1e-5."""
    assert recorded.index[row, : len(plain[0])].tolist() == plain[0].tolist()
    assert len(recorded.logits) == len(plain[1])
    for step, expected in zip(recorded.logits, plain[1], strict=True):
        for part, wanted in zip(step, expected, strict=True):
            torch.testing.assert_close(part[:, row], wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(
    num_tokens=st.integers(1, 12),
    data=st.data(),
    labels=st.lists(st.integers(0, NO_CLASS - 1), min_size=1, max_size=3),
    guidance=st.sampled_from([1.0, 2.5]),
    schedule=st.sampled_from(["constant", "linear"]),
)
def test_every_step_equals_a_whole_forward(
    num_tokens: int, data: st.DataObject, labels: list[int], guidance: float, schedule: GuidanceSchedule
) -> None:
    steps = data.draw(st.integers(1, num_tokens), label="steps")
    seeds = data.draw(st.lists(st.integers(0, 2**62), min_size=len(labels), max_size=len(labels)), label="seeds")
    with pytest.MonkeyPatch.context() as patch:
        recorded = record(
            MODEL, patch, 1 if guidance == 1 else 2,
            classes=labels, num_tokens=num_tokens, steps=steps, seeds=seeds, guidance=guidance,
            guidance_schedule=schedule,
        )  # fmt: skip
    for row, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        sizes = [*group_sizes(num_tokens, steps)]
        compare(MODEL, recorded, row, sample_plainly(MODEL, label, seed, num_tokens, sizes, guidance, schedule))


@pytest.mark.parametrize(("groups", "kv_heads"), [((5,), 4), ((1, 2, 3), 1)])
def test_one_at_a_time_for_other_bit_groups_and_filters(
    monkeypatch: pytest.MonkeyPatch, groups: tuple[int, ...], kv_heads: int
) -> None:
    """steps = K is sampling one token after the other, each by a forward of everything before it."""
    model = random_model(groups, kv_heads)
    filters = {"temperature": 0.8, "top_k": 3, "top_p": 0.9}
    recorded = record(model, monkeypatch, classes=[1, 2], num_tokens=11, steps=11, seeds=[5, 6], **filters)
    default = model.generate(classes=[1, 2], num_tokens=11, seeds=[5, 6], **filters)  # type: ignore[arg-type]
    assert torch.equal(default.index, recorded.index)
    for row in range(2):
        compare(model, recorded, row, sample_plainly(model, row + 1, 5 + row, 11, [1] * 11, 1.0, **filters))


@pytest.mark.parametrize("steps", [12, 5, 1])
@torch.no_grad()
def test_sampling_sees_what_training_sees(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Cached logits equal those of the training forward given the result: all of them one at a time, and of groups the
    first token.
    """
    recorded = record(MODEL, monkeypatch, classes=[0, 2], num_tokens=12, steps=steps, seeds=[1, 2])
    order = torch.stack([image_uniforms(seed, 12, 3)[:, -1].argsort(stable=True) for seed in (1, 2)])
    trained = MODEL(recorded.index, torch.tensor([0, 2]), torch.tensor([12, 12]), order)
    done = 0
    for size, step in zip(group_sizes(12, steps), recorded.logits, strict=True):
        for part, whole in zip(step, trained, strict=True):
            in_order = whole[torch.arange(2)[:, None], order]
            torch.testing.assert_close(part[0, :, 0], in_order[:, done], atol=1e-5, rtol=1e-5)
            if size > 1:  # The others do not see the first, in training they do.
                assert not torch.allclose(part[0, :, 1], in_order[:, done + 1], atol=1e-3)
        done += size
