"""The result of measuring reconstruction: numbers with how they came about, as a value, a table, JSON and HTML."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mergevq.evaluation.schema import reading

SCHEMA = "mergevq.reconstruction/1"


@dataclass(frozen=True)
class Spread:
    """A quantity measured on every image."""

    mean: float
    std: float
    """Standard deviation between images (population); 0 for one image."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "Spread":
        """Returns the spread that became these JSON values; JSON has no word for the infinite PSNR of copies."""
        mean, std = value["mean"], value["std"]
        return Spread(math.inf if mean is None else mean, math.nan if std is None else std)


@dataclass(frozen=True)
class PredictedSource:
    """What was measured at one K without the source map: recovery predicts it, and it costs no bits."""

    accuracy: float
    """Share of patches whose predicted token has the right index, mean over images."""
    psnr: Spread
    ssim: Spread | None
    perceptual: float | None
    frechet: float | None
    kernel: float | None
    psnr_perfect: int = 0
    """Images that came back without any error."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "PredictedSource":
        """Returns what became these JSON values."""
        return PredictedSource(**{**value, **_spreads(value)})


@dataclass(frozen=True)
class ReconstructionRow:
    """What was measured at one K."""

    num_tokens: int
    bits_index: float
    """Bits for an image's codebook indices, K * N."""
    bits_source: float
    """Bits for an image's source map, L * ceil(log2 K)."""
    psnr: Spread
    """Decibels, on images rounded to bytes, without perfect copies; if all are, infinite with a deviation of 0."""
    ssim: Spread | None
    """At most 1; None for images smaller than its window."""
    perceptual: float | None
    """Mean distance over images; None if no network was asked for."""
    frechet: float | None
    """Fréchet distance of the features of all originals and of all reconstructions; None if it was not measured."""
    kernel: float | None
    """Kernel distance (squared MMD, polynomial kernel, unbiased for pairs); None if it was not measured."""
    distinct_tokens: float
    """Different codebook indices in an image, mean over images."""
    codebook_used: int
    """Different codebook indices over all images."""
    codebook_size: int
    bit_balance: tuple[float, ...]
    """Share of tokens in which each bit is 1; bit 0 first."""
    encode_per_second: float
    """Images; the networks alone, without reading files."""
    decode_per_second: float
    predicted: PredictedSource | None = None
    """The same without the source map; None if it was not asked for."""
    psnr_perfect: int = 0
    """Images that came back without any error, whose PSNR is infinite."""
    codebook_perplexity: float | None = None
    """Size of an evenly used codebook of the same entropy; at most `codebook_used`."""

    @property
    def bits(self) -> float:
        """Bits for an image, indices and source map together, without file overhead."""
        return self.bits_index + self.bits_source

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "ReconstructionRow":
        """Returns the row that became these JSON values."""
        fields = {name: entry for name, entry in value.items() if name != "bits"}
        predicted = None if value["predicted"] is None else PredictedSource.from_json(value["predicted"])
        fields |= {"predicted": predicted, "bit_balance": tuple(value["bit_balance"])}
        return ReconstructionRow(**{**fields, **_spreads(value)})


@dataclass(frozen=True)
class Reference:
    """Distances between two random halves of the originals: different images of the same kind. It tells what a number
    means, and limits nothing: reconstructions are compared with their own originals, and copies have distances of 0.
    """

    frechet: float
    kernel: float
    images: int
    """In each half. The Fréchet distance grows as the number of images falls."""


@dataclass(frozen=True, eq=False)
class Example:
    """One image to look at, with values in [-1, 1] rounded to bytes."""

    original: Float[Tensor, "3 H W"]
    source_index: dict[int, Int[Tensor, " L"]]
    """For each K, the kept token of every patch."""
    reconstruction: dict[int, Float[Tensor, "3 H W"]]
    """For each K."""
    predicted_index: dict[int, Int[Tensor, " L"]] = field(default_factory=dict)
    """For each K below L, what recovery takes for the kept token of every patch; empty if it was not asked."""
    predicted: dict[int, Float[Tensor, "3 H W"]] = field(default_factory=dict)
    """For each of these K, what is decoded from that."""


