"""An evaluation of everything is its parts, made once, and goes on where it was interrupted."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergevq.evaluation.overall as overall
from mergevq.data.folder import ImageFolder
from mergevq.data.images import write_images
from mergevq.errors import CheckpointError, ConfigError, DataError, OutputExistsError, ShapeError
from mergevq.evaluation.generation import evaluate_generation
from mergevq.evaluation.overall import evaluate_all
from mergevq.evaluation.overall_result import EvaluationReport
from mergevq.evaluation.reconstruction import evaluate_reconstruction
from mergevq.evaluation.representation import evaluate_representation
from mergevq.evaluation.sanity import evaluate_sanity
from mergevq.generator.config import GeneratorConfig
from mergevq.generator.generate import GenerationStats
from mergevq.metrics.probe_config import LinearConfig, ProbeConfig
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import MergedTokens

PROBES = ProbeConfig(ks=(1, 3), linear=LinearConfig(epochs=3, learning_rates=(0.01, 0.1)), shots=(1,), draws=2, seed=4)
TIMES = {"encode_per_second", "decode_per_second", "generate_per_second", "seconds"}


class Corners(nn.Module):
    """Features of an image: the mean colour of each quarter."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four test images of each of two classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = torch.Generator().manual_seed(2)
    for part, count in (("train", 8), ("val", 4)):
        images = (torch.randn(2 * count, 3, 34, 34, generator=rng) * 0.5).clamp(-1, 1)
        images[:count, 0] += 0.5
        names = [f"{part}/{'ant' if i < count else 'bee'}/{i:02d}.png" for i in range(2 * count)]
        write_images(root, images.clamp(-1, 1), names)
    return root


class Noise:
    """Draws every index from the image's own seed."""

    def __init__(self, tok: MergeVQ) -> None:
        fields = {"grid": (8, 8), "num_bits": 6, "groups": (3, 3), "num_classes": 2, "num_tokens": 20, "width": 16}
        self.config = GeneratorConfig(**fields, heads=1, tokenizer=tok.fingerprint())

    def fingerprint(self) -> str:
        return "noise"

    def generate_with_stats(self, classes: Any = None, **options: Any) -> tuple[MergedTokens, GenerationStats]:
        rngs = [torch.Generator().manual_seed(seed) for seed in options["seeds"]]
        index = torch.stack([torch.randint(64, (64,), generator=rng) for rng in rngs])
        tokens = MergedTokens.from_full_index(index, (8, 8), 6, self.config.tokenizer)
        return tokens, GenerationStats(len(index), 1.0, 64, cache_bytes=100, cache_slots=9)


