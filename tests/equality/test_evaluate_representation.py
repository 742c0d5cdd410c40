"""An evaluation of representation measures what its parts do on features that are computed one call at a time."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergevq.data.folder import ImageFolder
from mergevq.data.images import center_square, to_tensor, write_images
from mergevq.errors import CheckpointError, ConfigError, DataError, OutputExistsError, ShapeError
from mergevq.evaluation.representation import evaluate_representation
from mergevq.evaluation.representation_data import probe_images
from mergevq.evaluation.representation_result import RepresentationReport, RepresentationRow
from mergevq.layers.pretrained import weights_checksum
from mergevq.layers.teachers import load_teacher
from mergevq.metrics.few_shot import few_shot
from mergevq.metrics.knn import knn_classify
from mergevq.metrics.linear_probe import fit_linear_probe
from mergevq.metrics.probe import hold_out, score_answers
from mergevq.metrics.probe_config import LinearConfig, ProbeConfig
from mergevq.tokenizer.model import MergeVQ

CLASSES = ("ant", "bee", "cat")
SMALL = ProbeConfig(
    ks=(1, 3, 5), linear=LinearConfig(epochs=4, learning_rates=(0.01, 0.1)), shots=(1, 2), draws=3, seed=4
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine training and four test images of each of three classes, each of a colour of its own under much noise."""
    root = tmp_path_factory.mktemp("photos")
    rng = torch.Generator().manual_seed(2)
    for part, count in (("train", 9), ("val", 4)):
        colours = torch.eye(3).repeat_interleave(count, 0)[:, :, None, None]
        images = (colours - 0.5 + 0.9 * torch.randn(3 * count, 3, 34, 34, generator=rng)).clamp(-1, 1)
        write_images(root, images, [f"{part}/{CLASSES[i // count]}/{i:02d}.png" for i in range(3 * count)])
    return root


class Teacher(nn.Module):
    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)))
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ self.weight


