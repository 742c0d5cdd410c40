"""Results are read back from their JSON, and anything else is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergevq.errors import CheckpointError
from mergevq.evaluation.generation_result import GenerationReport, GenerationRow, ReferenceRow, Setting
from mergevq.evaluation.kept_parts import Part
from mergevq.evaluation.overall_result import EvaluationReport
from mergevq.evaluation.read_back import Report, read_report
from mergevq.evaluation.result import PredictedSource, ReconstructionReport, ReconstructionRow, Reference, Spread
from mergevq.evaluation.sanity_result import SanityReport, SanityRow

PROTOCOL: dict[str, Any] = {
    "data": "photos",
    "images": 5,
    "image_size": 8,
    "num_patches": 4,
    "network": {"name": "lite1", "sha256": "0123"},
    "perceptual": None,
    "blur_sigma": 0.125,
    "noise_sigma": 16,
    "batch_size": 2,
    "reference": {"data": "photos", "images": 7},
}


def reconstruction() -> ReconstructionReport:
    def row(k: int, psnr: Spread) -> ReconstructionRow:
        predicted = PredictedSource(0.5, psnr, None, None, 2.0, 0.5)
        bits = (0.5, 0.25)
        return ReconstructionRow(k, 6.0, 4.0, psnr, None, None, 3.5, 0.01, 3.0, 17, 64, bits, 9.0, 8.0, predicted)

    rows = (row(4, Spread(float("inf"), float("nan"))), row(2, Spread(20.0, 1.5)))
    return ReconstructionReport(rows, Reference(1.5, 0.001, 2), PROTOCOL, ("A note.",), (2, 2))


def generation() -> GenerationReport:
    row = GenerationRow(
        Setting(1.0, 4, "merge"), 3.0, 0.1, None, 0.5, 0.6, None, Spread(2.0, 1.0), 0.5, 8, 4.0, 1.0, 2.0, 3.0
    )
    reference = ReferenceRow(3, 2.0, 0.1, None, 0.9, 0.8, None, {4: Spread(3.0, 0.5)})
    return GenerationReport((row,), reference, PROTOCOL, ("Another note.",))


def sanity() -> SanityReport:
    return SanityReport((SanityRow("identical", 5, float("inf")), SanityRow("halves", 2, frechet=1.0)), PROTOCOL, ())


def overall() -> EvaluationReport:
    reports = {"reconstruction": reconstruction(), "generation": generation(), "sanity": sanity()}
    parts = {name: Part(report.to_json(), str) for name, report in reports.items()}
    protocol = {**PROTOCOL, "tokenizer": {"name": "t", "fingerprint": "ab"}}
    return EvaluationReport(parts, {"representation": "there are no classes"}, protocol, "mergevq eval all")


REPORTS: dict[str, Callable[[], Report]] = {
    "reconstruction": reconstruction,
    "generation": generation,
    "sanity": sanity,
    "evaluation": overall,
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_result_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    report = REPORTS[name]()
    value = json.dumps(report.to_json(), allow_nan=False)
    (tmp_path / "result.json").write_text(value)
    found = read_report(tmp_path / "result.json")
    assert type(found) is type(report) and str(found) == str(report)
    again = found.to_json()
    again.pop("samples", None)  # Pictures do not come back, nor what is told of them.
    assert again == {name: entry for name, entry in json.loads(value).items() if name != "samples"}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize(("step", "advice"), [(1, "upgrade mergevq"), (-1, "evaluate again")])
def test_another_version_is_refused(name: str, step: int, advice: str, tmp_path: Path) -> None:
    value = REPORTS[name]().to_json()
    schema, own = value["schema"], int(value["schema"].rpartition("/")[2])
    value["schema"] = f"mergevq.{name}/{own + step}"
    (tmp_path / "result.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=rf"result.json: expected the schema {schema}, got .*{advice}") as caught:
        read_report(tmp_path / "result.json")
    assert "\n" not in str(caught.value)


def test_a_part_of_another_version_is_refused(tmp_path: Path) -> None:
    value = overall().to_json()
    value["parts"]["generation"]["schema"] = "mergevq.generation/3"
    (tmp_path / "all.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=r"generation: expected the schema mergevq\.generation/1"):
        read_report(tmp_path / "all.json")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ({"schema": "mergevq.show/1"}, "expected the schema mergevq.evaluation/2, got mergevq.show/1"),
        ({"rows": []}, "got JSON without one"),
        ([1, 2], "got JSON without one"),
        ({"schema": "mergevq.reconstruction/1", "rows": []}, "a damaged one \\(no 'protocol'\\)"),
        ({"schema": "mergevq.sanity/1", "rows": [3], "protocol": {}, "notes": []}, "damaged"),
    ],
)
def test_what_is_no_result_is_refused(value: Any, hint: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match=hint) as caught:
        read_report(tmp_path / "result.json")
    assert "\n" not in str(caught.value)