@pytest.fixture
def generator(tiny_tokenizer: MergeVQ) -> Noise:
    return Noise(tiny_tokenizer)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of parts whose section was drawn; drawing itself is tested elsewhere."""
    names: list[str] = []

    def section(name: str, found: Any) -> str:
        names.append(name)
        return f"<p>{name}</p>"

    monkeypatch.setattr(overall, "section", section)
    return names


def run(tok: MergeVQ, generator: Noise | None, data: Any, **options: Any) -> EvaluationReport:
    fields = {"num_tokens": (64, 20), "network": Corners(), "perceptual": None, "probes": PROBES, "batch_size": 3}
    return evaluate_all(tok, generator, data, **{**fields, **options})


def timeless(value: Any) -> Any:
    """The same without what differs between two equal runs."""
    if isinstance(value, dict):
        return {name: timeless(entry) for name, entry in value.items() if name not in TIMES}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def written(report: Any) -> Any:
    return timeless(json.loads(json.dumps(report.to_json(), allow_nan=False)))


def test_the_parts_are_what_their_functions_give(photos: Path, tiny_tokenizer: MergeVQ, generator: Noise) -> None:
    tok = tiny_tokenizer
    report = run(tok, generator, photos, num_images=5, guidance=(1.0, 2.0), seed=6)
    found = written(report)
    pairs: dict[str, Any] = {"network": Corners(), "batch_size": 3, "seed": 6}
    alone = {
        "reconstruction": evaluate_reconstruction(tok, photos, (64, 20), **pairs),
        "generation": evaluate_generation(generator, tok, photos, num_images=5, guidance=(1.0, 2.0), **pairs),
        "representation": evaluate_representation(
            tok, photos, num_tokens=(64, 20), probes=PROBES, batch_size=3, seed=6
        ),
        "sanity": evaluate_sanity(photos, 32, **pairs),
    }
    for name, part in alone.items():
        assert found["parts"][name] == written(part), name
    assert found["missing"] == {} and found["schema"] == "mergevq.evaluation/2"


def test_the_table_has_the_parts_numbers(photos: Path, tiny_tokenizer: MergeVQ, generator: Noise) -> None:
    report = run(tiny_tokenizer, generator, photos, num_images=5, name="tiny")
    rows, own = report.reconstruction, report.representation
    assert rows is not None and own is not None and report.generation is not None and report.sanity is not None
    lines = {(line.part, line.quantity): line for line in report.lines()}
    psnr = lines["reconstruction", "PSNR in dB"]
    assert psnr.values == {64: rows.rows[0].psnr.mean, 20: rows.rows[1].psnr.mean}
    assert psnr.beside["blurred"] == report.sanity.rows[2].psnr and psnr.better == "higher"
    frechet = lines["reconstruction", "FD-Corners"]
    assert rows.reference is not None and frechet.beside["two halves of the originals"] == rows.reference.frechet
    assert lines["generation", "FD-Corners"].values == {20: report.generation.rows[0].frechet}
    kind = own.rows[own.chosen].setting.kind
    linear = {
        (row.setting.source, row.setting.num_tokens): 100 * row.linear.score.top1
        for row in own.rows
        if row.linear is not None and row.setting.kind in (kind, None)
    }
    shown = lines["representation", "linear probe, top-1 in %"]
    assert shown.values == {k: linear["tokenizer", k] for k in (64, 20)}
    assert (shown.beside["random weights"], shown.beside["pixels"]) == (linear["random", 64], linear["pixels", None])
    heads, cells = report.cells()
    assert heads == ["", "K = 64", "K = 20", "to compare with"]
    assert next(line[0] for line in cells if not any(line[1:])) == "Reconstruction of 8 images"
    card = report.card()
    assert all(f"| {' | '.join(line)} |" in card for line in cells if any(line[1:])) and report.command in card
    assert f"K = 20 an image takes {rows.rows[1].bits:,.0f} bits" in card and "tiny (" in str(report)
    for word in ("bicubic", "rounded to bytes", "float32", "seed: 0", rows.protocol["network"]["sha256"]):
        assert word in card, word


def test_every_result_says_how_it_was_measured(photos: Path, tiny_tokenizer: MergeVQ, generator: Noise) -> None:
    found = written(run(tiny_tokenizer, generator, photos, num_images=5, num_tokens=20))
    everywhere = {"image_size", "preparation", "rounding", "precision", "seed", "batch_size", "hardware", "versions"}
    for name, value in {"all": found, **found["parts"]}.items():
        protocol = value["protocol"]
        assert everywhere <= set(protocol), name
        assert "bicubic, antialiased" in protocol["preparation"] and "bytes" in protocol["rounding"], name
        text = json.dumps(protocol)
        # Which images and how many, and the networks with their checksums.
        assert text.count('"fingerprint"') + text.count('"sha256"') >= 2 and '"images' in text, name
    assert found["parts"]["reconstruction"]["protocol"]["reference_set"].startswith("the originals")


def test_images_that_a_model_may_know_are_told_of(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    def facts(data: Any, **options: Any) -> tuple[list[Any], bool]:
        report = run(tiny_tokenizer, None, data, num_tokens=20, network=None, parts=("reconstruction",), **options)
        assert report.reconstruction is not None
        assert report.protocol["images"] == report.reconstruction.protocol["images"]
        names = ("images", "images_available", "held_out_part", "shared_images")
        return [report.protocol[name] for name in names], any("no held-out part" in note for note in report.notes())

    assert facts(photos, limit=3) == ([3, 8, "val", 0], False)
    assert facts(photos / "train", limit=5) == ([5, 16, None, 5], True)
    assert facts(photos / "val") == ([8, 8, "val", 8], False)
    images = ImageFolder(photos)
    assert facts(images) == ([24, 24, None, 24], True)
    assert facts(images.part("val"), train=images.part("train")) == ([8, 8, "val", 0], False)
    assert facts(images.part("train"), train=photos / "val") == ([16, 16, None, 0], False)


def test_images_that_cannot_be_read_are_not_counted_as_looked_at(
    photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path
) -> None:
    broken = tmp_path / "photos"
    shutil.copytree(photos / "val", broken)
    for path in (*sorted(broken.glob("ant/*"))[:1], *sorted(broken.glob("bee/*"))[-1:]):
        path.write_bytes(b"no image")

    def facts(data: Path, *parts: str, **options: Any) -> list[Any]:
        report = run(tiny_tokenizer, None, data, num_tokens=20, network=None, parts=parts, **options)
        part = report.parts[parts[0]].result["protocol"]
        found = [report.protocol[name] for name in ("images", "images_unreadable", "shared_images")]
        assert found[:2] == [part["images"], part["images_unreadable"]]
        return [*found, *(note for note in report.notes() if "no held-out part" in note)]

    (*found, note) = facts(broken, "reconstruction")
    assert found == [6, 2, 6] and "they know 6 of the 6 images" in note
    assert facts(broken, "reconstruction", train=photos / "train") == [6, 2, 0]
    assert facts(broken, "sanity", limit=4)[:3] == [3, 1, 3]
    assert facts(photos, "reconstruction") == [8, 0, 0]


class Stopped(Exception):
    pass


def test_an_interrupted_evaluation_goes_on(
    photos: Path,
    tiny_tokenizer: MergeVQ,
    generator: Noise,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn: list[str],
) -> None:
    options: dict[str, Any] = {"num_images": 4, "num_tokens": 20, "out": tmp_path / "out"}

    def stop(*arguments: Any, **more: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("mergevq.evaluation.representation.probe_row", stop)
        with pytest.raises(Stopped):
            run(tiny_tokenizer, generator, photos, **options)
    assert drawn == ["reconstruction", "generation"]
    with monkeypatch.context() as patch:  # These parts and all features are there.
        patch.setattr(overall, "evaluate_reconstruction", stop)
        patch.setattr(overall, "evaluate_generation", stop)
        patch.setattr(MergeVQ, "embed", stop)
        report = run(tiny_tokenizer, generator, photos, **options)
    assert drawn == ["reconstruction", "generation", "representation", "sanity"]
    assert [part.section() for part in report.parts.values()] == [f"<p>{name}</p>" for name in drawn]
    alone = run(tiny_tokenizer, generator, photos, num_images=4, num_tokens=20)
    assert written(report) == written(alone)
    # All is there: even the times are the same.
    assert run(tiny_tokenizer, generator, photos, **options).to_json() == report.to_json() and len(drawn) == 4
    # However the folder is written: its images decide.
    same = run(tiny_tokenizer, generator, f"{photos}/../{photos.name}/", **options)
    assert len(drawn) == 4 and same.to_json()["parts"] == report.to_json()["parts"]
    # Without a generator the other parts are the same ones.
    fewer = run(tiny_tokenizer, None, photos, **options)
    assert fewer.missing == {"generation": "no generator was given"} and len(drawn) == 4


def test_forced_features_lie_beside_files_of_others(photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "features" / "mine.npy"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    run(tiny_tokenizer, None, photos, out=tmp_path / "out", parts=("representation",), force=True)
    assert mine.read_text() == "mine" and len(list(mine.parent.glob("*.safetensors"))) >= 2


def test_what_a_folder_holds_is_not_mixed_with_other_results(
    photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path, drawn: list[str]
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"out": out, "parts": ("reconstruction",)}
    before = run(tiny_tokenizer, None, photos, **options).to_json()
    for change, hint in (
        ({"num_tokens": 20}, r"another num tokens, \[64, 20\] instead of \[20\]"),
        ({"seed": 1}, "another seed, 0 instead of 1"),
        ({"limit": 3}, "another limit, none instead of 3"),
        ({"network": None}, "another feature network"),
    ):
        with pytest.raises(OutputExistsError, match=hint):
            run(tiny_tokenizer, None, photos, **{**options, **change})
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="out exists already"):
        run(tiny_tokenizer, None, photos, **options)
    (out / "features").mkdir()
    foreign = [out / "features" / "mine.npy", out / "parts" / "mine.step"]
    for path in foreign:
        path.write_text("mine")
    forced = run(tiny_tokenizer, None, photos, **options, force=True)
    assert len(drawn) == 2 and timeless(forced.to_json()) == timeless(before)
    assert all(path.read_text() == "mine" for path in foreign), "what is not an evaluation's stays"
    (out / "mine.txt").unlink()
    with torch.no_grad():
        next(tiny_tokenizer.decoder.parameters()).mul_(2)
    with pytest.raises(OutputExistsError, match="another tokenizer"):
        run(tiny_tokenizer, None, photos, **options)
    record = out / "parts" / "reconstruction.json"
    record.write_text(record.read_text().replace("evaluation-part/2", "evaluation-part/3"))
    with pytest.raises(CheckpointError, match="upgrade mergevq"):
        run(tiny_tokenizer, None, photos, **options)


def test_what_is_not_possible_is_left_out_and_told(
    photos: Path, tiny_tokenizer: MergeVQ, generator: Noise, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))[:6]):
        shutil.copy(path, flat / f"{number}.png")
    report = run(tiny_tokenizer, None, flat)
    assert list(report.parts) == ["reconstruction", "sanity"]
    assert "images without classes" in report.missing["representation"]
    notes = " ".join(report.notes())
    assert "Generation was left out: no generator was given." in notes and "Representation was left out: exp" in notes
    assert "left out" in report.card() and report.to_json()["missing"] == report.missing
    with pytest.raises(DataError, match="images without classes"):
        run(tiny_tokenizer, None, flat, parts=("representation",))
    with pytest.raises(ConfigError, match="a generator for the part generation"):
        run(tiny_tokenizer, None, photos, parts=("generation",))
    with pytest.raises(ConfigError, match="got 'speed'"):
        run(tiny_tokenizer, None, photos, parts=("speed",))
    few = run(tiny_tokenizer, None, photos, parts=("sanity",))
    assert few.missing["reconstruction"] == "it was not asked for" and few.cells()[1] == []
    with pytest.raises(ConfigError, match="at least 1 image, got 0"):
        run(tiny_tokenizer, None, photos, limit=0)
    # One image of each class: none can be held out to choose on.
    single = run(tiny_tokenizer, None, photos, train_limit=2, probes=replace(PROBES, ks=(1,)), network=None)
    assert "1 of each" in single.missing["representation"]


def test_usual_counts_and_data_sets(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    images = ImageFolder(photos)
    data, train = images.part("val"), images.part("train")
    report = run(tiny_tokenizer, None, data, train=train, num_tokens=(), network=None)
    # L, the tokenizer's own, a quarter of L.
    assert report.protocol["num_tokens"] == [64, 20, 16]
    own = report.parts["representation"].result["protocol"]
    assert (own["train"]["images"], own["test"]["images"]) == (16, 8)
    # One set of images, of which a part is tested on; here the draw leaves a class out.
    divided = run(tiny_tokenizer, None, train, num_tokens=20, network=None)
    assert "got none of ant" in divided.missing["representation"]
    with pytest.raises(ShapeError, match="65"):
        run(tiny_tokenizer, None, data, num_tokens=65)


def test_progress_is_told_of_every_image(photos: Path, tiny_tokenizer: MergeVQ, generator: Noise) -> None:
    told: dict[str, list[int]] = {}

    @contextmanager
    def progress(name: str, total: int) -> Iterator[Any]:
        told[name] = [total, 0]

        def advance(done: int) -> None:
            told[name][1] += done

        yield advance

    run(tiny_tokenizer, generator, photos, num_images=5, num_tokens=20, progress=progress)
    assert {name: total for name, (total, done) in told.items() if total != done} == {}
    assert list(told) == ["reconstruction", "generation", "representation", "sanity"]
