"""The result of measuring the metrics: what they say of images whose quality is known."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mergevq.evaluation.schema import reading

SCHEMA = "mergevq.sanity/1"

ROWS = ("identical", "shuffled", "blurred", "noised", "halves")
"""What the originals are compared with, in this order."""


@dataclass(frozen=True)
class SanityRow:
    """What the metrics say of one set of images. None was not measured, or has no meaning there."""

    name: str
    """One of `ROWS`."""
    images: int
    """On either side."""
    psnr: float | None = None
    """Mean over images without perfect copies, in decibels; infinite if all are."""
    ssim: float | None = None
    perceptual: float | None = None
    frechet: float | None = None
    kernel: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    psnr_perfect: int = 0
    """Images that are equal to their originals."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "SanityRow":
        """Returns the row that became these JSON values; JSON has no word for the infinite PSNR of copies."""
        infinite = value["psnr"] is None and value["name"] != "halves"
        return SanityRow(**{**value, "psnr": math.inf if infinite else value["psnr"]})


@dataclass(frozen=True)
class SanityReport:
    """Result of `evaluate_sanity`. `print(report)` shows a table."""

    rows: tuple[SanityRow, ...]
    """In the order of `ROWS`; with fewer than four images without the halves."""
    protocol: dict[str, Any]
    """How it was measured."""
    notes: tuple[str, ...]
    """How to read the numbers, and why something was not measured."""

    def row(self, name: str) -> SanityRow | None:
        """Returns the row of this name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def title(self, name: str) -> str:
        """Returns what to call a row."""
        blur, noise = self.protocol["blur_sigma"], self.protocol["noise_sigma"]
        return {
            "identical": "identical",
            "shuffled": "shuffled: other images of the set",
            "blurred": f"blurred, sigma {blur:g} {'pixel' if blur == 1 else 'pixels'}",
            "noised": f"noised, sigma {noise:g} of 255",
            "halves": "one half against the other",
        }[name]

    def distance_names(self) -> tuple[str, str]:
        """Returns what to call the Fréchet and the kernel distance: FID and KID are those on Inception only."""
        network = self.protocol["network"]
        name = "none" if network is None else network["name"]
        return ("FID", "KID") if name == "inception" else (f"FD-{name}", f"KD-{name}")

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values under a schema version."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            row["psnr"] = row["psnr"] if row["psnr"] is None or math.isfinite(row["psnr"]) else None
        return {"schema": SCHEMA, "protocol": self.protocol, "rows": rows, "notes": list(self.notes)}

    @staticmethod
    def from_json(value: Any, source: str = "the result") -> "SanityReport":
        """Returns the report that became these JSON values.

        Args:
            value: from `to_json`.
            source: what to call it in messages: its file.

        Raises:
            CheckpointError: it is no such result, or one of another version.
        """
        with reading(value, SCHEMA, source) as found:
            rows = tuple(map(SanityRow.from_json, found["rows"]))
            return SanityReport(rows, found["protocol"], tuple(found["notes"]))

    def table(self) -> Table:
        """Returns a line for each set of images, for a terminal."""
        title, caption = Text(self.summary()), Text("\n".join(self.notes))
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        heads, lines = self.cells()
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left")
        for line in lines:
            table.add_row(*line)
        return table

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Returns the heading and the lines of a table; what was not measured has no column."""
        frechet, kernel = self.distance_names()
        perceptual, network = self.protocol["perceptual"], self.protocol["network"]
        columns = [
            ("PSNR in dB", [_cell(row.psnr, ".2f") for row in self.rows]),
            ("SSIM", [_cell(row.ssim, ".3f") for row in self.rows]),
            (
                f"perceptual ({perceptual['name'] if perceptual else ''})",
                [_cell(r.perceptual, ".4g") for r in self.rows],
            ),
            (frechet, [_cell(row.frechet, ".4g") for row in self.rows]),
            (kernel, [_cell(row.kernel, ".3g") for row in self.rows]),
            (
                f"inception score ({network['name'] if network else ''})",
                [_cell(row.inception_score, ".4g") for row in self.rows],
            ),
            ("precision", [_cell(row.precision, ".3f") for row in self.rows]),
            ("recall", [_cell(row.recall, ".3f") for row in self.rows]),
        ]
        kept = [(head, cells) for head, cells in columns if any(cells)]
        lines = [[self.title(row.name), *(cells[i] for _, cells in kept)] for i, row in enumerate(self.rows)]
        return ["originals against", *(head for head, _ in kept)], lines

    def summary(self) -> str:
        """Returns what was measured, in one line."""
        size = self.protocol["image_size"]
        return f"The metrics on {self.protocol['images']:,} images of {self.protocol['data']}, {size} x {size} pixels"

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def _cell(value: float | None, form: str) -> str:
    # Adding 0 turns the -0 of round-off into 0.
    return "" if value is None else "∞" if math.isinf(value) else format(_tidy(value), form)


def _tidy(value: float) -> float:
    """A distance of copies is 0 up to round-off, which nobody wants to read."""
    return 0.0 if abs(value) < 1e-9 else value
