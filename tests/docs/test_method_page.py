"""The generator chapters of docs/method.md against the code: the picture of the mask, formulas, sizes."""

import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch

from mergevq import presets
from mergevq.generator.cache import MergeCache, num_slots
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.masks import merge_mask
from mergevq.generator.parallel import group_sizes, step_bias
from mergevq.sampling import GuidanceSchedule, guidance_scale
from mergevq.training.dry_run import count_parameters

PAGE = (Path(__file__).parents[2] / "docs" / "method.md").read_text()


def test_the_picture_is_the_mask() -> None:
    kinds = re.search(r"^kind +([\d ]+)$", PAGE, re.M)
    rows = re.findall(r"^t = \d  ([IRCE. ]+)$", PAGE, re.M)
    assert kinds is not None
    index = torch.tensor([[int(kind) for kind in kinds[1].split()]])
    seen = merge_mask(index, MaskConfig())[0]
    assert seen.shape == (len(rows), len(rows))
    for t, row in enumerate(rows):
        letters = row.split()
        assert letters[t:] == ["I", *"." * (len(rows) - t - 1)]
        for j, letter in enumerate(letters[:t]):
            assert bool(seen[t, j]) == (letter in "RC")
            assert (letter == "R") == (t - j <= 2)


def test_the_table_of_mask_settings_has_the_defaults() -> None:
    table = PAGE.split("| `mask.` | default |")[1].split("\n\n")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `?(\w+)`? \|", table, re.M))
    defaults = {name: {False: "off"}.get(value, str(value)) for name, value in vars(MaskConfig()).items()}
    assert told == defaults


def test_the_schedules_are_the_formulas() -> None:
    table = PAGE.split("| `guidance_schedule` | scale |")[1].split("\n\n")[0]
    formulas = dict(re.findall(r"^\| `(\w+)` \| ([^|,]*)", table, re.M))
    assert set(formulas) == set(get_args(GuidanceSchedule))
    assert formulas.pop("interval").startswith("s where p lies in")
    for kind, formula in formulas.items():
        # The page's notation to Python's: products and the cosine are not written out there.
        code = formula.replace("−", "-").replace("cos πp", "math.cos(math.pi * p").replace("^q", " ** q")
        code = code.replace("p)", "p))").replace("** q)", "** q))").replace(") p", ") * p").replace(") (", ") * (")
        for p in (0.0, 0.3, 1.0):
            value = eval(code, {"math": math, "s": 3.0, "p": p, "q": 2.5})
            assert guidance_scale(kind, 3.0, p, 2.5) == pytest.approx(value), kind  # type: ignore[arg-type]


def test_the_drawn_steps_are_what_each_step_sees() -> None:
    lines = [line.split()[2:] for line in re.findall(r"^step \d .*$", PAGE, re.M)]
    done = 0
    for slots, size in zip(lines, (1, 2, 3), strict=True):
        pairs, instructions = slots[2 : 2 + 2 * done], slots[2 + 2 * done :]
        assert [slot[0] for slot in pairs] == ["P", "x"] * done
        assert instructions == [f"P_{letter}" for letter in "abcdef"[done : done + size]]
        # All of them see the pairs and themselves, and not one another.
        end = len(slots)
        bias = step_bias(0, end - size, end, end)[0, 0, -size:] == 0
        assert torch.equal(bias[:, : end - size], torch.ones(size, end - size, dtype=torch.bool))
        assert torch.equal(bias[:, end - size :], torch.eye(size, dtype=torch.bool))
        done += size
    assert done == 6


@pytest.mark.parametrize(("num_tokens", "steps"), [(144, 36), (256, 88), (64, 16), (36, 36)])
def test_parallel_steps_follow_the_formula(num_tokens: int, steps: int) -> None:
    done, told = 0, []
    for step in range(1, steps + 1):
        wanted = round(num_tokens * (1 - math.cos(math.pi / 2 * step / steps)))
        now = min(max(wanted, done + 1), num_tokens - (steps - step))
        told.append(now - done)
        done = now
    sizes = group_sizes(num_tokens, steps)
    assert sorted(told) == [*sizes]
    assert (sum(sizes), min(sizes)) == (num_tokens, 1)


@pytest.mark.parametrize("distinct", [1, 7, 60])
def test_the_bound_of_the_merge_cache_holds_at_every_step(distinct: int) -> None:
    config = GeneratorConfig(grid=(8, 8), num_bits=6, groups=(6,), num_tokens=8, width=8, depth=1, heads=1)
    cache = MergeCache(config, 2, 1, chunk=5, device=torch.device("cpu"))
    index = torch.randint(distinct, (2, 64), generator=torch.Generator().manual_seed(0))
    most = max(len(row.unique()) for row in index)
    for step in range(1, 64):
        if (step - 1) % 5 == 0:
            cache.make_room(step)
        cache.advance(cache.state, config.mask, config.prefix_length, torch.tensor([step]), index[:, step - 1])
        assert num_slots(cache.state) <= 2 + 2 + most + 2 * 5


def test_the_sizes_without_instructions_are_the_sums() -> None:
    told = PAGE.split("have the sizes of the authors' configuration:")[1].split(". The merge")[0]
    sizes = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", told)]
    for name, size in zip(("b_256", "l_256", "xl_256"), sizes, strict=True):
        width = presets.generator(name).model.width
        instruction = width + 2 * width**2
        assert count_parameters(presets.generator(name))["generator"] == size + instruction
        assert count_parameters(presets.generator(f"{name}_random"))["generator"] == size + 2 * instruction
