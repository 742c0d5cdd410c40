"""The result of measuring generation: numbers with how they came about, as a value, a table, JSON and HTML."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mergevq.evaluation.result import Spread
from mergevq.evaluation.schema import reading

SCHEMA = "mergevq.generation/1"


@dataclass(frozen=True)
class Setting:
    """What is generated with; everything else is the same in all rows."""

    guidance: float
    num_tokens: int
    """K that the generator is told."""
    cache: str | None = None
    """Of a generator in raster order: "merge" or "full"."""
    steps: int | None = None
    """Of one in random order: parallel steps; None is its own choice."""


@dataclass(frozen=True, eq=False)
class Neighbour:
    """The training image closest to a generated one."""

    name: str
    """Path in its data set."""
    distance: float
    image: Float[Tensor, "3 H W"]
    """In [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A generated image to look at."""

    number: int
    seed: int
    """Makes the same image again with the same setting."""
    label: int | None
    """Number of the class it was asked for; None without classes."""
    class_name: str | None
    image: Float[Tensor, "3 H W"]
    """In [-1, 1], rounded to bytes."""
    by_features: Neighbour | None = None
    """Euclidean distance of the features."""
    by_pixels: Neighbour | None = None
    """Root mean squared difference of the pixels, 0 to 255."""

    def title(self) -> str:
        """Returns what to write beside it: its class if it has one."""
        if self.label is None:
            return ""
        return self.class_name or f"class {self.label}"


@dataclass(frozen=True)
class GenerationRow:
    """What was measured in one setting. None was not measured; the notes say why."""

    setting: Setting
    frechet: float | None
    """Fréchet distance of the features of all generated and of all reference images."""
    kernel: float | None
    """Kernel distance (squared MMD, polynomial kernel, unbiased)."""
    inception_score: float | None
    """Of all generated images, without splits."""
    precision: float | None
    recall: float | None
    close_to_training: float | None
    """Share of generated images that are as close to a training image as few training images are to one another."""
    distinct_tokens: Spread
    """Different codebook indices in an image."""
    duplicate_rate: float
    """1 - distinct / generated tokens, mean over images."""
    cache_bytes: int
    """Most memory of keys and values of a batch."""
    cache_bytes_per_image: float
    """The same divided by the images of that batch; with guidance an image has two rows in the cache."""
    generate_per_second: float
    """Images, all processes together."""
    decode_per_second: float
    seconds: float
    """Generating and decoding all images; of several processes the longest."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "GenerationRow":
        """Returns the row that became these JSON values."""
        parts = {"setting": Setting(**value["setting"]), "distinct_tokens": Spread(**value["distinct_tokens"])}
        return GenerationRow(**{**value, **parts})


@dataclass(frozen=True)
class ReferenceRow:
    """The same measured on the reference: two random halves of it against each other. It says what numbers mean."""

    images: int
    """In each half."""
    frechet: float | None
    kernel: float | None
    inception_score: float | None
    """Of `inception_images` of the reference, drawn at random."""
    precision: float | None
    recall: float | None
    close_to_training: float | None
    """None if the reference images are the training images."""
    distinct_tokens: Mapping[int, Spread]
    """Different indices in a reference image that was encoded with K tokens, for each K."""
    inception_images: int | None = None
    """As many as were generated, or all if there are fewer; None of the first results, where it was all."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "ReferenceRow":
        """Returns the row that became these JSON values."""
        distinct = {int(k): Spread(**spread) for k, spread in value["distinct_tokens"].items()}
        return ReferenceRow(**{**value, "distinct_tokens": distinct})


@dataclass(frozen=True, eq=False)
class GenerationReport:
    """Result of `evaluate_generation`. `print(report)` shows a table.

    Of several processes the first has the samples; the numbers are the same on all.
    """

    rows: tuple[GenerationRow, ...]
    """One a setting."""
    reference: ReferenceRow
    protocol: dict[str, Any]
    """How it was measured: models, data and how many images, sampling, networks with checksums, hardware, versions."""
    notes: tuple[str, ...]
    """How to read the numbers, and why something was not measured."""
    samples: tuple[tuple[Sample, ...], ...] = ()
    """For each row, its first images."""

    @property
    def best(self) -> int | None:
        """Number of the row of least Fréchet distance; None if it was not measured."""
        distances = [(row.frechet, i) for i, row in enumerate(self.rows) if row.frechet is not None]
        return min(distances)[1] if distances else None

    def distance_names(self) -> tuple[str, str]:
        """Returns what to call the Fréchet and the kernel distance: gFID and gKID are those on Inception only."""
        network = self.network_name()
        return ("gFID", "gKID") if network == "inception" else (f"FD-{network}", f"KD-{network}")

    def network_name(self) -> str:
        """Returns the name of the feature network."""
        network = self.protocol["network"]
        return "none" if network is None else network["name"]

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the pictures, as JSON values under a schema version."""
        reference = asdict(self.reference)
        spreads = reference.pop("distinct_tokens").items()
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "rows": [asdict(row) for row in self.rows],
            "best": self.best,
            "reference": {**reference, "distinct_tokens": {str(k): spread for k, spread in spreads}},
            "notes": list(self.notes),
            "samples": [[_facts(sample) for sample in samples] for samples in self.samples],
        }

    @staticmethod
    def from_json(value: Any, source: str = "the result") -> "GenerationReport":
        """Returns the report that became these JSON values, without its samples.

        Args:
            value: from `to_json`.
            source: what to call it in messages: its file.

        Raises:
            CheckpointError: it is no such result, or one of another version.
        """
        with reading(value, SCHEMA, source) as found:
            return GenerationReport(
                rows=tuple(map(GenerationRow.from_json, found["rows"])),
                reference=ReferenceRow.from_json(found["reference"]),
                protocol=found["protocol"],
                notes=tuple(found["notes"]),
            )

    def heads(self, *, without_guidance: bool = False) -> list[str]:
        """Returns a name for each row: its guidance, and of its other settings those that not all rows share.

        Args:
            without_guidance: name the others only.
        """
        words = [_words(row.setting) for row in self.rows]
        wanted = [] if without_guidance else ["guidance"]
        wanted += [name for name in words[0] if name != "guidance" and len({word[name] for word in words}) > 1]
        return [", ".join(word[name] for name in wanted if word[name]) for word in words]

    def table(self) -> Table:
        """Returns a column for each row, and one for the reference, for a terminal."""
        # Text, because a folder's name may look like markup.
        title, caption = Text(self.summary()), Text("\n".join(self.notes))
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
        rows, real = self.rows, self.reference
        batch = min(self.protocol["batch_size"], self.protocol["images"])
        spreads = real.distinct_tokens.values()
        lines: list[tuple[str, list[str | None], str | None]] = [
            (frechet, [_number(row.frechet) for row in rows], _number(real.frechet)),
            (kernel, [_number(row.kernel) for row in rows], _number(real.kernel)),
            (
                f"inception score ({self.network_name()})",
                [_number(row.inception_score) for row in rows],
                _number(real.inception_score),
            ),
            ("precision", [_share(row.precision) for row in rows], _share(real.precision)),
            ("recall", [_share(row.recall) for row in rows], _share(real.recall)),
            ("close to training", [_share(row.close_to_training) for row in rows], _share(real.close_to_training)),
            (
                "distinct tokens an image",
                [_spread(row.distinct_tokens) for row in rows],
                " / ".join(map(_spread, spreads)) or None,
            ),
            ("duplicate rate", [_share(row.duplicate_rate) for row in rows], None),
            (f"cache, MiB for {batch} images", [f"{row.cache_bytes / 2**20:.4g}" for row in rows], None),
            ("cache, KiB an image", [f"{row.cache_bytes_per_image / 2**10:.4g}" for row in rows], None),
            ("generated images/s", [_rate(row.generate_per_second) for row in rows], None),
            ("decoded images/s", [_rate(row.decode_per_second) for row in rows], None),
            ("seconds", [f"{row.seconds:.1f}" for row in rows], None),
        ]
        best = self.best if len(rows) > 1 else None
        heads = [f"{head} (best)" if i == best else head for i, head in enumerate(self.heads())]
        kept = [[head, *(cell or "" for cell in cells), last or ""] for head, cells, last in lines if any(cells)]
        return ["", *heads, "reference"], kept

    def summary(self) -> str:
        """Returns what was measured, in one line."""
        size, reference = self.protocol["image_size"], self.protocol["reference"]
        return (
            f"Generation of {self.protocol['images']:,} images, {size} x {size} pixels, against "
            f"{reference['images']:,} images of {reference['data']}"
        )

    def write_html(self, path: str | Path, **options: Any) -> None:
        """Writes one self-contained page; see `mergevq.evaluation.generation_report.render_generation`.

        Raises:
            MissingDependencyError: matplotlib or jinja2 is not installed.
            WriteError: the file cannot be written.
        """
        from mergevq.evaluation.generation_report import render_generation
        from mergevq.files import atomic_write

        atomic_write(path, render_generation(self, **options).encode())

    def __str__(self) -> str:
        console = Console(width=max(80, 48 + 18 * len(self.rows)))
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def _words(setting: Setting) -> dict[str, str]:
    return {
        "guidance": f"guidance {setting.guidance:g}",
        "num_tokens": f"K = {setting.num_tokens}",
        "cache": "" if setting.cache is None else f"{setting.cache} cache",
        "steps": "" if setting.steps is None else f"{setting.steps} steps",
    }


def _facts(value: Any) -> dict[str, Any]:
    """The fields of a sample or a neighbour, without images."""
    facts = {field.name: getattr(value, field.name) for field in fields(value) if field.name != "image"}
    return {name: _facts(entry) if isinstance(entry, Neighbour) else entry for name, entry in facts.items()}


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _spread(value: Spread) -> str:
    return f"{value.mean:.1f} ± {value.std:.1f}"
