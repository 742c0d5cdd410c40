"""The report: one HTML page, with its plots and pictures inside, and the same pictures as one sheet."""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from PIL import Image

from mergevq.errors import MissingDependencyError, ShapeError
from mergevq.evaluation.result import Example, ReconstructionReport
from mergevq.evaluation.token_map import contact_sheet, draw_token_map, to_pil

_MAP_SIDE = 256  # Token maps are drawn at least this large, so that their outlines stay thin.
_EXACT_SIDE = 64  # Photographs up to this side keep every pixel in the page.
_INK, _FAINT = "#1f4e79", "#8a8f98"


def check_packages() -> None:
    """Checks that a page can be written, before the work that it reports.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"the report needs jinja2 ({error}): pip install 'mergevq[eval]'") from error
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"plots need matplotlib ({error}): pip install 'mergevq[eval]'") from error


def render_html(
    report: ReconstructionReport,
    *,
    title: str = "Reconstruction",
    about: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """Returns the page: table, rate-distortion plots, originals with reconstructions and token maps, protocol.

    Args:
        report: what was measured.
        title: heading of the page.
        about: paragraphs below the heading.
        facts: a short table below them, such as what was trained for how long.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    check_packages()
    from jinja2 import Environment, StrictUndefined

    heads, lines = report.cells()
    text = files("mergevq.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(text).render(
        title=title,
        about=about,
        facts=facts or {},
        summary=report.summary(),
        heads=heads,
        lines=lines,
        notes=report.notes,
        plot=_data_uri(rate_distortion_plot(report), "svg+xml"),
        counts=_shown_counts(report),
        examples=[_pictures(example, report) for example in report.examples],
        protocol={name: _readable(value) for name, value in report.protocol.items()},
        json=json.dumps(report.to_json(), indent=1),
    )


def rate_distortion_plot(report: ReconstructionReport) -> bytes:
    """Returns an SVG picture: bits per image against PSNR, perceptual distance and Fréchet distance, where measured.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    check_packages()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    perceptual = f"perceptual distance ({report.perceptual_name()})"
    measured: list[tuple[str, list[float | None], float | None]] = [
        ("PSNR in dB", [row.psnr.mean for row in report.rows], None),
        ("SSIM", [None if row.ssim is None else row.ssim.mean for row in report.rows], None),
        (perceptual, [row.perceptual for row in report.rows], None),
        (
            report.distance_names()[0],
            [row.frechet for row in report.rows],
            None if report.reference is None else report.reference.frechet,
        ),
    ]
    curves: list[tuple[str, list[float], float | None]] = []
    for name, column, reference in measured:
        values = [value for value in column if value is not None and math.isfinite(value)]
        if len(values) == len(column):
            curves.append((name, values, reference))
    # A salt of our own and no date: the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "mergevq", "font.size": 9, "axes.edgecolor": _FAINT, "axes.linewidth": 0.8}):
        figure = Figure(figsize=(3.4 * len(curves), 2.9), layout="constrained")
        for axes, (name, values, reference) in zip(
            figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True
        ):
            bits = [row.bits for row in report.rows]
            axes.plot(bits, values, "o-", color=_INK, markersize=4, linewidth=1.4)
            falling = values[0] < values[-1]  # The rows begin with the largest K.
            for x, y, row in zip(bits, values, report.rows, strict=True):
                offset = (4, 4) if falling else (4, -10)
                axes.annotate(
                    f"K {row.num_tokens}", (x, y), offset, textcoords="offset points", fontsize=7, color=_FAINT
                )
            if reference is not None:
                axes.axhline(reference, color=_FAINT, linestyle="--", linewidth=0.8)
                axes.annotate(
                    "two halves of the originals",
                    (min(bits), reference),
                    (0, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("bits per image")
            axes.margins(x=0.15, y=0.2)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


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
    counts = _shown_counts(report) if num_tokens is None else list(num_tokens)
    bits = {row.num_tokens: row.bits for row in report.rows}
    merged = _merged(counts, report)
    titles = ["original"]
    for k in counts:
        titles += [*([f"token map\nK = {k}"] if k in merged else []), f"K = {k}\n{bits[k]:,.0f} bits"]
    sheet = []
    for example in report.examples[:rows]:
        scale = max(1, -(-cell // example.original.shape[-1]))
        row = [example.original]
        for k in counts:
            if k in merged:
                row.append(draw_token_map(example.original, example.source_index[k], report.grid, scale=scale))
            row.append(example.reconstruction[k])
        sheet.append(row)
    return contact_sheet(sheet, titles, cell=cell)


def _shown_counts(report: ReconstructionReport) -> list[int]:
    return list(report.examples[0].source_index) if report.examples else []


def _pictures(example: Example, report: ReconstructionReport) -> dict[str, Any]:
    scale = max(1, -(-_MAP_SIDE // example.original.shape[-1]))
    merged = _merged(_shown_counts(report), report)
    maps = {
        k: _png(to_pil(draw_token_map(example.original, example.source_index[k], report.grid, scale=scale)))
        for k in merged
    }
    return {
        "original": _photograph(to_pil(example.original)),
        "pairs": [(k, _photograph(to_pil(drawn)), maps.get(k)) for k, drawn in example.reconstruction.items()],
    }


def _merged(counts: Sequence[int], report: ReconstructionReport) -> set[int]:
    """The K whose token map is worth drawing; that of the others is the patch grid."""
    return {k for k in counts if k < report.grid[0] * report.grid[1]}


def _photograph(image: Image.Image) -> str:
    """As WebP, several times smaller than PNG, unless the image is so small that every pixel is seen."""
    if max(image.size) <= _EXACT_SIDE:
        return _png(image)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return _data_uri(buffer.getvalue(), "webp")


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _data_uri(buffer.getvalue(), "png")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_readable(entry)}" for name, entry in value.items())
    return "none" if value is None else str(value)
