"""Table, notes, page and pictures of a report on probes."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from mergevq.errors import ShapeError
from mergevq.evaluation.feature_sources import FeatureSetting
from mergevq.evaluation.representation_notes import representation_notes
from mergevq.evaluation.representation_report import (
    accuracy_plot,
    confusion_picture,
    content,
    projection_picture,
    render_representation,
    tokens_plot,
)
from mergevq.evaluation.representation_result import (
    KnnResult,
    KnnTried,
    LinearResult,
    ProbeScore,
    RepresentationReport,
    RepresentationRow,
    RowPictures,
)
from mergevq.metrics.few_shot import FewShot
from mergevq.metrics.linear_probe import Tried

RATES = (0.01, 0.1, 1.0)


def _row(setting: FeatureSetting, name: str, top1: float, classes: int, rate: float = 0.1, k: int = 10) -> Any:
    score = ProbeScore(top1, (top1 - 0.05, top1 + 0.03), 0.9, top1, (top1,) * classes, ((0, 1, 7), (1, 0, 3)), None)
    knn = KnnResult(score, k, tuple(KnnTried(n, 0.5 + n / 100, 0.4, 0.8) for n in (1, 10)))
    sweep = tuple(Tried(each, 0.0, top1 + (each == rate) / 10, 1.0) for each in RATES)
    few = (FewShot(1, 0.3, 0.02, (0.28, 0.32)), FewShot(5, 0.4, None, (0.4,)))
    return RepresentationRow(setting, name, 96, knn, LinearResult(score, rate, 0.0, 30, sweep), few)


def _report(classes: int = 9, **changes: Any) -> RepresentationReport:
    own = [FeatureSetting("tokenizer", "mean", k, k < 64) for k in (64, 20)]
    rows = (
        _row(own[0], "mean of tokens, K = 64", 0.6, classes, rate=1.0),
        _row(own[1], "mean of tokens, K = 20", 0.7, classes),
        _row(FeatureSetting("pixels"), "pixels, 4 x 4", 0.5, classes),
    )
    labels = torch.arange(40) % classes
    pictures = RowPictures(torch.randn(40, 2), (0.5, 0.25), labels, torch.eye(classes, dtype=torch.int64) * 4 + 1)
    data = {"data": "photos[red]", "images": 300, "images_unreadable": 0, "fingerprint": "a"}
    fields: dict[str, Any] = {
        "rows": rows,
        "classes": tuple(f"<b>{i}" for i in range(classes)),
        "reference": {"majority_top1": 0.2, "majority_top5": 0.6, "chance_top1": 1 / 9, "chance_top5": 5 / 9},
        "protocol": {
            "train": data,
            "test": {**data, "images": 40, "fingerprint": "b"},
            "train_and_test": "separate",
            "shared_images": 0,
            "num_patches": 64,
            "held_out": 0.1,
            "encoders": {"pixels": {"side": 4}},
        },
        "notes": ("Something to know.",),
        "seconds": {"features": 1.0, "probes": 2.0},
        "pictures": (pictures,) * 3,
    }
    return RepresentationReport(**{**fields, **changes})


def _without(report: RepresentationReport, *names: str) -> RepresentationReport:
    return replace(report, rows=tuple(replace(row, **dict.fromkeys(names)) for row in report.rows))


def test_the_table_has_a_line_for_each_row_and_what_needs_no_features() -> None:
    heads, lines = _report().cells()
    assert " ".join(heads) == (" width k-NN top-5 k linear top-5 rate 1-shot 5-shot")
    assert lines[1] == [
        "mean of tokens, K = 20", "96", "70.0 ± 4.0", "90.0", "10", "70.0 ± 4.0", "90.0", "0.1", "30.0 ± 2.0", "40.0"
    ]  # fmt: skip
    assert lines[3] == ["always the most frequent class", "", "20.0", "60.0", "", "20.0", "60.0", "", "20.0", "20.0"]
    assert lines[4][2:4] == ["11.1", "55.6"]
    text = str(_report())
    assert "photos[red]" in text and "Something to know." in text and "70.0 ± 4.0" in text and "rate" not in text
    heads, lines = _without(_report(), "knn", "few_shot").cells()
    assert heads == ["", "width", "linear", "top-5", "rate"] and len(lines[0]) == 5


def test_rows_come_back_from_json() -> None:
    report = _without(_report(), "few_shot")
    value = json.loads(json.dumps(report.to_json()))
    assert tuple(map(RepresentationRow.from_json, value["rows"])) == report.rows
    assert value["chosen"] == 1 and value["schema"] == "mergevq.representation/1"


def test_notes_say_what_was_chosen_and_where_the_sweep_was_short() -> None:
    notes = " ".join(representation_notes(_report()))
    assert "k and the learning rate were chosen for each row on a held-out 10% of the training images" in notes
    assert "an end of the sweep for mean of tokens, K = 64: one beyond" in notes
    assert "K = 64, the number of patches, merges nothing" in notes and "mean of 2 draws" in notes
    assert "40 test images" in notes and "4 x 4" in notes and "random" not in notes
    few = (FewShot(5, 0.4, None, (0.4,), True), FewShot(2, 0.3, 0.02, (0.28, 0.3, 0.32)))
    told = " ".join(representation_notes(replace(_report(), rows=(replace(_report().rows[0], few_shot=few),))))
    assert "mean of 3 draws" in told and "5-shot takes all training images" in told and "2-shot" not in told
    linear = representation_notes(_without(_report(), "knn"))
    assert any(note.startswith("The learning rate was chosen") for note in linear)
    assert not any("chosen" in note for note in representation_notes(_without(_report(), "knn", "linear")))


@pytest.mark.parametrize("classes", [9, 70])
def test_the_page_holds_all_it_shows(classes: int, tmp_path: Path) -> None:
    report = _report(classes)
    report.write_html(tmp_path / "report.html", title="A <title>")
    text = (tmp_path / "report.html").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(links) == 5 and all(link.startswith("data:image/") for link in links)
    assert "A &lt;title&gt;" in text and "&lt;b&gt;1" in text and "<b>1" not in text
    assert "Linear probe on mean of tokens, K = 20" in text


def test_pictures_are_drawn_of_what_was_measured() -> None:
    report = _report()
    assert accuracy_plot(report) == accuracy_plot(report)  # The same numbers, the same bytes.
    for picture in (projection_picture(report), confusion_picture(report), confusion_picture(report, 2)):
        assert Image.open(io.BytesIO(picture)).width > 200
    assert tokens_plot(replace(report, rows=report.rows[1:])) is None  # One K only.
    bare = _without(report, "knn", "linear")
    assert tokens_plot(bare) is None
    text = render_representation(replace(bare, pictures=()))
    assert "<img" not in text and "1-shot" in text
    with pytest.raises(ShapeError, match="with pictures"):
        projection_picture(replace(report, pictures=()))
    empty = replace(report.pictures[0], confusion=torch.zeros(0, 0, dtype=torch.int64))
    with pytest.raises(ShapeError, match="k-NN or a linear probe"):
        confusion_picture(replace(report, pictures=(empty,) * 3))


def test_all_rows_of_a_usual_evaluation_are_drawn_and_those_left_out_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    real = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda self, label, **more: drawn.append(label) or real(self, label, **more))
    for count, left_out in ((13, []), (22, ["row 20", "row 21"])):
        rows = tuple(replace(_report().rows[0], name=f"row {i}") for i in range(count))
        report = _report(rows=rows, pictures=_report().pictures[:1] * count)
        drawn.clear()
        projection_picture(report)
        assert drawn == [f"row {i}" for i in range(min(count, 20))]
        found = content(report, pictures=False)
        assert found["not_projected"] == left_out
        page = render_representation(report)
        assert ("The first 20 rows are drawn; left out: row 20; row 21." in page) == bool(left_out)
