"""The page of everything: the few numbers that matter in front, then each part as its own page shows it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mergevq.evaluation import generation_report, report, representation_report
from mergevq.evaluation.page import Section, render_page, render_section
from mergevq.evaluation.sanity_result import SanityReport

if TYPE_CHECKING:
    from mergevq.evaluation.overall_result import EvaluationReport

_TITLES = {
    "sanity": "What the numbers mean",
    "reconstruction": "Reconstruction",
    "generation": "Generation",
    "representation": "Representation",
}
"""In the order of the page."""


def section(name: str, found: Any) -> str:
    """Returns the section of a part.

    Args:
        name: of the part.
        found: its report.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    content: dict[str, Callable[[Any], dict[str, Any]]] = {
        "reconstruction": report.content,
        "generation": generation_report.content,
        "representation": representation_report.content,
        "sanity": _sanity,
    }
    return render_section(**content[name](found))


def render_overall(
    found: "EvaluationReport",
    *,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> str:
    """Returns the page: summary, what the metrics say of known images, then the parts with their pictures, protocol.

    Args:
        found: what was measured.
        title: heading of the page; None names the tokenizer.
        facts: a short table below them.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
        ShapeError: the report was read from JSON and has no pictures.
    """
    shown = [name for name in _TITLES if name in found.parts]
    return render_page(
        "overall.html.j2",
        title=title or f"Evaluation of {found.protocol['tokenizer']['name']}",
        about=found.notes(),
        facts=facts,
        summary=found.summary(),
        table=found.cells(),
        notes=(),
        protocol=found.protocol,
        json_value=found.to_json(),
        sections=[Section(name, _TITLES[name], found.parts[name].section()) for name in shown],
        links=[(name, _TITLES[name]) for name in shown],
        command=found.command,
    )


def _sanity(found: SanityReport) -> dict[str, Any]:
    return {
        "template": "sanity.html.j2",
        "summary": found.summary(),
        "table": found.cells(),
        "notes": found.notes,
        "protocol": found.protocol,
    }
