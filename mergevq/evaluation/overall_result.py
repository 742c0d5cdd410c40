"""The result of evaluating everything: the parts' results, one table of them, JSON, HTML, a card."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergevq.errors import ShapeError
from mergevq.evaluation.generation_result import GenerationReport
from mergevq.evaluation.kept_parts import RESULTS, Part
from mergevq.evaluation.overall_images import known_images_note
from mergevq.evaluation.overall_notes import generation_note, missing_notes, reconstruction_note, representation_note
from mergevq.evaluation.overall_summary import Line, generation_lines, reconstruction_lines, representation_lines
from mergevq.evaluation.page import readable
from mergevq.evaluation.representation_result import RepresentationReport
from mergevq.evaluation.result import ReconstructionReport
from mergevq.evaluation.sanity_result import SanityReport
from mergevq.evaluation.schema import reading

SCHEMA = "mergevq.evaluation/2"


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Result of `evaluate_all`. `print(report)` shows a table.

    Of several processes the first has the pages; the numbers are the same on all.
    """

    parts: Mapping[str, Part]
    """By name: "reconstruction", "generation", "representation", "sanity"."""
    missing: Mapping[str, str]
    """Parts that were left out, and why."""
    protocol: dict[str, Any]
    """What all parts have in common of how they were measured; each part has its own besides."""
    command: str
    """What makes this result again."""

    @cached_property
    def reconstruction(self) -> ReconstructionReport | None:
        """The part's report, without examples; None if it was left out."""
        part = self.parts.get("reconstruction")
        return None if part is None else ReconstructionReport.from_json(part.result, "reconstruction")

    @cached_property
    def generation(self) -> GenerationReport | None:
        """The part's report, without samples; None if it was left out."""
        part = self.parts.get("generation")
        return None if part is None else GenerationReport.from_json(part.result, "generation")

    @cached_property
    def representation(self) -> RepresentationReport | None:
        """The part's report, without pictures; None if it was left out."""
        part = self.parts.get("representation")
        return None if part is None else RepresentationReport.from_json(part.result, "representation")

    @cached_property
    def sanity(self) -> SanityReport | None:
        """What the metrics say of the originals; None if it was left out."""
        part = self.parts.get("sanity")
        return None if part is None else SanityReport.from_json(part.result, "sanity")

    def lines(self) -> list[Line]:
        """Returns the few numbers that matter of each part."""
        found: list[Line] = []
        if self.reconstruction is not None:
            found += reconstruction_lines(self.reconstruction, self.sanity)
        if self.generation is not None:
            found += generation_lines(self.generation)
        if self.representation is not None:
            found += representation_lines(self.representation)
        return found

    def notes(self) -> list[str]:
        """Returns what the numbers say, in sentences, and what was left out."""
        told: list[str | None] = [known_images_note(self.protocol)]
        if self.reconstruction is not None:
            told.append(reconstruction_note(self.reconstruction, self.sanity))
        if self.generation is not None:
            told.append(generation_note(self.generation))
        if self.representation is not None:
            told.append(representation_note(self.representation))
        return [*filter(None, told), *missing_notes(dict(self.missing))]

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the pictures, as JSON values under a schema version."""
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "summary": [line.to_json() for line in self.lines()],
            "notes": self.notes(),
            "parts": {name: part.result for name, part in self.parts.items()},
            "missing": dict(self.missing),
            "command": self.command,
        }

    @staticmethod
    def from_json(value: Any, source: str = "the result") -> "EvaluationReport":
        """Returns the report that became these JSON values, without its pictures.

        Args:
            value: from `to_json`.
            source: what to call it in messages: its file.

        Raises:
            CheckpointError: it is no such result, or one of another version; so is a part of it.
        """
        with reading(value, SCHEMA, source) as found:
            parts = {name: Part(result, _no_section) for name, result in found["parts"].items()}
            report = EvaluationReport(parts, found["missing"], found["protocol"], found["command"])
            report.lines()  # Reads every part.
            return report

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Returns the heading and the lines of the table; each part begins with a line of its own."""
        lines = self.lines()
        counts = sorted({k for line in lines for k in line.values}, reverse=True)
        written: list[list[str]] = []
        for line, before in zip(lines, [None, *lines], strict=False):
            if before is None or before.part != line.part:
                written.append([self.part_title(line.part), *[""] * (len(counts) + 1)])
            written.append(line.cells(counts))
        return ["", *(f"K = {k}" for k in counts), "to compare with"], written

    def part_title(self, name: str) -> str:
        """Returns a part's name with the most important of its settings."""
        if name == "reconstruction" and self.reconstruction is not None:
            return f"Reconstruction of {self.reconstruction.protocol['images']:,} images"
        if name == "generation" and self.generation is not None:
            head = self.generation.heads()[self.generation.best or 0]
            return f"Generation of {self.generation.protocol['images']:,} images, {head}"
        if name == "representation" and self.representation is not None:
            return f"Representation, {len(self.representation.classes)} classes"
        return name.capitalize()

    def summary(self) -> str:
        """Returns what was measured, in one line."""
        size, tok = self.protocol["image_size"], self.protocol["tokenizer"]
        return f"{tok['name']} ({tok['fingerprint'][:12]}) on {self.protocol['data']}, {size} x {size} pixels"

    def table(self) -> Table:
        """Returns the few numbers that matter, for a terminal."""
        # Text, because a folder's name may look like markup.
        title, caption = Text(self.summary()), Text("\n".join([_ARROWS, *self.notes()]))
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        heads, lines = self.cells()
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if 0 < i < len(heads) - 1 else "left")
        for line in lines:
            group = not any(line[1:])
            table.add_row(*line, style="bold" if group else None)
        return table

    def write(self, folder: str | Path) -> tuple[Path, ...]:
        """Writes evaluation.json, report.html and card.md, and returns their paths.

        Raises:
            MissingDependencyError: matplotlib or jinja2 is not installed.
            ShapeError: the report was read from JSON and has no pictures.
            WriteError: a file cannot be written.
        """
        from mergevq.files import atomic_write, write_json

        paths = tuple(Path(folder) / name for name in RESULTS)
        write_json(paths[0], self.to_json())
        self.write_html(paths[1])
        atomic_write(paths[2], self.card().encode())
        return paths

    def write_html(self, path: str | Path, **options: Any) -> None:
        """Writes one self-contained page; see `mergevq.evaluation.overall_report.render_overall`.

        Raises:
            MissingDependencyError: matplotlib or jinja2 is not installed.
            ShapeError: the report was read from JSON and has no pictures.
            WriteError: the file cannot be written.
        """
        from mergevq.evaluation.overall_report import render_overall
        from mergevq.files import atomic_write

        atomic_write(path, render_overall(self, **options).encode())

    def card(self) -> str:
        """Returns a fragment of a model card, Markdown: table, what it says, protocol, and how to make it again."""
        heads, lines = self.cells()
        rows = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 2)}---|"]
        for line in lines:
            cells = [f"**{line[0]}**", *line[1:]] if not any(line[1:]) else line
            rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        protocol = {name.replace("_", " "): readable(value) for name, value in self.protocol.items()}
        return "\n".join(
            [
                "## Evaluation",
                "",
                *rows,
                "",
                _ARROWS,
                "",
                *(f"- {note}" for note in self.notes()),
                "",
                "How it was measured: " + "; ".join(f"{name}: {value}" for name, value in protocol.items()) + ".",
                "",
                "To measure it again:",
                "",
                "```",
                self.command,
                "```",
                "",
            ]
        )

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


_ARROWS = "↑ higher is better, ↓ lower is better. K is the number of kept tokens of an image."


def _no_section() -> str:
    raise ShapeError("expected a report with pictures to draw, got one read from JSON: evaluate again")
