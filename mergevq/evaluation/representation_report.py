"""The page and the pictures of probes: accuracies, features in two dimensions, mistakes, classes."""

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mergevq.errors import ShapeError
from mergevq.evaluation.page import FAINT, INK, OTHER, check_packages, data_uri, render_page
from mergevq.evaluation.representation_result import ProbeScore, RepresentationReport, RepresentationRow

_COLOURS = (INK, OTHER, "#3a7d44", "#7b4ea3", "#b03a48", "#5a6570")
_MOST_ROWS = 20  # Drawn as points.
_NAMED_CLASSES = 20  # With a legend, and numbers in the confusion matrix.
_LISTED_CLASSES = 30  # With a bar of their own.


def render_representation(
    report: RepresentationReport,
    *,
    title: str = "Representation",
    about: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> str:
    """Returns the page: table, accuracies, features in two dimensions, mistakes and classes of the best row, protocol.

    Args:
        report: what was measured.
        title: heading of the page.
        about: paragraphs below the heading.
        facts: a short table below them.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    return render_page(title=title, about=about, facts=facts, json_value=report.to_json(), **content(report))


def content(report: RepresentationReport, *, pictures: bool = True) -> dict[str, Any]:
    """Returns what a page or a section of it shows: arguments of `render_page` and `render_section`.

    Args:
        report: what was measured.
        pictures: draw them; otherwise there is the table alone.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    best = report.rows[report.chosen]
    probe, score = headline(best)
    scored, drawn = score is not None and pictures, bool(report.pictures) and pictures
    confused = score.confused if score is not None and pictures else ()
    curves = tokens_plot(report) if pictures else None
    return {
        "template": "representation.html.j2",
        "summary": report.summary(),
        "table": report.cells(),
        "notes": report.notes,
        "protocol": report.protocol,
        "accuracies": data_uri(accuracy_plot(report), "svg+xml") if scored else None,
        "curves": None if curves is None else data_uri(curves, "svg+xml"),
        "projections": data_uri(projection_picture(report), "png") if drawn else None,
        "drawn_rows": _MOST_ROWS,
        "not_projected": [row.name for row in report.rows[_MOST_ROWS:]],
        "best": best.name,
        "probe": f"{probe[0].upper()}{probe[1:]}" if probe != "k-NN" else probe,
        "confusion": data_uri(confusion_picture(report), "png") if drawn and scored else None,
        "confused": [(report.classes[true], report.classes[answer], count) for true, answer, count in confused],
        "by_class": data_uri(class_plot(report), "svg+xml") if scored else None,
    }


def headline(row: RepresentationRow) -> tuple[str, ProbeScore | None]:
    """Returns which probe a row's pictures are of, the linear one or else k-NN, and its score; None without both."""
    if row.linear is not None:
        return "linear probe", row.linear.score
    return ("k-NN", row.knn.score) if row.knn is not None else ("none", None)


def accuracy_plot(report: RepresentationReport) -> bytes:
    """Returns an SVG picture: top-1 of every row, with its interval, a chart for each probe.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    charts = _scores(report)
    names = [row.name for row in report.rows]
    colours = [_colour(row) for row in report.rows]
    with _figure(3 + 3.6 * len(charts), 1.1 + 0.28 * len(names)) as figure:
        axes = figure.subplots(1, len(charts), sharey=True, squeeze=False)[0]
        for axis, (title, scores) in zip(axes, charts.items(), strict=True):
            top = [100 * score.top1 for score in scores]
            ends = np.array([score.top1_interval for score in scores]).T * 100
            axis.barh(names, top, color=colours, height=0.7)
            axis.errorbar(
                top, range(len(names)), xerr=np.abs(ends - top), fmt="none", ecolor="#1d2430", elinewidth=0.8, capsize=2
            )
            axis.axvline(100 * report.reference["majority_top1"], color=FAINT, linestyle="--", linewidth=0.8)
            axis.set_title(f"{title}, top-1 in %", fontsize=9)
            axis.set_xlim(0, min(100, float(ends.max()) * 1.1))
            axis.invert_yaxis() if axis is axes[0] else None
            axis.grid(axis="x", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        return _saved(figure, "svg")


def tokens_plot(report: RepresentationReport) -> bytes | None:
    """Returns an SVG picture: K against top-1, a line for each kind of features; None for fewer than two K.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    own = [(row, i) for i, row in enumerate(report.rows) if row.setting.source == "tokenizer"]
    counts = sorted({row.setting.num_tokens for row, _ in own if row.setting.num_tokens is not None})
    charts = _scores(report)
    if len(counts) < 2 or not charts:
        return None
    with _figure(4.2 * len(charts), 3.2) as figure:
        for axis, (title, scores) in zip(
            figure.subplots(1, len(charts), squeeze=False)[0], charts.items(), strict=True
        ):
            lines: dict[str, list[tuple[int, float]]] = {}
            for row, i in own:
                kind = row.name.rpartition(", K = ")[0]
                lines.setdefault(kind, []).append((row.setting.num_tokens or 0, 100 * scores[i].top1))
            for (kind, points), colour in zip(lines.items(), _COLOURS, strict=False):
                axis.plot(
                    *zip(*sorted(points), strict=True), "o-", color=colour, markersize=4, linewidth=1.4, label=kind
                )
            for row, score in zip(report.rows, scores, strict=True):
                if row.setting.source in ("pixels", "teacher"):
                    axis.axhline(100 * score.top1, color=FAINT, linestyle="--", linewidth=0.8)
                    axis.annotate(
                        row.name, (counts[0], 100 * score.top1), (0, 2), textcoords="offset points", fontsize=7
                    )
            axis.set_xscale("log", base=2)
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
            axis.set_title(f"{title}, top-1 in %", fontsize=9)
            axis.set_xlabel("K, kept tokens")
            axis.margins(x=0.1, y=0.2)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(fontsize=7, frameon=False)
        return _saved(figure, "svg")


def projection_picture(report: RepresentationReport) -> bytes:
    """Returns a PNG picture: test images along the first two principal components, coloured by class, of each row.

    Of more than 20 rows the first 20 are drawn.

    Raises:
        ShapeError: the report holds no pictures.
        MissingDependencyError: matplotlib is not installed.
    """
    _check_drawn(report)
    rows = list(zip(report.rows, report.pictures, strict=True))[:_MOST_ROWS]
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    named = len(report.classes) <= _NAMED_CLASSES
    with _figure(2.7 * columns, 2.7 * lines + 0.5 * named) as figure:
        from matplotlib import colormaps

        palette = colormaps["tab20" if named else "hsv"]
        shades = palette(np.arange(len(report.classes)) if named else np.linspace(0, 1, len(report.classes), False))
        places = figure.subplots(lines, columns, squeeze=False).flatten()
        for axis in places[len(rows) :]:
            axis.set_visible(False)
        for axis, (row, picture) in zip(places, rows, strict=False):
            x, y = picture.projection.numpy().T
            axis.scatter(x, y, s=5 if len(x) > 500 else 12, c=shades[picture.labels.numpy()], linewidths=0, alpha=0.8)
            axis.set_title(textwrap.fill(row.name, 40), fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_xlabel(
                " and ".join(f"{share:.0%}" for share in picture.explained) + " of the variance", fontsize=6
            )
        if named:
            marks = [
                places[0].scatter([], [], s=14, color=shade, label=name)
                for shade, name in zip(shades, report.classes, strict=True)
            ]
            figure.legend(marks, report.classes, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
        return _saved(figure, "png")


def confusion_picture(report: RepresentationReport, row: int | None = None) -> bytes:
    """Returns a PNG picture of what the images of each class were taken for; shares of the class.

    Args:
        report: what was measured.
        row: its number; None is the chosen one.

    Raises:
        ShapeError: the report holds no pictures, or neither k-NN nor a linear probe was made.
        MissingDependencyError: matplotlib is not installed.
    """
    _check_drawn(report)
    counts = report.pictures[report.chosen if row is None else row].confusion.numpy()
    if not counts.size:
        raise ShapeError("expected a report with k-NN or a linear probe, got none: evaluate with one of them")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = len(counts) <= _NAMED_CLASSES
    side = 2.2 + 0.36 * len(counts) if named else 6.0
    with _figure(side, side) as figure:
        axis = figure.subplots()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_xlabel("answer")
        axis.set_ylabel("class")
        if named:
            places = range(len(counts))
            axis.set_xticks(places, report.classes, rotation=90, fontsize=7)
            axis.set_yticks(places, report.classes, fontsize=7)
            for i, j in zip(*np.nonzero(counts), strict=True):
                colour = "white" if shares[i, j] > 0.5 else "#1d2430"
                axis.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color=colour)
        return _saved(figure, "png")


def class_plot(report: RepresentationReport) -> bytes:
    """Returns an SVG picture: accuracy of the classes in the chosen row, the best first, beside that of pixels.

    Of many classes the best and the worst are drawn.

    Raises:
        ShapeError: neither k-NN nor a linear probe was made.
        MissingDependencyError: matplotlib is not installed.
    """
    _, score = headline(report.rows[report.chosen])
    if score is None:
        raise ShapeError("expected a report with k-NN or a linear probe, got none: evaluate with one of them")
    order = sorted(range(len(report.classes)), key=lambda i: (-(score.per_class[i] or 0.0), i))
    if len(order) > _LISTED_CLASSES:
        order = order[: _LISTED_CLASSES // 2] + order[-(_LISTED_CLASSES // 2) :]
    pixels = next((headline(row)[1] for row in report.rows if row.setting.source == "pixels"), None)
    with _figure(7.0, 0.8 + 0.24 * len(order)) as figure:
        axis = figure.subplots()
        axis.barh(range(len(order)), [100 * (score.per_class[i] or 0.0) for i in order], color=INK, height=0.65)
        if pixels is not None:
            shares = [100 * (pixels.per_class[i] or 0.0) for i in order]
            axis.plot(shares, range(len(order)), "|", color=OTHER, markersize=9, markeredgewidth=2, label="pixels")
            axis.legend(fontsize=7, frameon=False, loc="lower right")
        axis.set_yticks(range(len(order)), [report.classes[i] for i in order], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_xlabel("right first answers in %")
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        return _saved(figure, "svg")


# ---------------------------------------------------------------------------------------------------------- details


def _scores(report: RepresentationReport) -> dict[str, list[ProbeScore]]:
    """Scores of all rows, by probe."""
    found = {
        "k-NN": [row.knn.score for row in report.rows if row.knn is not None],
        "linear probe": [row.linear.score for row in report.rows if row.linear is not None],
    }
    return {title: scores for title, scores in found.items() if scores}


def _colour(row: RepresentationRow) -> str:
    return {"tokenizer": INK, "teacher": OTHER}.get(row.setting.source, FAINT)


def _check_drawn(report: RepresentationReport) -> None:
    if not report.pictures:
        raise ShapeError("expected a report with pictures to draw, got one read from JSON: evaluate again")


@contextmanager
def _figure(width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches in our look."""
    check_packages()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A salt of our own and, below, no date: the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "mergevq", "font.size": 9, "axes.edgecolor": FAINT, "axes.linewidth": 0.8}):
        yield Figure(figsize=(width, height), layout="constrained", dpi=110)


def _saved(figure: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()