def computed(root: Path, features: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Features, one image at a time, and labels of the two parts."""
    found = []
    for part in ("train", "val"):
        images = ImageFolder(root).part(part)
        with torch.no_grad():
            rows = [features(to_tensor(center_square(images.read(i).image, 32))[None]) for i in range(len(images))]
        found.append((torch.cat(rows), torch.tensor(images.labels)))
    return found


def test_every_row_is_what_its_features_give(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    tok, teacher = tiny_tokenizer, Teacher()
    report = evaluate_representation(
        tok,
        photos,
        num_tokens=(20, None),
        quantized=(False, True),
        teacher=teacher,
        pixel_side=4,
        probes=SMALL,
        shard_size=4,
        batch_size=3,
        seed=9,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        untrained = MergeVQ(tok.config).eval()

    def of(model: MergeVQ, k: int, kind: Any, quantized: bool = False) -> Callable[[Tensor], Tensor]:
        return lambda x: model.features(x, k, kind=kind, quantized=quantized)

    kinds = {"class": "class token", "mean": "mean of tokens", "class+mean": "class token + mean of tokens"}
    expected = {}
    for k in (64, 20):
        for kind, name in kinds.items():
            expected[f"{name}, K = {k}"] = of(tok, k, kind)
            if kind != "class":
                expected[f"{name.replace('tokens', 'codes')}, K = {k}"] = of(tok, k, kind, True)
    expected["teacher Teacher"] = teacher
    expected |= {f"random weights, {name}, K = 64": of(untrained, 64, kind) for kind, name in kinds.items()}
    expected["pixels, 4 x 4"] = lambda x: nn.functional.avg_pool2d(x, 8).flatten(1)
    assert [row.name for row in report.rows] == list(expected)
    assert [row.setting.merged for row in report.rows[:10]] == [False] * 5 + [True] * 5
    for row, features in zip(report.rows, expected.values(), strict=True):
        (train, labels), (test, truth) = computed(photos, features)
        compare(row, train, labels, test, truth)
    widths = {row.name: row.width for row in report.rows}
    width, bits = tok.config.encoder.width, tok.config.num_bits
    assert widths["class token + mean of codes, K = 20"] == width + bits and widths["teacher Teacher"] == 5
    assert report.classes == CLASSES and report.reference["majority_top1"] == 1 / 3
    encoders = report.protocol["encoders"]
    assert encoders["tokenizer"]["fingerprint"] == tok.fingerprint()
    assert encoders["random"]["fingerprint"] == untrained.fingerprint() and encoders["random"]["seed"] == 9
    assert encoders["teacher"]["fingerprint"] == weights_checksum(teacher)
    assert (report.protocol["train"]["images"], report.protocol["test"]["images"]) == (27, 12)


def test_pairs_are_right_on_the_images_of_the_rows(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    report = run(tiny_tokenizer, photos, probes=SMALL)
    assert [(pair.probe, pair.row, pair.other) for pair in report.pairs] == [("linear", 0, 1), ("knn", 0, 1)]
    for pair in report.pairs:
        own, other = (report.rows[i].found(pair.probe) for i in (0, 1))
        assert own is not None and other is not None
        assert pair.row_alone - pair.other_alone == round(12 * (own.score.top1 - other.score.top1))


def compare(row: RepresentationRow, train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> None:
    """The probes of a row are those of these features."""
    options: dict[str, Any] = {"num_classes": 3}
    answers = knn_classify(train, labels, test, ks=SMALL.ks, **options)
    kept, held = hold_out(labels, SMALL.held_out, SMALL.seed)
    chosen_on = knn_classify(train[kept], labels[kept], train[held], ks=SMALL.ks, **options)
    assert row.knn is not None and row.linear is not None and row.few_shot is not None
    for tried in row.knn.tried:
        assert tried.top1 == score_answers(answers[tried.k], truth, 3).top1
        assert tried.held_out_top1 == score_answers(chosen_on[tried.k], labels[held], 3).top1
    assert row.knn.score.top1 == score_answers(answers[row.knn.k], truth, 3).top1
    assert max(t.held_out_top1 or 0 for t in row.knn.tried) == {t.k: t.held_out_top1 for t in row.knn.tried}[row.knn.k]
    probe = fit_linear_probe(train, labels, config=SMALL.linear, held_out=SMALL.held_out, seed=SMALL.seed, **options)
    assert (probe.learning_rate, len(held)) == (row.linear.learning_rate, row.linear.held_out)
    score = score_answers(probe.answers(test), truth, 3)
    assert row.linear.score.top1 == score.top1 and row.linear.score.per_class == score.per_class
    assert row.linear.score.confusion == tuple(map(tuple, score.confusion.tolist()))
    wrong = {(t, a): n for t, a, n in row.linear.score.confused}
    assert wrong == {(t, a): int(score.confusion[t, a]) for t, a in wrong} and all(t != a for t, a in wrong)
    assert sum(wrong.values()) == 12 - round(12 * score.top1)
    few = few_shot(train, labels, test, truth, shots=(1, 2), draws=3, seed=SMALL.seed, **options)
    assert [found.draws for found in row.few_shot] == [found.draws for found in few]


QUICK = ProbeConfig(probes=("knn",), ks=(1, 3))
KNN = ProbeConfig(probes=("knn",), ks=(1,))


def run(tok: MergeVQ, data: Any, **options: Any) -> RepresentationReport:
    fixed = {"num_tokens": 20, "kinds": ("mean",), "baselines": ("pixels",), "pixel_side": 4, "probes": QUICK}
    return evaluate_representation(tok, data, **{**fixed, "shard_size": 4, "batch_size": 3, **options})


def without_times(report: RepresentationReport) -> str:
    value = report.to_json()
    value.pop("seconds")
    return json.dumps(value)


def test_two_runs_give_the_same_json_stored_or_not(photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path) -> None:
    options = {"probes": SMALL, "baselines": ("random",)}
    state = torch.get_rng_state()
    report = run(tiny_tokenizer, photos, **options)
    first = without_times(report)
    for _ in range(2):
        assert without_times(run(tiny_tokenizer, photos, cache=tmp_path / "f", **options)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert [RepresentationRow.from_json(row) for row in json.loads(first)["rows"]] == list(report.rows)


def test_an_interrupted_run_goes_on_with_what_is_there(
    photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = without_times(run(tiny_tokenizer, photos, cache=whole))
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_tokenizer, photos, cache=broken, on_images=stop)
    kept = sorted(path.name for path in broken.glob("train-*"))
    assert kept == ["train-00000.safetensors", "train-00001.safetensors", "train-00002.safetensors"]
    times = {name: (broken / name).stat().st_mtime_ns for name in kept}
    (broken / "train-00001.safetensors").write_bytes(b"damaged")
    left, alive = (broken / f".test-00000.{number}.tmp.safetensors" for number in ("0123abcd", "4567cdef"))
    for path in (left, alive):
        path.write_bytes(b"half")
    os.utime(left, (1, 1))
    seen: list[int] = []
    assert without_times(run(tiny_tokenizer, photos, cache=broken, on_images=seen.append)) == expected
    assert sum(seen) == 27 + 12 + 2 * 12
    # One that is an hour old is nobody's; another evaluation may be writing the other one.
    assert not left.exists() and alive.exists()
    alive.unlink()
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert (broken / kept[0]).stat().st_mtime_ns == times[kept[0]]
    # Now nothing is left to compute: other probes read what is there.
    monkeypatch.setattr(MergeVQ, "embed", None)
    other = run(tiny_tokenizer, photos, cache=broken, probes=ProbeConfig(probes=("few-shot",), shots=(2,)))
    assert other.rows[0].knn is other.rows[0].linear is None and other.rows[0].few_shot is not None
    assert other.rows[0].few_shot[0].shots == 2 and "2-shot" in str(other)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "kinds": ({"kinds": ("class",)}, r"another set of kinds, .*20\.mean.* instead of .*20\.class"),
    "K": ({"num_tokens": 10}, "another set of kinds"),
    "images": ({"train_limit": 20}, "another set of train images"),
    "pixels": ({"pixel_side": 8}, "another pixels model, area 4 instead of area 8"),
    "baselines": ({"baselines": ("random",)}, "another random model, none instead of"),
    "shards": ({"shard_size": 5}, "another shard size, 4 instead of 5"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_features_of_something_else_are_refused(
    case: str, photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path
) -> None:
    options, message = OTHERS[case]
    run(tiny_tokenizer, photos, cache=tmp_path)
    (tmp_path / "mine.txt").write_text("a file of the user's")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputExistsError, match=message):
        run(tiny_tokenizer, photos, cache=tmp_path, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    forced = run(tiny_tokenizer, photos, cache=tmp_path, force=True, **options)
    assert {path.name for path in tmp_path.iterdir()} >= {"mine.txt", "features.json"}
    if case in ("kinds", "shards"):
        assert without_times(forced) == without_times(run(tiny_tokenizer, photos, **options))


def test_features_of_another_tokenizer_or_of_nobody_are_refused(
    photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path
) -> None:
    run(tiny_tokenizer, photos, cache=tmp_path / "f")
    with torch.no_grad():
        tiny_tokenizer.encoder.class_token.add_(1)
    with pytest.raises(OutputExistsError, match="another tokenizer model"):
        run(tiny_tokenizer, photos, cache=tmp_path / "f")
    with pytest.raises(OutputExistsError, match="exists already"):
        run(tiny_tokenizer, photos, cache=photos)
    (tmp_path / "f" / "features.json").write_text('{"mergevq": "features/2"}')
    with pytest.raises(CheckpointError, match="expected format features/1, got features/2"):
        run(tiny_tokenizer, photos, cache=tmp_path / "f")


def test_features_of_a_teacher_that_sees_other_images_or_of_another_version_are_refused(
    photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeing(size: int) -> dict[str, Any]:
        return {"teacher": load_teacher(Teacher(), size=size), "cache": tmp_path / "sized"}

    run(tiny_tokenizer, photos, **seeing(16))
    with pytest.raises(OutputExistsError, match="another teacher preprocessing"):
        run(tiny_tokenizer, photos, **seeing(8))
    # Without weights the settings of its modules tell one from another.
    pools = [nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten()) for side in (1, 2)]
    run(tiny_tokenizer, photos, teacher=pools[0], cache=tmp_path / "pools")
    with pytest.raises(OutputExistsError, match="another teacher model"):
        run(tiny_tokenizer, photos, teacher=pools[1], cache=tmp_path / "pools")
    run(tiny_tokenizer, photos, cache=tmp_path / "plain")
    monkeypatch.setattr("mergevq.evaluation.feature_cache.versions", lambda: {"torch": "1.0"})
    with pytest.raises(OutputExistsError, match=r"another version of torch, .* instead of 1\.0"):
        run(tiny_tokenizer, photos, cache=tmp_path / "plain")


def test_what_comes_before_attention_runs_once_for_all_k(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    ran: list[int] = []
    with tiny_tokenizer.encoder.stem.register_forward_hook(lambda _, images, __: ran.append(len(images[0]))):
        run(tiny_tokenizer, photos, num_tokens=(64, 20, 5), quantized=(False, True))
    assert sum(ran) == 27 + 12


def test_training_images_as_test_images_are_found_and_it_is_said(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    images = ImageFolder(photos).part("train")
    report = run(tiny_tokenizer, images, test=images, probes=ProbeConfig(probes=("knn",), ks=(1,)))
    assert [row.name for row in report.rows] == ["mean of tokens, K = 20", "pixels, 4 x 4"]
    assert all(row.knn is not None and row.knn.score.top1 == 1.0 for row in report.rows)
    assert any("say nothing about new images" in note for note in report.notes)
    assert (report.protocol["shared_images"], report.protocol["train_and_test"]) == (27, "overlapping")


def test_test_images_among_the_training_images_are_counted(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    report = run(tiny_tokenizer, photos / "train", test=photos / "train", test_limit=9, probes=KNN)
    assert (report.protocol["shared_images"], report.protocol["train_and_test"]) == (9, "overlapping")
    assert any("The test images are the training images" in note for note in report.notes)
    # Every third image, and 12 spread over the same 27: 0, 6, 9, 15, 18 and 24 are in both.
    some = run(tiny_tokenizer, photos / "train", test=photos / "train", train_limit=9, test_limit=12, probes=KNN)
    assert some.protocol["shared_images"] == 6 and some.protocol["train_and_test"] == "overlapping"
    assert any("6 of the 12 test images are training images too" in note for note in some.notes)
    apart = run(tiny_tokenizer, photos, probes=KNN)
    assert (apart.protocol["shared_images"], apart.protocol["train_and_test"]) == (0, "separate")
    assert not any("training images too" in note for note in apart.notes)


def test_the_row_that_is_shown_is_chosen_by_held_out_images(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    report = run(tiny_tokenizer, photos, kinds=("class", "mean", "class+mean"), baselines=())
    held = [row.held_out_score("knn") or (0.0, 0.0) for row in report.rows[:3]]
    assert report.chosen == report.best("knn") == held.index(max(held))
    assert all(row.knn is not None and row.knn.held_out == 3 for row in report.rows)
    pictures = report.pictures[0]
    assert pictures.projection.shape == (12, 2) and pictures.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert int(pictures.confusion.sum()) == 12


# ----------------------------------------------------------------------------------------------------------- bad input


class Poisoned(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) / (images.mean() > 9)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "K above L": ({"num_tokens": 65}, ShapeError, r"1\.\.64"),
    "size": ({"size": 30}, ShapeError, "downsampling 4, got 30"),
    "kind": ({"kinds": ("clas",)}, ConfigError, "got 'clas'"),
    "patches": ({"kinds": ("patches",)}, ConfigError, "one vector an image"),
    "codes of the class token": ({"kinds": ("class",), "quantized": (True,)}, ConfigError, "no quantized form"),
    "baseline": ({"baselines": ("noise",)}, ConfigError, "got 'noise'"),
    "batch": ({"batch_size": 0}, ConfigError, "at least 1, got 0"),
    "limit": ({"test_limit": 0}, ConfigError, "limit of at least 1"),
    "k": ({"probes": ProbeConfig(ks=(1, 28))}, DataError, "at least k = 28 training images, got 27"),
    "shots": ({"probes": ProbeConfig(shots=(10,))}, DataError, "for 10 shots, got 9 of ant"),
    "fewer images than classes": ({"train_limit": 2}, DataError, r"training images as classes \(3\), got 2"),
    "NaN": ({"teacher": Poisoned()}, ShapeError, r"training \(teacher Poisoned\) features, got NaN.* for 27 of 27"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case: str, photos: Path, tiny_tokenizer: MergeVQ) -> None:
    options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        run(tiny_tokenizer, photos, **{"probes": ProbeConfig(probes=("knn", "few-shot")), **options})


def test_a_teacher_that_gives_maps_is_refused(unchecked: None, photos: Path, tiny_tokenizer: MergeVQ) -> None:
    with pytest.raises(ShapeError, match=r"one vector an image, \[B, D\], got \[3, 3, 32, 32\]"):
        run(tiny_tokenizer, photos, teacher=nn.Identity())


def test_classes_have_to_match(photos: Path, tmp_path: Path) -> None:
    images = torch.zeros(8, 3, 8, 8)
    write_images(tmp_path / "flat", images[:2], ["a.png", "b.png"])
    with pytest.raises(DataError, match="expected training images in class folders"):
        probe_images(tmp_path / "flat")
    with pytest.raises(DataError, match="got 2 of 2 without"):
        probe_images(photos, tmp_path / "flat")
    write_images(tmp_path / "two", images, [f"{c}/{i}.png" for c in ("ant", "bee") for i in range(4)])
    with pytest.raises(DataError, match="expected test images of every class, got none of cat"):
        probe_images(photos, tmp_path / "two")
    write_images(tmp_path / "four", images, [f"{c}/{i}.png" for c in (*CLASSES, "dog") for i in range(2)])
    with pytest.raises(DataError, match=r"known classes \(ant, bee, cat\), got 2 of 8 without"):
        probe_images(photos, tmp_path / "four")
    train, two = ImageFolder(photos).part("train"), ImageFolder(tmp_path / "two")
    with pytest.raises(DataError, match="only the training images have cat"):
        probe_images(train, two)
    with pytest.raises(DataError, match="only the test images have dog"):
        probe_images(train, ImageFolder(tmp_path / "four"))
    with pytest.raises(DataError, match="test images in class folders"):
        probe_images(train, ImageFolder(tmp_path / "flat"))
    with pytest.raises(ConfigError, match="test="):
        probe_images(train)
    with pytest.raises(DataError, match="expected test images of every class, got none of cat"):
        probe_images(train, train.select([0, 1, 10, 11]))


def test_without_a_part_to_test_on_the_folder_is_divided(photos: Path, tiny_tokenizer: MergeVQ) -> None:
    report = run(tiny_tokenizer, photos / "train", test_fraction=0.4, probes=ProbeConfig(probes=("knn",)))
    assert report.rows[0].linear is None
    data = report.protocol
    assert data["train_and_test"] == "divided within one folder" and data["test"]["images"] > 5
    assert data["train"]["images"] + data["test"]["images"] == 27
    assert any("divided within one folder" in note for note in report.notes)
    assert report.protocol["knn"]["k"] == [1, 10]  # As many of the usual ones as there are images.


def test_unreadable_images_are_left_out_and_counted(photos: Path, tiny_tokenizer: MergeVQ, tmp_path: Path) -> None:
    for path in photos.rglob("*.png"):
        copy = tmp_path / path.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"no image" if path.name in ("00.png", "01.png", "02.png", "03.png") else path.read_bytes())
    with pytest.raises(DataError, match="expected test images of every class, got none of ant"):
        run(tiny_tokenizer, tmp_path, kinds=("class",))  # All of the test images of a class are broken.
    report = run(tiny_tokenizer, ImageFolder(tmp_path).part("train"), test=ImageFolder(photos).part("val"))
    assert (report.protocol["train"]["images"], report.protocol["train"]["images_unreadable"]) == (23, 4)
    assert any("4 training images could not be read" in note for note in report.notes)
