"""The few numbers that matter of each part of an evaluation, and what to compare them with."""

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergevq.evaluation.generation_result import GenerationReport
from mergevq.evaluation.representation_pairs import baselines, same_kind
from mergevq.evaluation.representation_result import (
    PROBES,
    Probe,
    ProbeScore,
    RepresentationReport,
    RepresentationRow,
)
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
    detail: str = ""
    """Of what, in a few words, where the part's title does not say it."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Of those to compare with that were measured on another number of images than the values: how many images."""

    def title(self) -> str:
        """Returns the quantity, an arrow towards good values, and the detail."""
        arrow = {"higher": " ↑", "lower": " ↓", None: ""}[self.better]
        return f"{self.quantity}{arrow}" + (f", {self.detail}" if self.detail else "")

    def cells(self, counts: list[int]) -> list[str]:
        """Returns a line of a table: title, a value for each K, what to compare with."""
        written = [format_number(self.values[k], self.form) if k in self.values else "" for k in counts]
        others = [f"{name} {format_number(value, self.form)}" for name, value in self.beside.items()]
        images = [f" ({self.counts[name]:,} images)" if name in self.counts else "" for name in self.beside]
        return [self.title(), *written, ", ".join(map(operator.add, others, images))]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values; what is infinite is None."""
        return {
            "part": self.part,
            "quantity": self.quantity,
            "detail": self.detail,
            "better": self.better,
            "values": {str(k): _finite(value) for k, value in self.values.items()},
            "beside": {name: _finite(value) for name, value in self.beside.items()},
            "beside_images": dict(self.counts),
        }


def reconstruction_lines(report: ReconstructionReport, sanity: SanityReport | None) -> Iterator[Line]:
    """Gives the lines of reconstruction."""
    rows = {row.num_tokens: row for row in report.rows}
    blurred, noised = (sanity.row(name) if sanity else None for name in ("blurred", "noised"))
    images = report.protocol["images"]
    measured = {row.name: row.images for row in (blurred, noised) if row is not None}
    if report.reference is not None:
        measured["two halves of the originals"] = report.reference.images

    def line(quantity: str, better: Any, form: str, values: Mapping[int, Any], **beside: Any) -> Iterator[Line]:
        known = {k: value for k, value in values.items() if value is not None}
        if known:
            others = {name.replace("_", " "): value for name, value in beside.items() if value is not None}
            counts = {name: measured[name] for name in others if measured.get(name, images) != images}
            yield Line("reconstruction", quantity, better, form, known, others, counts=counts)

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
    k, images, all_real = row.setting.num_tokens, report.protocol["images"], report.protocol["reference"]["images"]
    distinct = real.distinct_tokens.get(k)
    mean = None if distinct is None else distinct.mean
    halves = ("two halves", real.images)
    # Distinct tokens of the reference are a mean over few of its images, which no number of images biases.
    quantities: list[tuple[str, Any, str, float | None, tuple[str, int], float | None]] = [
        (
            report.distance_names()[0],
            "lower",
            ".4g",
            row.frechet,
            ("two halves of real images", real.images),
            real.frechet,
        ),
        ("precision", "higher", ".3f", row.precision, halves, real.precision),
        ("recall", "higher", ".3f", row.recall, halves, real.recall),
        ("close to training", None, ".3f", row.close_to_training, ("real images", all_real), real.close_to_training),
        ("distinct tokens an image", None, ".1f", row.distinct_tokens.mean, ("real images", images), mean),
    ]
    for quantity, better, form, value, (name, count), other in quantities:
        if value is not None:
            beside, counts = ({}, {}) if other is None else ({name: other}, {name: count})
            counts = {name: count for name, count in counts.items() if count != images}
            yield Line("generation", quantity, better, form, {k: value}, beside, counts=counts)


def representation_lines(report: RepresentationReport) -> Iterator[Line]:
    """Gives a line for each probe: of the kind of features that did best by it on held-out training images."""
    for probe, quantity in PROBES.items():
        number = report.best(probe)
        best = report.rows[number]
        own = [row for row in report.rows if row.setting.source == "tokenizer" and same_kind(row.setting, best.setting)]
        scores = {row.setting.num_tokens: probe_score(row, probe) for row in own}
        values = {k: 100 * score.top1 for k, score in scores.items() if score is not None and k is not None}
        if not values:
            continue
        beside = {}
        for title, other in baselines(report.rows, number):
            score = probe_score(report.rows[other], probe)
            if score is not None:
                beside[title] = 100 * score.top1
        beside["chance"] = 100 * report.reference["chance_top1"]
        detail = kind_and_choice(report, probe)
        yield Line("representation", f"{quantity}, top-1 in %", "higher", ".1f", values, beside, detail)


def kind_and_choice(report: RepresentationReport, probe: Probe) -> str:
    """Returns the kind of features that a probe's line is of, and on how many images that was chosen."""
    best = report.rows[report.best(probe)]
    kind = best.name.rpartition(", K = ")[0]
    others = [row for row in report.rows if row.setting.source == "tokenizer"]
    if len(others) < 2:
        return kind
    for each, title in ((probe, ""), *((other, title) for other, title in PROBES.items() if other != probe)):
        found = best.found(each)
        if found is not None and best.held_out_score(each) is not None:
            count = f"{found.held_out:,} " if found.held_out else ""
            return f"{kind} (best on {count}held-out images{f' by {title}' if title else ''})"
    return f"{kind} (the first, as no images were held out to choose on)"


def probe_score(row: RepresentationRow, probe: Probe) -> ProbeScore | None:
    """Returns what a probe scored, None if it was not made."""
    found = row.found(probe)
    return None if found is None else found.score


def format_number(value: float, form: str) -> str:
    """Returns a value of a table; what is infinite as a sign."""
    return "∞" if math.isinf(value) else format(value, form)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
