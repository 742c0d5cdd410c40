"""The report on generated images against what the images say, computed here by hand."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from mergevq.data.folder import ImageFolder
from mergevq.data.images import read_images, write_images
from mergevq.errors import CheckpointError, ConfigError, DataError, ShapeError
from mergevq.evaluation.generation import evaluate_generation
from mergevq.evaluation.generation_result import GenerationReport, GenerationRow, ReferenceRow
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import GenerationStats
from mergevq.generator.random_order import RandomAR
from mergevq.generator.raster import MergeAR
from mergevq.metrics.distribution import frechet_distance, kernel_distance
from mergevq.metrics.features import FeatureNetwork
from mergevq.metrics.image import to_uint8
from mergevq.sampling import SamplingOptions, image_seeds
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import MergedTokens


class Corners(nn.Module):
    """Features of an image: the mean colour of each quarter."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def network() -> FeatureNetwork:
    torch.manual_seed(5)
    classifier = nn.Linear(12, 4)
    nn.init.normal_(classifier.weight, std=5.0)
    return FeatureNetwork(Corners(), "corners", classifier=classifier)


def smooth(count: int, seed: int) -> Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return nn.functional.interpolate(coarse, 32, mode="bicubic").clamp(-1, 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Nine training and seven held-out images of 32 x 32 pixels in two classes."""
    for part, count, seed in (("train", 9, 3), ("val", 7, 4)):
        names = [f"{'cat' if i % 3 else 'dog'}/{i}.png" for i in range(count)]
        write_images(tmp_path / "images" / part, smooth(count, seed), names)
    return tmp_path / "images"


class Noise:
    """Draws every index from the image's own seed, over fewer values the stronger the guidance."""

    def __init__(self, tok: MergeVQ, **changes: object) -> None:
        fields = {"grid": (8, 8), "num_bits": 6, "groups": (3, 3), "num_classes": 2, "num_tokens": 20, "width": 16}
        fields |= {"heads": 1, "tokenizer": tok.fingerprint()}
        self.config = GeneratorConfig(**{**fields, **changes})
        self.calls: list[dict] = []

    def fingerprint(self) -> str:
        return "noise"

    def full_index(self, seed: int, guidance: float) -> Tensor:
        return torch.randint(int(64 / guidance), (64,), generator=torch.Generator().manual_seed(seed))

    def generate_with_stats(self, classes=None, **options):
        self.calls.append({"classes": classes, **options})
        index = torch.stack([self.full_index(seed, options["guidance"]) for seed in options["seeds"]])
        tokens = MergedTokens.from_full_index(index, (8, 8), 6, self.config.tokenizer)
        return tokens, GenerationStats(len(index), 1.0, 64, cache_bytes=100 * len(index) + 7, cache_slots=9)


def pixels_of(tok: MergeVQ, generator: Noise, report: GenerationReport, guidance: float) -> Tensor:
    seeds = image_seeds(torch.Generator().manual_seed(report.protocol["seed"]), report.protocol["images"])
    index = torch.stack([generator.full_index(seed, guidance) for seed in seeds])
    return to_uint8(tok.decode(MergedTokens.from_full_index(index, (8, 8), 6)))


def test_the_numbers_are_those_of_the_images(tiny_tokenizer: MergeVQ, data: Path, network: FeatureNetwork) -> None:
    generator, seen = Noise(tiny_tokenizer), []
    report = evaluate_generation(
        generator,
        tiny_tokenizer,
        data,
        num_images=11,
        guidance=(1, 2.5),
        network=network,
        batch_size=4,
        seed=3,
        shown=5,
        on_images=seen.append,
    )
    held_out, training = read_images(data / "val", 32), read_images(data / "train", 32)
    real, known = network(to_uint8(held_out)), network(to_uint8(training))
    apart = cdist(known, known)
    np.fill_diagonal(apart, np.inf)
    threshold = np.sort(apart.min(1))[0]  # The quantile 0.05 of nine.
    assert report.protocol["neighbours"]["close_distance"] == pytest.approx(threshold, rel=1e-6)
    for row, guidance in zip(report.rows, (1.0, 2.5), strict=True):
        assert (row.setting.guidance, row.setting.num_tokens, row.setting.cache) == (guidance, 20, "merge")
        pixels = pixels_of(tiny_tokenizer, generator, report, guidance)
        made = network(pixels)
        assert row.frechet == pytest.approx(frechet_distance(real, made), rel=1e-5)
        assert row.kernel == pytest.approx(kernel_distance(real, made), rel=1e-4)
        p = network.logits(made).double().softmax(1)
        score = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
        assert row.inception_score == pytest.approx(score, rel=1e-5)
        close = (cdist(made, known).min(1) <= threshold).mean()
        assert row.close_to_training == pytest.approx(close)
        distinct = [
            len(set(generator.full_index(seed, guidance).tolist()))
            for seed in image_seeds(torch.Generator().manual_seed(3), 11)
        ]
        assert row.distinct_tokens.mean == pytest.approx(np.mean(distinct))
        assert row.distinct_tokens.std == pytest.approx(np.std(distinct))
        assert row.duplicate_rate == pytest.approx(1 - np.mean(distinct) / 64)
        # Batches of 4, 4 and 3: the largest has most bytes, the smallest most an image.
        assert (row.cache_bytes, row.cache_bytes_per_image) == (407, pytest.approx(307 / 3))
        assert row.generate_per_second > 0 and row.decode_per_second > 0 and row.seconds > 0
        samples = report.samples[report.rows.index(row)]
        assert [sample.number for sample in samples] == list(range(5))
        for i, sample in enumerate(samples):
            assert torch.equal(to_uint8(sample.image[None])[0], pixels[i])
            features = cdist(made[i : i + 1], known)[0]
            names = [
                f"train/{name}" for name in sorted(str(f.relative_to(data / "train")) for f in data.rglob("train/*/*"))
            ]
            assert sample.by_features is not None and sample.by_pixels is not None
            assert sample.by_features.name == names[features.argmin()]
            assert sample.by_features.distance == pytest.approx(features.min(), rel=1e-5)
            rms = (pixels[i].double() - to_uint8(training).double()).square().mean((1, 2, 3)).sqrt()
            assert sample.by_pixels.name == names[int(rms.argmin())]
            assert sample.by_pixels.distance == pytest.approx(rms.min().item(), rel=1e-9)
            assert torch.equal(sample.by_pixels.image, training[int(rms.argmin())])
    assert sum(seen) == 7 + 9 + 2 * 11
    # The same classes and seeds in both settings, in batches of at most four.
    ours, theirs = generator.calls[:3], generator.calls[3:]
    assert [call["seeds"] for call in ours] == [call["seeds"] for call in theirs]
    assert [call["classes"] for call in ours] == [call["classes"] for call in theirs]
    assert [len(call["seeds"]) for call in ours] == [4, 4, 3]
    assert all(call["cache"] == "merge" and "steps" not in call for call in generator.calls)


def test_precision_recall_and_the_reference_row(
    tiny_tokenizer: MergeVQ, data: Path, network: FeatureNetwork, tmp_path: Path
) -> None:
    write_images(tmp_path / "many", smooth(14, 8))
    generator = Noise(tiny_tokenizer, num_classes=0)
    options = {"num_images": 6, "network": network, "neighbours": data, "shown": 0}
    report = evaluate_generation(generator, tiny_tokenizer, tmp_path / "many", **options)
    row, reference = report.rows[0], report.reference
    real = network(to_uint8(read_images(tmp_path / "many", 32))).double()
    made = network(pixels_of(tiny_tokenizer, generator, report, 1.0)).double()

    def radii(x: Tensor) -> np.ndarray:
        return np.sort(cdist(x, x), axis=1)[:, 3]  # The first is the image itself.

    between = cdist(real, made)
    assert row.precision == (between <= radii(real)[:, None]).any(0).mean()
    assert row.recall == (between <= radii(made)[None]).any(1).mean()
    # Two halves of six, as many as were generated, and not of seven.
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    a, b = real[order[:6]], real[order[6:12]]
    assert reference.images == 6
    assert reference.frechet == pytest.approx(frechet_distance(a, b), rel=1e-6)
    assert reference.kernel == pytest.approx(kernel_distance(a, b), rel=1e-6)
    known = network(to_uint8(read_images(data / "train", 32)))
    threshold = report.protocol["neighbours"]["close_distance"]
    assert reference.close_to_training == pytest.approx((cdist(real, known).min(1) <= threshold).mean())
    tokens = tiny_tokenizer.encode(read_images(tmp_path / "many", 32), 20)
    distinct = [len(set(index.tolist())) for index in tokens.index]
    assert reference.distinct_tokens[20].mean == pytest.approx(np.mean(distinct))
    other = evaluate_generation(generator, tiny_tokenizer, tmp_path / "many", **options, seed=1)
    assert other.reference.frechet != reference.frechet and other.rows[0].frechet != row.frechet
    again = evaluate_generation(generator, tiny_tokenizer, tmp_path / "many", **options)
    assert again.reference == reference and again.rows[0].kernel == row.kernel


@pytest.mark.parametrize(
    ("limit", "neighbour_limit", "same", "looked_at"),
    [(None, None, True, 9), (3, None, False, 9), (3, 3, True, 3), (None, 3, False, 3), (99, None, True, 9)],
)
def test_close_images_are_looked_for_among_as_many_as_asked(
    tiny_tokenizer: MergeVQ, data: Path, limit: int | None, neighbour_limit: int | None, same: bool, looked_at: int
) -> None:
    """Although reference and training images are one source."""
    images = ImageFolder(data).part("train")
    options: dict[str, Any] = {"limit": limit, "neighbour_limit": neighbour_limit}
    report = evaluate_generation(
        Noise(tiny_tokenizer), tiny_tokenizer, images, neighbours=images, num_images=2, network=None, **options
    )
    found = report.protocol["neighbours"]
    assert (found["are_the_reference"], found["images"]) == (same, looked_at)


def test_copies_of_training_images_are_found(
    tiny_tokenizer: MergeVQ, data: Path, network: FeatureNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = read_images(data / "train", 32)
    batches = iter(training.split(3))
    monkeypatch.setattr(tiny_tokenizer, "decode", lambda tokens: next(batches))
    # The reference is the training images themselves here, in both ways of saying so.
    images = ImageFolder(data).part("train")
    report = evaluate_generation(
        Noise(tiny_tokenizer), tiny_tokenizer, images, num_images=9, batch_size=3, network=network
    )
    row = report.rows[0]
    assert row.close_to_training == 1 and row.precision == 1 and row.recall == 1
    assert row.frechet == pytest.approx(0, abs=1e-9)
    assert report.protocol["neighbours"]["are_the_reference"] and report.reference.close_to_training is None
    for i, sample in enumerate(report.samples[0]):
        for near in (sample.by_features, sample.by_pixels):
            assert near is not None and near.distance == pytest.approx(0, abs=1e-6)
            assert near.name == images.name(i) and torch.equal(near.image, training[i])


def test_the_best_scale_is_named_and_an_end_of_the_sweep_told(
    tiny_tokenizer: MergeVQ, data: Path, network: FeatureNetwork
) -> None:
    report = evaluate_generation(
        Noise(tiny_tokenizer), tiny_tokenizer, data, num_images=8, guidance=(1, 2, 4, 16), network=network, shown=0
    )
    distances = [row.frechet for row in report.rows]
    assert report.best == distances.index(min(distances))
    scale = report.rows[report.best].setting.guidance
    note = next(note for note in report.notes if note.startswith("Least Fréchet distance"))
    assert f"guidance {scale:g}" in note and ("end of the sweep" in note) == (scale in (1, 16))
    assert report.heads() == ["guidance 1", "guidance 2", "guidance 4", "guidance 16"]
    assert report.samples == ((), (), (), ())


def test_every_combination_of_settings_is_a_row(tiny_tokenizer: MergeVQ, data: Path) -> None:
    generator = Noise(tiny_tokenizer)
    report = evaluate_generation(
        generator,
        tiny_tokenizer,
        data,
        num_images=4,
        guidance=(1, 2),
        num_tokens=(30, 10),
        cache=("merge", "full"),
        network=None,
    )
    assert len(report.rows) == 8 and len({row.setting for row in report.rows}) == 8
    assert report.heads()[1] == "guidance 2, K = 30, merge cache"
    assert [call["cache"] for call in generator.calls[:4]] == ["merge", "merge", "full", "full"]
    assert sorted(report.reference.distinct_tokens) == [10, 30]
    row = report.rows[0]
    unmeasured = (row.frechet, row.kernel, row.inception_score, row.precision, row.recall, row.close_to_training)
    assert set(unmeasured) == {None} and report.best is None
    # Without features there are neighbours in pixels still.
    assert report.samples[0][0].by_features is None and report.samples[0][0].by_pixels is not None
    heads, lines = report.cells()
    assert "FD-none" not in [line[0] for line in lines] and heads[-1] == "reference"


def test_classes_are_balanced_or_those_of_the_reference_or_given(tiny_tokenizer: MergeVQ, data: Path) -> None:
    options = {"num_images": 7, "network": None, "neighbour_limit": 0}

    def drawn(classes: object, **changes: object) -> list:
        generator = Noise(tiny_tokenizer, **changes)
        report = evaluate_generation(generator, tiny_tokenizer, data, **options, classes=classes)
        given = [call["classes"] for call in generator.calls]
        return given if None in given else [*(label for some in given for label in some), report.protocol["classes"]]

    balanced = drawn("balanced", num_classes=5, class_names=tuple("abcde"))
    assert sorted(balanced[:5]) == [0, 1, 2, 3, 4] and balanced[5:7] == balanced[:2]
    # Of seven held-out images three are dogs: 0, 3 and 6. Classes are sorted: cat, dog.
    assert sorted(drawn("reference", class_names=("cat", "dog"))[:7]) == [0, 0, 0, 0, 1, 1, 1]
    assert drawn(["b", 0], class_names=("a", "b")) == [1, 0, 1, 0, 1, 0, 1, "in turn: b, 0"]
    assert drawn(None) == [None] and drawn("balanced", num_classes=0) == [None]
    with pytest.raises(ConfigError, match="5 classes to take them from it, got 2"):
        drawn("reference", num_classes=5)
    with pytest.raises(ConfigError, match="use classes balanced"):
        drawn("reference", class_names=("dog", "cat"))


def test_json_holds_everything_but_pictures(tiny_tokenizer: MergeVQ, data: Path, network: FeatureNetwork) -> None:
    report = evaluate_generation(
        Noise(tiny_tokenizer), tiny_tokenizer, data, num_images=5, guidance=(1.0, 2.0), network=network, shown=2
    )
    value = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value["schema"] == "mergevq.generation/1" and value["best"] == report.best
    assert tuple(GenerationRow.from_json(row) for row in value["rows"]) == report.rows
    assert ReferenceRow.from_json(value["reference"]) == report.reference
    sample = value["samples"][0][1]
    assert sample["seed"] == report.samples[0][1].seed and "image" not in sample
    assert sample["by_pixels"].keys() == {"name", "distance"}
    protocol = value["protocol"]
    assert (protocol["images"], protocol["reference"]["images"], protocol["neighbours"]["images"]) == (5, 7, 9)
    assert protocol["network"] == {
        "name": "corners",
        "sha256": network.checksum,
        "classifier_sha256": network.classifier_checksum,
    }
    assert (protocol["tokenizer"], protocol["generator"]["fingerprint"]) == (tiny_tokenizer.fingerprint(), "noise")
    assert report.distance_names() == ("FD-corners", "KD-corners")
    told = replace(report, protocol={**report.protocol, "network": {"name": "inception"}})
    assert told.distance_names() == ("gFID", "gKID")


def test_too_few_images_are_told(tiny_tokenizer: MergeVQ, data: Path) -> None:
    report = evaluate_generation(Noise(tiny_tokenizer), tiny_tokenizer, data, num_images=1, network=Corners(), limit=3)
    row = report.rows[0]
    assert (row.frechet, row.precision, row.inception_score) == (None, None, None)
    text = "\n".join(report.notes)
    assert "at least 2 images on either side, got 1 and 3" in text and "Corners has no classifier" in text
    assert "at least 4 images on either side" in text


def test_unreadable_images_are_counted(tiny_tokenizer: MergeVQ, data: Path) -> None:
    (data / "val" / "cat" / "1.png").write_bytes(b"not an image")
    report = evaluate_generation(Noise(tiny_tokenizer), tiny_tokenizer, data, num_images=2, network=None)
    facts = report.protocol["reference"]
    assert (facts["images"], facts["images_unreadable"]) == (6, 1)
    assert any(note.startswith("1 reference images could not be read") for note in report.notes)


@pytest.fixture
def tiny_generator() -> dict:
    fields = {"grid": (8, 8), "num_bits": 6, "groups": (3, 3), "num_classes": 2, "num_tokens": 20, "width": 16}
    return {**fields, "depth": 1, "group_depth": 1, "heads": 1, "ffn_multiple": 16}


def test_merge_ar_is_measured_alike_with_either_cache(
    tiny_tokenizer: MergeVQ, tiny_generator: dict, data: Path, network: FeatureNetwork
) -> None:
    torch.manual_seed(0)
    generator = MergeAR(GeneratorConfig(**tiny_generator)).train()
    tiny_tokenizer.train()
    sampling = SamplingOptions(temperature=0.7, top_p=(0.9, 1.0), schedule="linear")
    report = evaluate_generation(
        generator,
        tiny_tokenizer,
        data,
        num_images=4,
        guidance=2,
        cache=("merge", "full"),
        sampling=sampling,
        network=network,
    )
    merge, full = report.rows
    assert merge.frechet == full.frechet and merge.distinct_tokens == full.distinct_tokens
    assert merge.cache_bytes > 0 and full.cache_bytes > 0
    assert report.protocol["sampling"]["top_p"] == (0.9, 1.0)
    assert generator.training and tiny_tokenizer.training
    sample = report.samples[0][2]
    tokens = generator.generate(
        [sample.label], guidance=2.0, seeds=[sample.seed], temperature=0.7, top_p=(0.9, 1.0), guidance_schedule="linear"
    )
    tiny_tokenizer.eval()
    assert torch.equal(to_uint8(tiny_tokenizer.decode(tokens)), to_uint8(sample.image[None]))


def test_a_warning_is_not_repeated_for_every_batch(
    tiny_tokenizer: MergeVQ, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = Noise(tiny_tokenizer)
    quiet = generator.generate_with_stats

    def warn(classes, **options):
        logging.getLogger("mergevq").warning("num_tokens %d is unusual", options["num_tokens"])
        return quiet(classes, **options)

    generator.generate_with_stats = warn
    for _ in range(2):
        caplog.clear()
        options = {"num_images": 4, "batch_size": 1, "num_tokens": (3, 5), "network": None}
        evaluate_generation(generator, tiny_tokenizer, data, **options)
        assert [record.getMessage() for record in caplog.records] == [f"num_tokens {k} is unusual" for k in (3, 5)]


def test_random_ar_takes_steps_and_needs_recovery(tiny_tokenizer: MergeVQ, tiny_generator: dict, data: Path) -> None:
    torch.manual_seed(0)
    generator = RandomAR(GeneratorConfig(**tiny_generator, order="random"))
    options = {"num_images": 3, "network": Corners(), "guidance": 1.5}
    report = evaluate_generation(generator, tiny_tokenizer, data, steps=(4, 20), **options)
    assert [row.setting.steps for row in report.rows] == [4, 20] and report.heads()[0] == "guidance 1.5, 4 steps"
    for row in report.rows:
        assert row.duplicate_rate == pytest.approx(1 - row.distinct_tokens.mean / 20)
    assert evaluate_generation(generator, tiny_tokenizer, data, **options).rows[0].setting.steps == 20
    with pytest.raises(ConfigError, match=r"steps in 1\.\.20"):
        evaluate_generation(generator, tiny_tokenizer, data, steps=21, **options)
    tiny_tokenizer.recovery = None
    with pytest.raises(CheckpointError, match="recovery model"):
        evaluate_generation(generator, tiny_tokenizer, data, **options)


@pytest.mark.parametrize("kind", [MergeAR, RandomAR])
def test_compile_is_passed_on_to_either_order(
    kind: type, tiny_tokenizer: MergeVQ, tiny_generator: dict, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    generator = kind(GeneratorConfig(**tiny_generator, order=kind.order))
    for compile in (False, True):
        evaluate_generation(generator, tiny_tokenizer, data, num_images=2, network=None, compile=compile)
        assert len(compiled) == compile


def test_bad_input_is_refused_before_anything_runs(tiny_tokenizer: MergeVQ, data: Path) -> None:
    generator = Noise(tiny_tokenizer, class_names=("cat", "dog"))
    generator.generate_with_stats = lambda *_, **__: pytest.fail("it ran")

    def refused(
        error: type[Exception], words: str, model: object = generator, where: object = data, **changes: object
    ) -> None:
        options = {"num_images": 4, "network": Corners(), **changes}
        with pytest.raises(error, match=words):
            evaluate_generation(model, tiny_tokenizer, where, **options)

    refused(CheckpointError, "grid 4x4 and 6 bits", Noise(tiny_tokenizer, grid=(4, 4), num_tokens=5))
    refused(CheckpointError, "and 7 bits", Noise(tiny_tokenizer, num_bits=7, groups=(7,)))
    refused(CheckpointError, "expected tokenizer ffff", Noise(tiny_tokenizer, tokenizer=64 * "f"))
    refused(ConfigError, "num_images and batch_size of at least 1, got 0", num_images=0)
    refused(ConfigError, "num_images and batch_size of at least 1, got 4 and 0", batch_size=0)
    refused(ConfigError, "limit of at least 1 and .* got 0 and None", limit=0)
    refused(ConfigError, "got -3 and 0", limit=-3, neighbour_limit=0)
    refused(ConfigError, "got None and -1", neighbour_limit=-1)
    refused(ConfigError, "a seed of at most 64 bits", seed=2**64)
    refused(ConfigError, "guidance of at least 0", guidance=(1, -2))
    refused(ConfigError, "none twice", guidance=(1, 1.0))
    refused(ConfigError, "at least one setting", guidance=())
    refused(ConfigError, r"num_tokens in 1\.\.64, got 65", num_tokens=65)
    refused(ConfigError, "cache merge or full, got 'ful'", cache="ful")
    refused(ConfigError, "random order only", steps=4)
    refused(ConfigError, "top_p above 0", sampling=SamplingOptions(top_p=0.0))
    refused(ConfigError, "guidance 1 without classes", classes=None, guidance=(1, 2))
    refused(ConfigError, "cat", classes=["cta"])
    refused(ConfigError, "classes balanced, reference", classes="even")
    refused(ConfigError, "at least one class", classes=[])
    refused(ConfigError, r"0\.\.256 shown images", shown=257)
    refused(ConfigError, "lite9", network="lite9")
    refused(DataError, "nothing there", where=data / "nowhere")
    refused(DataError, "nothing there", neighbours=data / "nowhere")


def test_a_nan_raises(tiny_tokenizer: MergeVQ, data: Path) -> None:
    with torch.no_grad():
        next(tiny_tokenizer.decoder.parameters()).fill_(math.nan)
    with pytest.raises(ShapeError, match="finite"):
        evaluate_generation(Noise(tiny_tokenizer), tiny_tokenizer, data, num_images=2, network=None)
