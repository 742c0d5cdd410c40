"""MergeAR: what its training forward sees, what `generate` takes and refuses, and that images are their own."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergevq
from mergevq.errors import CheckpointError, ConfigError, MissingDependencyError, OutputExistsError, ShapeError
from mergevq.files import read_header, save_tensors
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.generator.generate import check_pair, default_batch_size, load_generator, resolve_classes
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR

CONFIG = GeneratorConfig(
    grid=(3, 4), num_bits=4, groups=(2, 2), num_classes=3, class_names=("Red fox", "owl", "snow owl"), num_tokens=6,
    trained_num_tokens=(2, 9), tokenizer="ab" * 32, width=16, depth=2, group_depth=1, heads=2, ffn_multiple=8,
)  # fmt: skip


def randomised(config: GeneratorConfig = CONFIG) -> MergeAR:
    """A model in evaluation mode whose every weight, heads too, is drawn at random."""
    torch.manual_seed(0)
    model = MergeAR(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> MergeAR:
    return randomised()


# ------------------------------------------------------------------------------------------------------------- training


def logits_of(model: MergeAR, index: torch.Tensor, **changes: Any) -> torch.Tensor:
    classes = changes.pop("classes", torch.zeros(len(index), dtype=torch.int64))
    num_tokens = changes.pop("num_tokens", torch.full((len(index),), 6))
    with torch.no_grad():
        return torch.cat(model(index, classes, num_tokens, **changes), -1)


def test_a_prediction_knows_nothing_of_its_token_or_later_ones(model: MergeAR) -> None:
    index = torch.randint(16, (1, 12), generator=torch.Generator().manual_seed(0))
    base = logits_of(model, index)
    for t in range(12):
        other = index.clone()
        other[0, t] ^= 0b1000  # In the last group, which no other group of this token sees.
        moved = (logits_of(model, other) - base).abs().amax((0, 2)) > 1e-6
        assert not moved[: t + 1].any()
        # The next row sees it, unless it is the last.
        assert t == 11 or moved[t + 1]


def test_a_dropped_duplicate_is_not_seen(model: MergeAR) -> None:
    index = torch.tensor([[1, 2, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11]])
    labels = torch.arange(12)[None]
    merged = labels.clone()
    merged[0, 3] = 1  # Patches 1 and 3 are one token: the second drops out once it is no longer recent.
    everything, less = logits_of(model, index, duplicates=labels), logits_of(model, index, duplicates=merged)
    assert torch.equal(less, logits_of(model, index))
    differs = (everything - less).abs().amax((0, 2)) > 1e-6
    assert differs.tolist() == [False] * 6 + [True] * 6


def test_class_and_wanted_count_matter(model: MergeAR) -> None:
    index = torch.zeros(1, 12, dtype=torch.int64)
    base = logits_of(model, index)
    assert not torch.allclose(base, logits_of(model, index, classes=torch.tensor([2])), atol=1e-4)
    assert not torch.allclose(base, logits_of(model, index, num_tokens=torch.tensor([7])), atol=1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    model = randomised().train()
    logits = model(torch.randint(16, (2, 12)), torch.tensor([0, 3]), torch.tensor([3, 6]))
    sum(part.logsumexp(-1).sum() for part in logits).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------- sampling


def full_index(model: MergeAR, *arguments: Any, **options: Any) -> torch.Tensor:
    return model.generate(*arguments, **options).full_index()


@pytest.mark.parametrize("cache", ["merge", "full"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(model: MergeAR, cache: Any) -> None:
    classes, seeds, kept = [2, 0, 1, 1, 2], [5, 6, 7, 8, 9], [2, 3, 4, 6, 6]
    options = {"guidance": 3.0, "cache": cache, "chunk": 3}
    together = full_index(model, classes, num_tokens=kept, seeds=seeds, **options)
    for size in (1, 2, 4):
        assert torch.equal(
            full_index(model, classes, num_tokens=kept, seeds=seeds, batch_size=size, **options), together
        )
    for i in range(5):
        alone = full_index(model, classes[i : i + 1], num_tokens=kept[i], seeds=[seeds[i]], **options)
        assert torch.equal(alone, together[i : i + 1])


def test_rng_gives_the_seeds_and_fewer_images_are_the_first(model: MergeAR) -> None:
    def images(count: int, seed: int) -> torch.Tensor:
        return full_index(model, num_images=count, rng=torch.Generator().manual_seed(seed))

    assert torch.equal(images(4, 0)[:2], images(2, 0))
    assert not torch.equal(images(4, 0), images(4, 1))


def test_guidance_of_one_and_zero_are_one_branch(model: MergeAR) -> None:
    classes, seeds = [0, 1, 2], [1, 2, 3]
    _, one = model.generate_with_stats(classes, seeds=seeds)
    _, two = model.generate_with_stats(classes, seeds=seeds, guidance=1.5)
    assert two.cache_bytes > 1.5 * one.cache_bytes
    conditional = full_index(model, classes, seeds=seeds)
    # Both branches, with a scale that never leaves 1.
    assert torch.equal(
        full_index(
            model, classes, seeds=seeds, guidance=5.0, guidance_schedule="interval", guidance_interval=(0.99, 0.995)
        ),
        conditional,
    )
    unconditional = full_index(model, num_images=3, seeds=seeds)
    assert not torch.equal(conditional, unconditional)
    assert torch.equal(full_index(model, classes, seeds=seeds, guidance=0), unconditional)
    assert torch.equal(full_index(model, num_images=3, seeds=seeds, guidance=7.0), unconditional)


def test_temperature_zero_needs_no_noise(model: MergeAR) -> None:
    first = full_index(model, [0, 1], seeds=[1, 2], temperature=0, guidance=2.0)
    assert torch.equal(first, full_index(model, [0, 1], seeds=[3, 4], temperature=0, guidance=2.0))
    assert not torch.equal(
        full_index(model, [0, 1], seeds=[1, 2]), full_index(model, [0, 1], seeds=[3, 4], guidance=2.0)
    )


def test_names_and_numbers_are_the_same_classes(model: MergeAR) -> None:
    assert torch.equal(full_index(model, ["owl", "red fox"], seeds=[1, 2]), full_index(model, [1, 0], seeds=[1, 2]))


def test_the_result_names_its_tokenizer_and_the_cost_is_counted(model: MergeAR) -> None:
    seen: list[int] = []
    tokens, stats = model.generate_with_stats([0] * 5, batch_size=2, on_images=seen.append, chunk=4)
    assert (tokens.grid, tokens.num_bits, tokens.tokenizer) == ((3, 4), 4, "ab" * 32)
    assert seen == [2, 2, 1] and (stats.images, stats.forwards) == (5, 36) and stats.seconds > 0
    _, full = model.generate_with_stats([0] * 5, batch_size=2, cache="full", chunk=4)
    assert full.cache_slots == 2 + 12
    # 2 blocks, keys and values, 2 images of 16 channels in float32, and the books.
    assert full.cache_bytes == 2 * 2 * 2 * 14 * 16 * 4 + 2 * 12 * (8 + 4 + 4)


def test_a_merge_cache_of_simple_images_is_smaller() -> None:
    config = replace(CONFIG, grid=(8, 8), num_bits=2, groups=(2,), mask=MaskConfig(recent=2))
    model = randomised(config)
    tokens, merged = model.generate_with_stats(num_images=2, seeds=[1, 2], chunk=4)
    _, full = model.generate_with_stats(num_images=2, seeds=[1, 2], chunk=4, cache="full")
    assert int(tokens.num_tokens.max()) <= 4
    assert merged.cache_slots <= 2 + 2 + 4 + 2 * 4 < full.cache_slots and merged.cache_bytes < full.cache_bytes / 4


def test_a_model_in_training_samples_without_dropout_and_goes_on_training() -> None:
    model = randomised()
    expected = full_index(model, [0, 1], seeds=[1, 2])
    model.train()
    assert torch.equal(full_index(model, [0, 1], seeds=[1, 2]), expected)
    assert model.training and model.transformer.blocks[0].training


def test_lower_precision_samples_nearly_the_same_distribution(model: MergeAR) -> None:
    seeds = list(range(40))
    exact = full_index(model, num_images=40, seeds=seeds)[:, 0]
    low, stats = model.generate_with_stats(num_images=40, seeds=seeds, dtype=torch.bfloat16)
    assert (low.full_index()[:, 0] == exact).float().mean() > 0.8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(full_index(model, num_images=40, seeds=seeds)[:, 0], exact)
    _, high = model.generate_with_stats(num_images=40, seeds=seeds)
    assert stats.cache_bytes < 0.7 * high.cache_bytes
    assert model.transformer.blocks[0].attention.qkv.weight.dtype == torch.float32


def test_one_patch_and_no_classes() -> None:
    config = replace(CONFIG, grid=(1, 1), num_classes=0, class_names=(), num_tokens=1, trained_num_tokens=(1, 1))
    tokens, stats = randomised(config).generate_with_stats(num_images=3, seeds=[1, 2, 3])
    assert tokens.num_tokens.tolist() == [1, 1, 1] and stats.forwards == 1


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ["snow ovl"]}, "such as snow owl, .*got 'snow ovl'"),
        ({"classes": ["?"]}, "such as Red fox, owl, snow owl, got"),
        ({"classes": [3]}, r"classes 0\.\.2, got 3"),
        ({"classes": [-1]}, r"classes 0\.\.2, got -1"),
        ({"classes": []}, "at least one image"),
        ({"classes": [0], "num_images": 2}, "1 classes and num_images 2"),
        ({"num_images": 0}, "at least one image"),
        ({"num_tokens": 0}, r"num_tokens in 1\.\.12, got 0"),
        ({"num_images": 2, "num_tokens": [5, 13]}, r"num_tokens in 1\.\.12, got 13"),
        ({"num_images": 3, "num_tokens": [5, 6]}, "or 3, one an image, got 2"),
        ({"num_images": 3, "seeds": [5, 6]}, "3 seeds, one an image, got 2"),
        ({"seeds": [5], "rng": torch.Generator()}, "rng or seeds, got both"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"chunk": 0}, "chunk of at least 1, got 0"),
        ({"guidance": -1.0}, "guidance of at least 0"),
        ({"temperature": (1.0, 1.0, 1.0)}, "each of the 2 bit groups, got 3"),
        ({"top_p": 0.0}, "top_p above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(model: MergeAR, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        model.generate(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cache", ["merge", "full"])
def test_no_cache_has_more_slots_than_there_are_patches(model: MergeAR, cache: Any) -> None:
    options: dict[str, Any] = {"seeds": [1], "cache": cache}
    expected = model.generate([0], chunk=1, **options)
    tokens, stats = model.generate_with_stats([0], chunk=100_000, **options)
    assert tokens.equal(expected)
    assert stats.cache_slots <= CONFIG.prefix_length + CONFIG.num_patches


def test_words_of_no_meaning_are_refused(model: MergeAR, unchecked: None) -> None:
    with pytest.raises(ConfigError, match=r"whole number for chunk of at least 1, got 2\.5"):
        model.generate(chunk=2.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cache merge or full, got 'small'"):
        model.generate(cache="small")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a list of classes, one an image, got 'owl'"):
        model.generate("owl")
    with pytest.raises(ConfigError, match="guidance schedule of constant"):
        model.generate(guidance_schedule="linaer")  # type: ignore[arg-type]


def test_a_generator_without_names_or_classes_says_so() -> None:
    with pytest.raises(ConfigError, match="this generator knows no names"):
        randomised(replace(CONFIG, class_names=())).generate(["owl"])
    with pytest.raises(ConfigError, match="expected no classes"):
        randomised(replace(CONFIG, num_classes=0, class_names=())).generate([0])


def test_a_word_of_digits_is_a_name_before_it_is_a_number() -> None:
    """As the names of an `ImageFolder` are sorted: 10 is class 1."""
    names = replace(CONFIG, class_names=("1", "10", "2"))
    assert resolve_classes(["1", "10", "2", "0", 2], names) == [0, 1, 2, 0, 2]
    assert resolve_classes(["1", "2"], replace(CONFIG, class_names=())) == [1, 2]
    with pytest.raises(ConfigError, match=r"classes 0\.\.2, got 3"):
        resolve_classes(["3"], names)


def test_counts_outside_training_are_warned_of(model: MergeAR, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mergevq"):
        model.generate(num_images=2, num_tokens=[2, 9])
        assert not caplog.records
        model.generate(num_images=3, num_tokens=[1, 10, 12])
    assert [record.getMessage() for record in caplog.records] == [
        "num_tokens 1, 10, 12: this generator was trained on 2..9, expect worse images"
    ]


def test_compiling_without_a_compiler_is_refused_in_one_line(model: MergeAR, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingDependencyError, match=r"expected a C\+\+ .*no-such-compiler.*leave compile off"):
        model.generate([0], compile=True)


def test_damaged_weights_are_noticed_although_some_token_comes_out() -> None:
    for name in ("blocks.1.feed_forward.reduce", "heads.1"):
        model = randomised()
        with torch.no_grad():
            model.transformer.get_submodule(name).weight[0, 0] = torch.nan
        with pytest.raises(ShapeError, match="finite numbers in the logits, got NaN"):
            model.generate([0], seeds=[1])


def test_numbers_that_only_guidance_makes_infinite_are_noticed() -> None:
    model = randomised()
    with torch.no_grad():
        for parameter in model.transformer.heads.parameters():
            parameter.mul_(1e34)
    model.generate([0], seeds=[1])
    with pytest.raises(ShapeError, match="finite numbers in the logits, got NaN or infinity"):
        model.generate([0], seeds=[1], guidance=1e6)


def test_the_default_batch_fits_the_stated_memory() -> None:
    assert default_batch_size(CONFIG, 2, torch.device("cpu")) == 64
    large = GeneratorConfig(width=1024, depth=24, heads=16)
    # 258 slots of 24 blocks, keys and values of 1024 channels, twice for guidance: 97 MiB an image.
    assert default_batch_size(large, 2, torch.device("cpu")) == 10
    assert default_batch_size(large, 2, torch.device("cpu"), item_bytes=2) == 21


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_brings_back_the_model(model: MergeAR, tmp_path: Path) -> None:
    path = model.save_pretrained(tmp_path / "run", step=7)
    again = MergeAR.from_pretrained(tmp_path / "run")
    assert again.config == model.config and not again.training
    assert again.fingerprint() == model.fingerprint() == MergeAR.from_pretrained(path).fingerprint()
    assert torch.equal(full_index(again, [0, 1], seeds=[1, 2]), full_index(model, [0, 1], seeds=[1, 2]))
    header = read_header(path)
    assert (header["mergevq"], header["step"]) == ("generator/1", "7")
    with pytest.raises(OutputExistsError):
        model.save_pretrained(path)
    model.save_pretrained(path, force=True)


def test_generators_load_by_whatever_order_they_have(
    model: MergeAR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.save_pretrained(tmp_path / "small" / "merge_ar.safetensors")
    other = RandomAR(replace(CONFIG, order="random"))
    other.save_pretrained(tmp_path / "small" / "random_ar.safetensors")
    assert load_generator(path).fingerprint() == model.fingerprint()
    # By a name that comes with the package.
    monkeypatch.setattr("mergevq.model_files._SHIPPED", tmp_path)
    assert isinstance(MergeAR.from_pretrained("small"), MergeAR)
    assert load_generator("small").fingerprint() == model.fingerprint()
    for loaded in (load_generator("small_random"), RandomAR.from_pretrained("small")):
        assert loaded.fingerprint() == other.fingerprint()


def test_half_precision_halves_the_file_and_loads_as_float32(model: MergeAR, tmp_path: Path) -> None:
    whole = model.save_pretrained(tmp_path / "whole.safetensors")
    half = model.save_pretrained(tmp_path / "half.safetensors", dtype=torch.float16)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    again = MergeAR.from_pretrained(half)
    assert again.transformer.norm.weight.dtype == torch.float32
    index = torch.randint(16, (2, 12))
    assert torch.allclose(logits_of(again, index), logits_of(model, index), atol=0.05)
    assert torch.equal(again.transformer.rotation, model.transformer.rotation)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = randomised()
    with torch.no_grad():
        model.transformer.norm.weight[0] = torch.inf
    with pytest.raises(ShapeError, match=r"NaN or infinity in transformer\.norm\.weight: nothing was saved"):
        model.save_pretrained(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused_in_one_line(model: MergeAR, tmp_path: Path) -> None:
    path = model.save_pretrained(tmp_path / "model.safetensors")
    tensors, header = load_file(path), read_header(path)
    broken = tmp_path / "broken.safetensors"

    def message(change: dict[str, str]) -> str:
        save_tensors(broken, tensors, {**header, **change})
        with pytest.raises(CheckpointError) as caught:
            MergeAR.from_pretrained(broken)
        return str(caught.value)

    assert "expected a generator file, got a tokenizer file" in message({"mergevq": "tokenizer/1"})
    assert "expected a generator configuration in the header" in message({"config": "[]"})
    assert "load it with RandomAR" in message({"config": header["config"].replace('"raster"', '"random"')})
    del tensors["transformer.norm.weight"]
    assert "1 missing (transformer.norm.weight)" in message({})
    save_file(tensors, broken)
    with pytest.raises(CheckpointError, match="expected a mergevq generator file, got a file of another origin"):
        MergeAR.from_pretrained(broken)
    with pytest.raises(ConfigError, match="expected order raster, got random: build RandomAR of it"):
        MergeAR(replace(CONFIG, order="random"))
    assert mergevq.MergeAR is MergeAR


@pytest.mark.parametrize(
    ("grid", "num_bits", "tokenizer", "message"),
    [
        ((4, 4), 4, None, "grid 3x4 and 4 bits for this generator, got grid 4x4 and 4 bits"),
        (None, 12, None, "got 12 bits"),
        ((3, 4), 4, "cd" * 32, "expected tokenizer abababababab for this generator, got cdcdcdcdcdcd"),
    ],
)
def test_a_tokenizer_that_does_not_belong_is_refused(
    model: MergeAR, grid: Any, num_bits: int, tokenizer: str | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        model.check_tokens_of(grid=grid, num_bits=num_bits, tokenizer=tokenizer)


def test_a_tokenizer_that_belongs_is_accepted(model: MergeAR) -> None:
    model.check_tokens_of(grid=(3, 4), num_bits=4, tokenizer="ab" * 32)
    model.check_tokens_of(grid=None, num_bits=4, tokenizer=None)
    check_pair(replace(CONFIG, tokenizer=None), grid=(3, 4), num_bits=4, tokenizer="cd" * 32)
