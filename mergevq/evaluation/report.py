"""The report: one HTML page, with its plots and pictures inside, and the same pictures as one sheet."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.evaluation.page import FAINT, INK, OTHER, Section, check_packages, data_uri, photograph, png, render_page
from mergevq.evaluation.result import Example, PredictedSource, ReconstructionReport, ReconstructionRow
from mergevq.evaluation.token_map import contact_sheet, draw_token_map, to_pil

_MAP_SIDE = 256  # Token maps are drawn at least this large, so that their outlines stay thin.


def render_html(
    report: ReconstructionReport,
    *,
    title: str = "Reconstruction",
    about: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
    sections: Sequence[Section] = (),
) -> str:
    """Returns the page: table, rate-distortion plots, originals with reconstructions and token maps, protocol.

    Args:
        report: what was measured.
        title: heading of the page.
        about: paragraphs below the heading.
        facts: a short table below them, such as what was trained for how long.
        sections: what follows the pictures, each under a heading of its own.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    value = report.to_json()
    return render_page(title=title, about=about, facts=facts, sections=sections, json_value=value, **content(report))


def content(report: ReconstructionReport) -> dict[str, Any]:
    """Returns what a page or a section of it shows: arguments of `render_page` and `render_section`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return {
        "template": "report.html.j2",
        "summary": report.summary(),
        "table": report.cells(),
        "notes": report.all_notes(),
        "protocol": report.protocol,
        "plot": data_uri(rate_distortion_plot(report), "svg+xml"),
        "columns": [view.title for view in _views(report.examples[0])] if report.examples else [],
        "examples": [_pictures(example, report) for example in report.examples],
        "width": 10 if report.protocol["image_size"] <= 128 else 14,
    }


def rate_distortion_plot(report: ReconstructionReport) -> bytes:
    """Returns an SVG picture: bits per image against PSNR, perceptual distance and Fréchet distance, where measured.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_packages()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    charts = _charts(report)
    # A salt of our own and no date: the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "mergevq", "font.size": 9, "axes.edgecolor": FAINT, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(3.4 * len(charts), 2.9), layout="constrained")
        for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            for label, colour, curve in (
                ("source predicted", OTHER, chart.predicted),
                ("source known", INK, chart.known),
            ):
                axes.plot(
                    [p.bits for p in curve],
                    [p.value for p in curve],
                    "o-",
                    color=colour,
                    markersize=4,
                    linewidth=1.4,
                    label=label,
                )
                for point in curve:
                    axes.annotate(
                        f"K {point.num_tokens}",
                        (point.bits, point.value),
                        # The curves begin with the largest K.
                        (4, 4) if curve[0].value < curve[-1].value else (4, -10),
                        textcoords="offset points",
                        fontsize=7,
                        color=FAINT,
                    )
            if chart.predicted:
                axes.legend(fontsize=7, frameon=False)
            if chart.reference is not None:
                axes.axhline(chart.reference, color=FAINT, linestyle="--", linewidth=0.8)
                axes.annotate(
                    "two halves of the originals",
                    (min(p.bits for p in (*chart.known, *chart.predicted)), chart.reference),
                    (0, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
            axes.set_title(chart.name, fontsize=9)
            axes.set_xlabel("bits per image")
            axes.margins(x=0.15, y=0.2)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


class _Point(NamedTuple):
    num_tokens: int
    bits: float
    value: float


class _Chart(NamedTuple):
    """One quantity against bits per image, with and without the source map."""

    name: str
    known: list[_Point]
    predicted: list[_Point]
    reference: float | None


def _charts(report: ReconstructionReport) -> list[_Chart]:
    """What was measured at every K and is finite."""
    reference = None if report.reference is None else report.reference.frechet
    quantities: list[tuple[str, Callable[[ReconstructionRow | PredictedSource], float | None], float | None]] = [
        ("PSNR in dB", lambda it: it.psnr.mean, None),
        ("SSIM", lambda it: None if it.ssim is None else it.ssim.mean, None),
        (f"perceptual distance ({report.perceptual_name()})", lambda it: it.perceptual, None),
        (report.distance_names()[0], lambda it: it.frechet, reference),
    ]
    charts = []
    for name, value, limit in quantities:
        known = [(row.num_tokens, row.bits, value(row)) for row in report.rows]
        predicted = [(r.num_tokens, r.bits_index, value(r.predicted)) for r in report.rows if r.predicted is not None]
        curves = [[_Point(k, bits, y) for k, bits, y in curve if y is not None] for curve in (known, predicted)]
        kept = [[point for point in curve if math.isfinite(point.value)] for curve in curves]
        if len(kept[0]) == len(report.rows):
            charts.append(_Chart(name, kept[0], kept[1], limit))
    return charts


def report_picture(
    report: ReconstructionReport, num_tokens: Sequence[int] | None = None, *, rows: int = 9, cell: int = 128
) -> Image.Image:
    """Returns a sheet of examples: the original, then at each K the token map (if anything was merged) and the result.

    Args:
        report: has the examples.
        num_tokens: which K; all that the examples have by default.
        rows: at most so many images.
        cell: side of each picture in pixels.

    Raises:
        ShapeError: the report holds no examples.
    """
    if not report.examples:
        raise ShapeError("expected a report with examples to draw, got none: evaluate with examples=8")
    rates = {row.num_tokens: (row.bits, row.bits_index) for row in report.rows}

    titles = ["original"]
    for view in _views(report.examples[0], num_tokens):
        kind = "\nsource predicted" if view.predicted else ""
        if _is_merged(view, report):
            titles.append(f"token map{kind}\nK = {view.num_tokens}")
        titles.append(f"K = {view.num_tokens}{kind}\n{rates[view.num_tokens][view.predicted]:,.0f} bits")
    sheet = []
    for example in report.examples[:rows]:
        scale = max(1, -(-cell // example.original.shape[-1]))
        row = [example.original]
        for view in _views(example, num_tokens):
            if _is_merged(view, report):
                row.append(draw_token_map(example.original, view.source_index, report.grid, scale=scale))
            row.append(view.drawn)
        sheet.append(row)
    return contact_sheet(sheet, titles, cell=cell)


class _View(NamedTuple):
    """What came back in one way, and which patches were one token."""

    num_tokens: int
    predicted: bool
    source_index: Int[Tensor, " L"]
    drawn: Float[Tensor, "3 H W"]

    @property
    def title(self) -> str:
        return f"K = {self.num_tokens}{', source predicted' if self.predicted else ''}"


def _views(example: Example, num_tokens: Sequence[int] | None = None) -> list[_View]:
    views = []
    for k in example.reconstruction if num_tokens is None else num_tokens:
        views.append(_View(k, False, example.source_index[k], example.reconstruction[k]))
        if k in example.predicted:
            views.append(_View(k, True, example.predicted_index[k], example.predicted[k]))
    return views


def _pictures(example: Example, report: ReconstructionReport) -> dict[str, Any]:
    scale = max(1, -(-_MAP_SIDE // example.original.shape[-1]))
    views = []
    for view in _views(example):
        tokens = None
        if _is_merged(view, report):
            tokens = png(to_pil(draw_token_map(example.original, view.source_index, report.grid, scale=scale)))
        views.append((view.title, photograph(to_pil(view.drawn)), tokens))
    return {"original": photograph(to_pil(example.original)), "views": views}


def _is_merged(view: _View, report: ReconstructionReport) -> bool:
    """Whether the token map is worth drawing; without merging it is the patch grid."""
    return view.num_tokens < report.grid[0] * report.grid[1]
