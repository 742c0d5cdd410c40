"""The pages and pictures of generated images: samples, their nearest training images, and the guidance sweep."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from mergevq.errors import ShapeError
from mergevq.evaluation.generation_result import GenerationReport, Neighbour, Sample, Setting
from mergevq.evaluation.page import FAINT, INK, OTHER, check_packages, data_uri, photograph, render_page
from mergevq.evaluation.token_map import contact_sheet, to_pil

_COLUMNS = 8  # Of a sheet of samples.
_COLOURS = (INK, OTHER, "#3a7d44", "#7b4ea3", "#b03a48", "#5a6570")


def render_generation(
    report: GenerationReport,
    *,
    title: str = "Generation",
    about: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """Returns the page: table, guidance sweep, nearest training images of the best setting, samples of all, protocol.

    Args:
        report: what was measured.
        title: heading of the page.
        about: paragraphs below the heading.
        facts: a short table below them.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    return render_page(title=title, about=about, facts=facts, json_value=report.to_json(), **content(report))


def content(report: GenerationReport) -> dict[str, Any]:
    """Returns what a page or a section of it shows: arguments of `render_page` and `render_section`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    chosen, heads = report.best or 0, report.heads()
    samples = report.samples[chosen] if report.samples else ()
    near = [sample for sample in samples if sample.by_features or sample.by_pixels]
    plot = guidance_plot(report)
    return {
        "template": "generation.html.j2",
        "summary": report.summary(),
        "table": report.cells(),
        "notes": report.notes,
        "protocol": report.protocol,
        "plot": None if plot is None else data_uri(plot, "svg+xml"),
        "neighbours": [{"pictures": _trio(sample)} for sample in near],
        "neighbours_of": heads[chosen],
        "sheets": [
            (head, photograph(samples_picture(report, row)))
            for row, head in enumerate(heads)
            if report.samples and report.samples[row]
        ],
    }


def samples_picture(report: GenerationReport, row: int | None = None, *, cell: int | None = None) -> Image.Image:
    """Returns a sheet of a setting's samples, in order.

    Args:
        report: what was measured.
        row: number of the setting; None is the best.
        cell: side of each image in pixels; None is the images' own, at least 96.

    Raises:
        ShapeError: the report holds no samples.
    """
    samples = _samples_of(report, row)
    images = [sample.image for sample in samples]
    return contact_sheet(
        [images[i : i + _COLUMNS] for i in range(0, len(images), _COLUMNS)], cell=cell or _cell(samples)
    )


def neighbours_picture(
    report: GenerationReport, row: int | None = None, *, columns: int = 12, cell: int | None = None
) -> Image.Image:
    """Returns a sheet: generated images, below each the training images closest by features and by pixels.

    Args:
        report: what was measured, with neighbours.
        row: number of the setting; None is the best.
        columns: at most so many generated images.
        cell: side of each image in pixels; None is the images' own, at least 96.

    Raises:
        ShapeError: the report holds no samples, or no neighbours.
    """
    samples = _samples_of(report, row)[:columns]
    lines: list[tuple[str, list[Neighbour | None]]] = [
        ("nearest\nby features", [sample.by_features for sample in samples]),
        ("nearest\nby pixels", [sample.by_pixels for sample in samples]),
    ]
    found = [(title, [near.image for near in line if near is not None]) for title, line in lines if any(line)]
    if not found:
        raise ShapeError("expected a report with nearest training images, got none: evaluate with neighbours")
    return contact_sheet(
        [[sample.image for sample in samples], *(images for _, images in found)],
        [sample.title() for sample in samples],
        ["generated", *(title for title, _ in found)],
        cell=cell or _cell(samples),
    )


def guidance_plot(report: GenerationReport) -> bytes | None:
    """Returns an SVG picture: guidance scale against what was measured, a line for each other setting; None for fewer
    than two scales.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_packages()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if len({row.setting.guidance for row in report.rows}) < 2:
        return None
    charts = _charts(report)
    # A salt of our own and no date: the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "mergevq", "font.size": 9, "axes.edgecolor": FAINT, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(3.4 * len(charts), 2.9), layout="constrained")
        for axes, (title, lines, real) in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            for i, (label, points) in enumerate(lines):
                colour = _COLOURS[i % len(_COLOURS)]
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, linewidth=1.4, label=label)
            if real is not None:
                axes.axhline(real, color=FAINT, linestyle="--", linewidth=0.8, label="reference")
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("guidance scale")
            axes.margins(x=0.1, y=0.2)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if len(lines) > 1 or real is not None:
                axes.legend(fontsize=7, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


_Lines = list[tuple[str, list[tuple[float, float]]]]


def _charts(report: GenerationReport) -> list[tuple[str, _Lines, float | None]]:
    """Title, labelled curves, and the reference's value."""
    real = report.reference
    spreads = list(real.distinct_tokens.values())
    wanted: list[tuple[str, dict[str, list[float | None]], float | None]] = [
        (report.distance_names()[0], {"": [row.frechet for row in report.rows]}, real.frechet),
        ("inception score", {"": [row.inception_score for row in report.rows]}, real.inception_score),
        (
            "precision and recall",
            {"precision": [row.precision for row in report.rows], "recall": [row.recall for row in report.rows]},
            None,
        ),
        (
            "distinct tokens an image",
            {"": [row.distinct_tokens.mean for row in report.rows]},
            spreads[0].mean if len(spreads) == 1 else None,
        ),
    ]
    charts = []
    for title, columns, reference in wanted:
        lines: _Lines = []
        for what, values in columns.items():
            lines += _curves(report, what, values)
        if lines:
            charts.append((title, lines, reference))
    return charts


def _curves(report: GenerationReport, what: str, values: Sequence[float | None]) -> _Lines:
    """A curve over the guidance scales for each combination of the other settings."""
    curves: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row, value in zip(report.rows, values, strict=True):
        if value is not None:
            curves.setdefault(_others(row.setting), []).append((row.setting.guidance, value))
    names = report.heads(without_guidance=True)
    label = {_others(row.setting): name for row, name in zip(report.rows, names, strict=True)}
    return [(", ".join(filter(None, (what, label[key]))), sorted(points)) for key, points in curves.items()]


def _others(setting: Setting) -> tuple[Any, ...]:
    return setting.num_tokens, setting.cache, setting.steps


def _samples_of(report: GenerationReport, row: int | None) -> tuple[Sample, ...]:
    chosen = (report.best or 0) if row is None else row
    if not report.samples or not report.samples[chosen]:
        raise ShapeError("expected a report with samples to draw, got none: evaluate with shown=16")
    return report.samples[chosen]


def _cell(samples: Sequence[Sample]) -> int:
    return max(96, samples[0].image.shape[-1])


def _trio(sample: Sample) -> list[tuple[str, str]]:
    """Words and picture of a sample and its neighbours."""
    pictures = [(sample.title() or f"image {sample.number}", photograph(to_pil(sample.image)))]
    for what, near in (("features", sample.by_features), ("pixels", sample.by_pixels)):
        if near is not None:
            pictures.append((f"{what}: {near.distance:.3g}", photograph(to_pil(near.image))))
    return pictures
