"""The few numbers that matter of each part of an evaluation, and what to compare them with."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mergevq.evaluation.feature_sources import FeatureSetting
from mergevq.evaluation.generation_result import GenerationReport
from mergevq.evaluation.representation_result import ProbeScore, RepresentationReport, RepresentationRow
from mergevq.evaluation.result import ReconstructionReport
from mergevq.evaluation.sanity_result import SanityReport


@dataclass(frozen=True)
class Line:
    """One quantity."""

    part: str
    quantity: str
    better: Literal["higher", "lower"] | None
    """Which values are good ones; None where neither is."""
    form: str
    """How a value is written, such as ".2f"."""
    values: Mapping[int, float]
    """By K."""
    beside: Mapping[str, float]
    """Names and values to compare with."""

    def title(self) -> str:
        """Returns the quantity, and an arrow towards good values."""
        return self.quantity + {"higher": " ↑", "lower": " ↓", None: ""}[self.better]

    def cells(self, counts: list[int]) -> list[str]:
        """Returns a line of a table: title, a value for each K, what to compare with."""
        written = [format_number(self.values[k], self.form) if k in self.values else "" for k in counts]
        others = ", ".join(f"{name} {format_number(value, self.form)}" for name, value in self.beside.items())
        return [self.title(), *written, others]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values; what is infinite is None."""
        return {
            "part": self.part,
            "quantity": self.quantity,
            "better": self.better,
            "values": {str(k): _finite(value) for k, value in self.values.items()},
            "beside": {name: _finite(value) for name, value in self.beside.items()},
        }


def reconstruction_lines(report: ReconstructionReport, sanity: SanityReport | None) -> Iterator[Line]:
    """Gives the lines of reconstruction."""
    rows = {row.num_tokens: row for row in report.rows}
    blurred, noised = (sanity.row(name) if sanity else None for name in ("blurred", "noised"))

    def line(quantity: str, better: Any, form: str, values: Mapping[int, Any], **beside: Any) -> Iterator[Line]:
        known = {k: value for k, value in values.items() if value is not None}
        if known:
            others = {name.replace("_", " "): value for name, value in beside.items() if value is not None}
            yield Line("reconstruction", quantity, better, form, known, others)

    def both(name: str) -> dict[str, Any]:
        return {"blurred": getattr(blurred, name, None), "noised": getattr(noised, name, None)}

    pixels = 24.0 * report.protocol["image_size"] ** 2
    yield from line("bits an image", "lower", ",.0f", {k: row.bits for k, row in rows.items()}, pixels=pixels)
    yield from line("PSNR in dB", "higher", ".2f", {k: row.psnr.mean for k, row in rows.items()}, **both("psnr"))
    ssim = {k: None if row.ssim is None else row.ssim.mean for k, row in rows.items()}
    yield from line("SSIM", "higher", ".3f", ssim, **both("ssim"))
    perceptual = f"perceptual ({report.perceptual_name()})"
    yield from line(perceptual, "lower", ".3f", {k: row.perceptual for k, row in rows.items()}, **both("perceptual"))
    halves = None if report.reference is None else report.reference.frechet
    frechet = report.distance_names()[0]
    beside = {"two_halves_of_the_originals": halves, **both("frechet")}
    yield from line(frechet, "lower", ".4g", {k: row.frechet for k, row in rows.items()}, **beside)
    predicted = {k: row.predicted.psnr.mean for k, row in rows.items() if row.predicted is not None}
    yield from line("PSNR, source predicted", "higher", ".2f", predicted)
    used = {k: 100 * row.codebook_used / row.codebook_size for k, row in rows.items()}
    yield from line(f"indices used, % of {report.rows[0].codebook_size:,}", None, ".1f", used)


def generation_lines(report: GenerationReport) -> Iterator[Line]:
    """Gives the lines of generation, of its best setting."""
    row, real = report.rows[report.best or 0], report.reference
    k = row.setting.num_tokens
    distinct = real.distinct_tokens.get(k)
    quantities: list[tuple[str, Any, str, float | None, str, float | None]] = [
        (report.distance_names()[0], "lower", ".4g", row.frechet, "two halves of real images", real.frechet),
        ("precision", "higher", ".3f", row.precision, "two halves", real.precision),
        ("recall", "higher", ".3f", row.recall, "two halves", real.recall),
        ("close to training", None, ".3f", row.close_to_training, "real images", real.close_to_training),
        (
            "distinct tokens an image",
            None,
            ".1f",
            row.distinct_tokens.mean,
            "real images",
            None if distinct is None else distinct.mean,
        ),
    ]
    for quantity, better, form, value, name, other in quantities:
        if value is not None:
            yield Line("generation", quantity, better, form, {k: value}, {} if other is None else {name: other})


def representation_lines(report: RepresentationReport) -> Iterator[Line]:
    """Gives the lines of representation: of the kind of features that did best on held-out training images."""
    chosen = report.rows[report.chosen].setting
    own = [row for row in report.rows if same_kind(row.setting, chosen) and row.setting.source == "tokenizer"]
    for name, quantity in (("linear", "linear probe, top-1 in %"), ("knn", "k-NN, top-1 in %")):
        scores = {row.setting.num_tokens: probe_score(row, name) for row in own}
        values = {k: 100 * score.top1 for k, score in scores.items() if score is not None and k is not None}
        if not values:
            continue
        beside = {}
        for title, row in baselines(report):
            score = probe_score(row, name)
            if score is not None:
                beside[title] = 100 * score.top1
        beside["chance"] = 100 * report.reference["chance_top1"]
        yield Line("representation", quantity, "higher", ".1f", values, beside)


def baselines(report: RepresentationReport) -> Iterator[tuple[str, RepresentationRow]]:
    """Gives name and row of what the tokenizer's features are compared with."""
    chosen = report.rows[report.chosen].setting
    for row in report.rows:
        if row.setting.source == "random" and same_kind(row.setting, chosen):
            yield "random weights", row
        elif row.setting.source in ("pixels", "teacher"):
            yield row.setting.source, row


def same_kind(a: FeatureSetting, b: FeatureSetting) -> bool:
    """Returns whether features differ by their K and model at most."""
    return a.kind == b.kind and a.quantized == b.quantized


def probe_score(row: RepresentationRow, probe: str) -> ProbeScore | None:
    """Returns what the probe "linear" or "knn" scored, None if it was not made."""
    found = row.linear if probe == "linear" else row.knn
    return None if found is None else found.score


def format_number(value: float, form: str) -> str:
    """Returns a value of a table; what is infinite as a sign."""
    return "∞" if math.isinf(value) else format(value, form)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
