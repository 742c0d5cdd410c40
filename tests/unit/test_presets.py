"""Presets: the sizes of the paper, laws that are laws, names that help."""

import pytest
import torch

from mergevq import presets
from mergevq.errors import ConfigError
from mergevq.generator.config import MaskConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.training.generator_loss import build_generator


def count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


# Parameters of the authors' networks: encoder without head, decoder, head.
PAPER = {
    "g_256": (62_333_714, 82_847_171, 2_628_352),
    "g_256_d32": (38_220_786, 51_434_051, 1_774_848),
    "gr_256": (62_666_578, 83_367_235, 6_820_608),
    "gr_256_d32": (38_553_650, 51_954_115, 4_132_608),
    "gr_256_d96": (140_909_298, 187_194_339, 14_162_688),
    "r_256": (85_681_170, 83_367_235, 14_162_688),
}


@pytest.mark.parametrize("name", presets.tokenizer_names())
def test_every_preset_builds_with_the_papers_parameters(name: str) -> None:
    run = presets.tokenizer(name)
    with torch.device("meta"):
        model = MergeVQ(run.model)
    if name in PAPER:
        assert (count(model.encoder), count(model.decoder), count(model.alignment)) == PAPER[name]
        assert 7_000_000 < count(model.recovery) < 8_000_000
    assert run.model.num_tokens in range(1, run.model.num_patches + 1)
    assert run.model.downsampling == {"g": 8, "gr": 16, "r": 16, "tiny": 4, "emoji": 8}[name.split("_")[0]] // (
        2 if "_64" in name else 1
    )


def test_the_paper_presets_have_the_papers_patches_and_tokens() -> None:
    sizes = {
        name: (presets.tokenizer(name).model.num_patches, presets.tokenizer(name).model.num_tokens) for name in PAPER
    }
    assert sizes["g_256"] == (1024, 256)
    assert sizes["gr_256"] == (256, 144)
    assert sizes["r_256"] == (256, 36)
    assert all(presets.tokenizer(name).model.num_bits == 18 for name in PAPER)


@pytest.mark.parametrize("name", presets.tokenizer_names())
def test_laws_of_k_are_laws(name: str) -> None:
    loop = presets.tokenizer(name).loop
    if loop.num_tokens_probs:
        assert sum(loop.num_tokens_probs) == pytest.approx(1)
        assert min(loop.num_tokens_probs) > 0
    assert len(set(loop.num_tokens)) == len(loop.num_tokens)


def test_g_256_draws_k_by_the_authors_law() -> None:
    loop = presets.tokenizer("g_256").loop
    assert loop.num_tokens[:-1] == (225, 256, 289, 324, 361, 400, 441, 484, 529)
    law = [0.10769, 0.60958 + 0.00053, 0.10769, *(0.02925,) * 6]
    assert [p / 0.9 for p in loop.num_tokens_probs[:-1]] == pytest.approx(law, abs=2e-3)
    assert loop.num_tokens[-1] == 1024
    assert loop.num_tokens_probs[-1] == pytest.approx(0.1)


def test_a_misspelt_preset_names_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"gr_265.*did you mean gr_256"):
        presets.tokenizer("gr_265")
    with pytest.raises(ConfigError, match=r"l256.*did you mean l_256"):
        presets.generator("l256")


@pytest.mark.parametrize("name", ["b_256", "l_256", "xl_256", "l_256_random"])
def test_generators_of_the_paper_have_its_batch_and_epochs(name: str) -> None:
    loop = presets.generator(name).loop
    assert loop.batch_size * loop.accumulate * 8 == 1024
    assert loop.steps * 1024 // 1_281_167 == 300


@pytest.mark.parametrize("name", presets.generator_names())
def test_every_generator_preset_builds(name: str) -> None:
    run = presets.generator(name)
    with torch.device("meta"):
        size = count(build_generator(run.model))
    if name.startswith("emoji_64"):
        assert 2 * size < 11_800_000, "less than 12 MB in half precision"
    if name.startswith("s_64"):
        assert 2_000_000 < size < 2_500_000
    assert run.model.mask == MaskConfig(recent=run.model.grid[1]), "a row is in sight"
    assert run.loop.num_tokens == (), "all that the tokens have"
