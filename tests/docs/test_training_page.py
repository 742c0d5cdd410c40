"""docs/training.md against the code: recipes, numbers of validation, what may change when a run goes on."""

import math
import re
from pathlib import Path

import pytest

from mergevq import presets
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.generator_config import GeneratorRun, TokenFacts, fit_model
from mergevq.training.generator_validation import _named
from mergevq.training.recovery_config import RecoveryRun

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def rows(section: str) -> list[list[str]]:
    """The cells of the table rows below a heading, without the table's head."""
    text = re.split(r"^#+ ", PAGE.split(f"# {section}\n")[1], flags=re.MULTILINE)[0]
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found[2:]]


def test_the_recipes_are_the_presets() -> None:
    recipes = {row[0].strip("`"): row[1:] for row in rows("One optimizer step of a generator")}
    assert {*recipes, *(f"{name}_random" for name in recipes)} == set(presets.generator_names())
    for name, (samples, steps, rate, warmup, average, smoothing) in recipes.items():
        for preset in (name, f"{name}_random"):
            run = presets.generator(preset)
            loop, optim = run.loop, run.optim
            product = math.prod(int(n) for n in samples.split(" = ")[-1].split(" × "))
            assert product == int(samples.split(" = ")[0]) == loop.batch_size * loop.accumulate
            assert steps == ("two minutes" if loop.minutes == 2 else f"{loop.steps:,}")
            assert float(rate.split(",")[0]) == optim.lr
            assert ("cosine" in rate) == (optim.schedule == "cosine")
            assert (warmup, float(average)) == (f"{optim.warmup_steps:,}", optim.ema_decay)
            assert float(smoothing) == run.loss.label_smoothing
            if optim.schedule == "step":
                assert optim.decay_at == (0.85, 0.95)


def test_the_table_of_what_tokens_decide_is_what_they_change() -> None:
    before = presets.generator("b_256")
    facts = TokenFacts((8, 8), 14, 2, ("cats", "dogs"), "f" * 64, (16, 26, 36))
    after = fit_model(before, facts)
    changed = {
        f"{part}.{name}"
        for part in ("model", "loss", "data", "optim", "loop")
        for name in vars(getattr(after, part))
        if getattr(getattr(after, part), name) != getattr(getattr(before, part), name)
    }
    told = {name for row in rows("What the tokens decide") for name in re.findall(r"`([\w.]+)`", row[0])}
    assert told == changed
    assert (after.model.groups, after.model.num_tokens, after.loop.val_num_tokens) == ((7, 7), 26, (26,))


def test_the_numbers_of_validation_are_in_the_table() -> None:
    import torch

    told = {name for row in rows("The numbers of validation") for name in re.findall(r"`(\w+)`", row[0])}
    assert told == set(_named(torch.ones(2, 3, dtype=torch.float64), kinds=True))


def test_the_recipes_of_fine_tuning_are_the_presets() -> None:
    recipes = {row[0].strip("`"): row[1:] for row in rows("Fine-tuning")}
    assert set(recipes) == set(presets.finetune_names())
    for name, (samples, steps, rate, decay, drop_path, mixing) in recipes.items():
        run = presets.finetune(name)
        product = math.prod(int(n) for n in samples.split(" = ")[-1].split(" × "))
        assert product == int(samples.split(" = ")[0]) == run.loop.batch_size * run.loop.accumulate
        assert steps == f"{run.loop.steps:,}"
        assert [float(rate), float(decay), float(drop_path)] == [
            run.optim.lr,
            run.optim.layer_decay,
            run.model.drop_path,
        ]
        assert [float(n) for n in mixing.split(", ")] == [run.loss.mixup, run.loss.cutmix]


@pytest.mark.parametrize("run", [GeneratorRun, RecoveryRun, FinetuneRun])
def test_what_may_change_on_resuming_is_named(run: type[GeneratorRun | RecoveryRun | FinetuneRun]) -> None:
    text = PAGE.split("These may change:")[1].split("The number of processes")[0]
    for name in run.free_fields:
        assert name in text or f"`{name.removeprefix('loop.')}`" in text, name