@dataclass(frozen=True, eq=False)
class ReconstructionReport:
    """Result of `evaluate_reconstruction`. `print(report)` shows a table."""

    rows: tuple[ReconstructionRow, ...]
    """One a K, largest K first."""
    reference: Reference | None
    protocol: dict[str, Any]
    """How it was measured: data and how many images, sizes, rounding, networks with checksums, hardware, versions."""
    notes: tuple[str, ...]
    """Why something was not measured, or should not be trusted."""
    grid: tuple[int, int]
    examples: tuple[Example, ...] = ()

    def distance_names(self) -> tuple[str, str]:
        """Returns what to call the Fréchet and the kernel distance: rFID and rKID are those on Inception only."""
        network = _name(self.protocol["network"])
        return ("rFID", "rKID") if network == "inception" else (f"FD-{network}", f"KD-{network}")

    def perceptual_name(self) -> str:
        """Returns the name of the perceptual distance's network."""
        return _name(self.protocol["perceptual"])

    def all_notes(self) -> tuple[str, ...]:
        """Returns the notes, and what the rows themselves have to tell."""
        found = [(row.num_tokens, row.psnr_perfect) for row in self.rows if row.psnr_perfect]
        if not found:
            return self.notes
        told = ", ".join(f"{count:,} at K = {k}" for k, count in found)
        own = f"PSNR is a mean over the images that differ from their originals; perfect copies: {told}."
        return self.notes if own in self.notes else (*self.notes, own)

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the examples, as JSON values under a schema version."""
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "rows": [_finite({**asdict(row), "bits": row.bits}) for row in self.rows],
            "reference": None if self.reference is None else asdict(self.reference),
            "notes": list(self.all_notes()),
        }

    @staticmethod
    def from_json(value: Any, source: str = "the result") -> "ReconstructionReport":
        """Returns the report that became these JSON values, without its examples.

        Args:
            value: from `to_json`.
            source: what to call it in messages: its file.

        Raises:
            CheckpointError: it is no such result, or one of another version.
        """
        with reading(value, SCHEMA, source) as found:
            patches = math.isqrt(found["protocol"]["num_patches"])
            return ReconstructionReport(
                rows=tuple(map(ReconstructionRow.from_json, found["rows"])),
                reference=None if found["reference"] is None else Reference(**found["reference"]),
                protocol=found["protocol"],
                notes=tuple(found["notes"]),
                grid=(patches, patches),
            )

    def table(self) -> Table:
        """Returns a column for each K, for a terminal."""
        # Text, because a folder's name may look like markup.
        title, caption = Text(self.summary()), Text("\n".join(self.all_notes()))
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        heads, lines = self.cells()
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left")
        for line in lines:
            table.add_row(*line)
        return table

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Returns the heading and the lines of a table, one line a quantity; what was not measured has no line."""
        frechet, kernel = self.distance_names()
        size = f"{self.rows[0].codebook_size:,}"
        pairs: list[tuple[str, Callable[[ReconstructionRow | PredictedSource], str | None]]] = [
            ("PSNR in dB", lambda it: _spread(it.psnr, 2)),
            ("SSIM", lambda it: None if it.ssim is None else _spread(it.ssim, 3)),
            (f"perceptual ({self.perceptual_name()})", lambda it: _cell(it.perceptual)),
            (frechet, lambda it: _cell(it.frechet)),
            (kernel, lambda it: _cell(it.kernel)),
        ]
        quality: list[tuple[str, list[str | None]]] = []
        for head, cell in pairs:
            quality.append((head, [cell(row) for row in self.rows]))
            predicted = [None if row.predicted is None else cell(row.predicted) for row in self.rows]
            quality.append(("  with predicted source", predicted))
        accuracy = [None if row.predicted is None else f"{row.predicted.accuracy:.3f}" for row in self.rows]
        lines: list[tuple[str, list[str | None]]] = [
            ("bits per image", [f"{row.bits:,.0f}" for row in self.rows]),
            ("  for indices", [f"{row.bits_index:,.0f}" for row in self.rows]),
            ("  for the source map", [f"{row.bits_source:,.0f}" for row in self.rows]),
            *quality,
            ("source predicted right", accuracy),
            ("distinct indices an image", [f"{row.distinct_tokens:.1f}" for row in self.rows]),
            (f"indices used of {size}", [f"{row.codebook_used:,}" for row in self.rows]),
            ("  perplexity", [_count(row.codebook_perplexity) for row in self.rows]),
            ("share of ones in a bit", [_range(row.bit_balance) for row in self.rows]),
            ("encoded images/s", [f"{row.encode_per_second:.1f}" for row in self.rows]),
            ("decoded images/s", [f"{row.decode_per_second:.1f}" for row in self.rows]),
        ]
        kept = [(head, [cell or "" for cell in cells]) for head, cells in lines if any(cells)]
        return ["", *(f"K = {row.num_tokens}" for row in self.rows)], [[head, *cells] for head, cells in kept]

    def summary(self) -> str:
        """Returns what was measured, in one line."""
        size = self.protocol["image_size"]
        return f"Reconstruction of {self.protocol['images']} images, {size} x {size} pixels, {self.protocol['data']}"

    def write_html(self, path: str | Path, **options: Any) -> None:
        """Writes one self-contained page with numbers, plots and pictures; see `mergevq.evaluation.report.render_html`.

        Raises:
            MissingDependencyError: matplotlib or jinja2 is not installed.
            WriteError: the file cannot be written.
        """
        from mergevq.evaluation.report import render_html
        from mergevq.files import atomic_write

        atomic_write(path, render_html(self, **options).encode())

    def __str__(self) -> str:
        console = Console(width=max(80, 30 + 16 * len(self.rows)))
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def _spreads(value: Mapping[str, Any]) -> dict[str, Spread | None]:
    return {name: None if value[name] is None else Spread.from_json(value[name]) for name in ("psnr", "ssim")}


def _name(network: dict[str, str] | None) -> str:
    return "none" if network is None else network["name"]


def _spread(value: Spread, digits: int) -> str:
    return "∞" if math.isinf(value.mean) else f"{value.mean:.{digits}f} ± {value.std:.{digits}f}"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} – {max(values):.2f}"


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.1f}"


def _cell(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _finite(value: Any) -> Any:
    """Replaces what JSON has no word for by None: the infinite PSNR of a perfect copy, and its spread."""
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
