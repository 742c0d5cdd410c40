"""What an evaluation of everything says of probes: the kind each one chose, and what is clearly above what."""

import json
from dataclasses import replace
from typing import Any

import pytest

from mergevq.evaluation.feature_sources import FeatureSetting
from mergevq.evaluation.overall_notes import representation_note
from mergevq.evaluation.overall_summary import representation_lines
from mergevq.evaluation.representation_pairs import pair_rows
from mergevq.evaluation.representation_result import (
    KnnResult,
    KnnTried,
    LinearResult,
    Pair,
    ProbeScore,
    RepresentationReport,
    RepresentationRow,
)
from mergevq.metrics.linear_probe import Tried


def score(top1: float) -> ProbeScore:
    return ProbeScore(top1, (top1 - 0.05, top1 + 0.05), None, top1, (top1,) * 2, (), None)


def row(
    setting: FeatureSetting,
    *,
    linear: tuple[float, float | None, float | None] = (0.5, None, None),
    knn: tuple[float, float | None] = (0.5, None),
    width: int = 8,
) -> RepresentationRow:
    """A row with (top-1, held-out top-1, held-out loss) of the linear probe, and (top-1, held-out top-1) of k-NN."""
    held = [0 if found[1] is None else count for found, count in ((linear, 30), (knn, 40))]
    fitted = LinearResult(score(linear[0]), 0.1, 0.0, held[0], (Tried(0.1, 0.0, linear[1], linear[2]),))
    near = KnnResult(score(knn[0]), 1, (KnnTried(1, knn[1], knn[0], None),), held[1])
    return RepresentationRow(setting, setting.name(), width, near, fitted, None)


CLASS, MEAN, BOTH = (FeatureSetting("tokenizer", kind, 64) for kind in ("class", "mean", "class+mean"))
TEST = {"images": 100, "images_unreadable": 0}


def report(*rows: RepresentationRow, **changes: Any) -> RepresentationReport:
    fields: dict[str, Any] = {
        "classes": ("ant", "bee"),
        "reference": {"chance_top1": 0.5},
        "protocol": {"test": TEST},
        "notes": (),
        "seconds": {},
    }
    return RepresentationReport(rows=rows, **{**fields, **changes})


def test_each_probe_has_the_kind_that_did_best_by_it() -> None:
    found = report(
        row(CLASS, linear=(0.6, 0.8, 0.5), knn=(0.7, 0.6)),
        row(MEAN, linear=(0.5, 0.7, 0.5), knn=(0.8, 0.9)),
        row(FeatureSetting("random", "class", 64), linear=(0.4, 0.3, 0.6), knn=(0.31, 0.3)),
        row(FeatureSetting("random", "mean", 64), linear=(0.3, 0.3, 0.6), knn=(0.41, 0.3)),
    )
    assert (found.best("linear"), found.best("knn"), found.chosen) == (0, 1, 0)
    linear, knn = representation_lines(found)
    assert linear.title() == "linear probe, top-1 in % ↑, class token (best on 30 held-out images)"
    assert knn.title() == "k-NN, top-1 in % ↑, mean of tokens (best on 40 held-out images)"
    assert (linear.values, knn.values) == ({64: 60.0}, {64: 80.0})
    assert (linear.beside["random weights"], knn.beside["random weights"]) == (40.0, 41.0)
    assert knn.to_json()["detail"] == "mean of tokens (best on 40 held-out images)"


def test_of_equals_the_loss_decides_then_the_width_then_the_order() -> None:
    assert report(row(CLASS, linear=(0.5, 0.8, 0.5)), row(MEAN, linear=(0.5, 0.8, 0.4))).best("linear") == 1
    wide, narrow, other = (row(kind, knn=(0.5, 0.8), width=n) for kind, n in ((BOTH, 16), (CLASS, 8), (MEAN, 8)))
    assert report(wide, narrow, other).best("knn") == 1


def test_a_probe_with_nothing_held_out_follows_the_other_one() -> None:
    found = report(row(CLASS, knn=(0.5, 0.6)), row(MEAN, knn=(0.5, 0.9)))
    assert (found.best("linear"), found.best("knn"), found.chosen) == (1, 1, 1)
    linear, _ = representation_lines(found)
    assert linear.detail == "mean of tokens (best on 40 held-out images by k-NN)"
    none = report(row(CLASS), row(MEAN))
    assert none.best("linear") == none.best("knn") == 0
    assert "the first, as no images were held out" in next(iter(representation_lines(none))).detail
    assert next(iter(representation_lines(report(row(MEAN))))).detail == "mean of tokens"


PIXELS = FeatureSetting("pixels")


def test_clearly_above_is_tested_on_the_same_images() -> None:
    rows = replace(row(CLASS, linear=(0.6, 0.8, 0.5)), name="class token"), row(PIXELS, linear=(0.56, 0.7, 0.5))
    for alone, words in (((4, 0), "not clearly above pixels"), ((9, 5), "not clearly"), ((12, 2), ": clearly above")):
        pairs = (Pair("knn", 0, 1, 50, 0), Pair("linear", 0, 1, *alone))
        note = representation_note(report(*rows, pairs=pairs))
        assert note is not None and words in note and "McNemar's exact test on the same images" in note


@pytest.mark.parametrize(("top1", "words"), [(0.56, "not clearly above pixels"), (0.49, ": clearly above")])
def test_without_pairs_intervals_have_to_be_apart(top1: float, words: str) -> None:
    # The lower end of the interval, 0.55, is above 0.54 alone, but not above what 0.54 may stand for.
    for other in (top1, 0.54) if top1 > 0.5 else (top1,):
        note = representation_note(report(row(CLASS, linear=(0.6, 0.8, 0.5)), row(PIXELS, linear=(other, 0.7, 0.5))))
        assert note is not None and words in note and "intervals compared" in note


def test_pairs_count_the_images_that_one_alone_gets_right() -> None:
    rows = [
        row(CLASS),
        row(FeatureSetting("random", "class", 64)),
        row(FeatureSetting("random", "mean", 64)),
        row(PIXELS),
    ]
    hits = [{"knn": "1100"}, {"knn": "0111"}, {"knn": "0000"}, {"knn": "1000"}]
    pairs = pair_rows(rows, hits)
    assert pairs == (Pair("knn", 0, 1, 1, 2), Pair("knn", 0, 3, 1, 0))
    value = json.loads(json.dumps({**report(*rows, pairs=pairs).to_json()}))
    assert RepresentationReport.from_json(value).pairs == pairs
    del value["pairs"]  # As results of the first versions.
    assert RepresentationReport.from_json(value).pairs == ()


def test_shared_images_are_told_of() -> None:
    def note(shared: int) -> str:
        return representation_note(report(row(CLASS), protocol={"test": TEST, "shared_images": shared})) or ""

    assert note(7).endswith(
        "test images are training images too, so these numbers are too good: give other images to test on."
    )
    assert note(100).endswith("say nothing about new images.") and "training images" not in note(0)
