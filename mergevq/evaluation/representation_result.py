"""The result of measuring representation: numbers with how they came about, as a value, a table, JSON and HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mergevq.evaluation.feature_sources import FeatureSetting
from mergevq.evaluation.schema import reading
from mergevq.metrics.few_shot import FewShot
from mergevq.metrics.linear_probe import Tried

SCHEMA = "mergevq.representation/1"

MOST_CONFUSION = 20
"""Classes up to which the whole confusion matrix is in the JSON."""

Probe = Literal["linear", "knn"]
"""A probe whose settings, and whose row, may be chosen on held-out training images."""

PROBES: dict[Probe, str] = {"linear": "linear probe", "knn": "k-NN"}
"""What to call them."""


@dataclass(frozen=True)
class ProbeScore:
    """How often a probe is right on the test images."""

    top1: float
    top1_interval: tuple[float, float]
    """95 % Wilson interval, by the number of test images alone."""
    top5: float | None
    """None with five classes or fewer."""
    mean_class: float
    """Mean of the classes' own accuracies."""
    per_class: tuple[float | None, ...]
    confused: tuple[tuple[int, int, int], ...]
    """The most frequent mistakes: true class, answer, test images."""
    confusion: tuple[tuple[int, ...], ...] | None
    """Test images of class (row) with first answer (column); None with more classes than `MOST_CONFUSION`."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "ProbeScore":
        """Returns the score that became these JSON values."""
        lists = {name: tuple(value[name]) for name in ("top1_interval", "per_class")}
        lists |= {name: tuple(map(tuple, value[name] or ())) for name in ("confused", "confusion")}
        return ProbeScore(**{**value, **lists, "confusion": lists["confusion"] or None})


@dataclass(frozen=True)
class KnnTried:
    """One k."""

    k: int
    held_out_top1: float | None
    """On the held-out training images; None if nothing had to be chosen."""
    top1: float
    """On the test images."""
    top5: float | None


@dataclass(frozen=True)
class KnnResult:
    """Weighted k-nearest neighbours."""

    score: ProbeScore
    """With the chosen k."""
    k: int
    """The best on the held-out training images."""
    tried: tuple[KnnTried, ...]
    held_out: int = 0
    """Training images that it was chosen on; 0 if nothing had to be chosen."""


@dataclass(frozen=True)
class LinearResult:
    """A linear probe."""

    score: ProbeScore
    """With the chosen settings, trained on all training images."""
    learning_rate: float | None
    """The best on the held-out training images; None for lbfgs."""
    weight_decay: float
    held_out: int
    """Training images that it was chosen on; 0 if nothing had to be chosen."""
    tried: tuple[Tried, ...]


@dataclass(frozen=True)
class RepresentationRow:
    """What was measured on one kind of features. None was not asked for."""

    setting: FeatureSetting
    name: str
    width: int
    """D, numbers of an image."""
    knn: KnnResult | None
    linear: LinearResult | None
    few_shot: tuple[FewShot, ...] | None

    def found(self, probe: Probe) -> KnnResult | LinearResult | None:
        """Returns what a probe found; None if it was not made."""
        return self.linear if probe == "linear" else self.knn

    def held_out_score(self, probe: Probe) -> tuple[float, float] | None:
        """Returns how good a probe was on the held-out training images, which rows are chosen by: the best share of
        right answers, and what it cost, the loss with its sign turned (0 of k-NN, which has none). None without them.
        """
        if probe == "linear":
            linear = self.linear.tried if self.linear is not None else ()
            known = [(each.top1, -(each.loss or 0.0)) for each in linear if each.top1 is not None]
        else:
            knn = self.knn.tried if self.knn is not None else ()
            known = [(each.held_out_top1, 0.0) for each in knn if each.held_out_top1 is not None]
        return max(known, default=None)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RepresentationRow":
        """Returns the row that became these JSON values."""
        knn, linear, few = value["knn"], value["linear"], value["few_shot"]
        parts: dict[str, Any] = {"setting": FeatureSetting(**value["setting"])}
        if knn is not None:
            tried = tuple(KnnTried(**entry) for entry in knn["tried"])
            parts["knn"] = KnnResult(**{**knn, "score": ProbeScore.from_json(knn["score"]), "tried": tried})
        if linear is not None:
            sweep = tuple(Tried(**entry) for entry in linear["tried"])
            parts["linear"] = LinearResult(**{**linear, "score": ProbeScore.from_json(linear["score"]), "tried": sweep})
        if few is not None:
            parts["few_shot"] = tuple(FewShot(**{**entry, "draws": tuple(entry["draws"])}) for entry in few)
        return RepresentationRow(**{**value, **parts})


@dataclass(frozen=True)
class Pair:
    """Two rows on the same test images: which of them is right where the other is wrong."""

    probe: Probe
    row: int
    """Number of a row of the tokenizer."""
    other: int
    """Number of a row to compare it with: random weights of the same kind, pixels, the teacher."""
    row_alone: int
    """Test images that only the first gets right."""
    other_alone: int
    """Test images that only the second gets right."""


@dataclass(frozen=True, eq=False)
class RowPictures:
    """What a row's pictures are drawn from."""

    projection: Float[Tensor, "m 2"]
    """Test images along the first principal components of their features."""
    explained: tuple[float, ...]
    """Share of the variance along each."""
    labels: Int[Tensor, " m"]
    """Their classes."""
    confusion: Int[Tensor, "C C"]
    """Of the linear probe, or of k-NN where there is none: true classes by answers."""


@dataclass(frozen=True, eq=False)
class RepresentationReport:
    """Result of `evaluate_representation`. `print(report)` shows a table.

    Of several processes all have the same numbers and pictures.
    """

    rows: tuple[RepresentationRow, ...]
    """The tokenizer's first, then those of the baselines."""
    classes: tuple[str, ...]
    reference: dict[str, float]
    """What needs no features: "majority_top1" and "majority_top5", accuracy of always answering the most frequent
    training classes; "chance_top1" and "chance_top5", of answering at random."""
    protocol: dict[str, Any]
    """How it was measured: data, images, models with fingerprints, preparation, probes with their sweeps, seeds."""
    notes: tuple[str, ...]
    """How to read the numbers, and why something was not measured."""
    seconds: dict[str, float]
    """Spent on features and on probes; the only numbers that differ between two runs."""
    pictures: tuple[RowPictures, ...] = ()
    """Of each row."""
    pairs: tuple[Pair, ...] = ()
    """Rows of the tokenizer beside what they have to beat; results of the first versions have none."""

    def best(self, probe: Probe) -> int:
        """Returns the number of the tokenizer's row that does best on held-out training images by a probe.

        Of equals the one with the least held-out loss, then the one of fewest numbers an image, then the first. Where
        nothing was held out for this probe, the other one decides; where nothing was for either, it is the first row.

        Args:
            probe: "linear" or "knn"; need not have been made.
        """
        own = [i for i, row in enumerate(self.rows) if row.setting.source == "tokenizer"]
        both: tuple[Probe, ...] = ("linear", "knn") if probe == "linear" else ("knn", "linear")
        for each in both:
            scores = {i: score for i in own if (score := self.rows[i].held_out_score(each)) is not None}
            if scores:
                return max(scores, key=lambda i: (scores[i], -self.rows[i].width, -i))
        return own[0]

    @property
    def chosen(self) -> int:
        """Number of the row whose pictures are shown: the best by the linear probe, or by k-NN without one."""
        return self.best("linear")

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the pictures, as JSON values under a schema version."""
        return {
            "schema": SCHEMA,
            "protocol": self.protocol,
            "classes": list(self.classes),
            "rows": [asdict(row) for row in self.rows],
            "chosen": self.chosen,
            "reference": self.reference,
            "pairs": [asdict(pair) for pair in self.pairs],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    @staticmethod
    def from_json(value: Any, source: str = "the result") -> "RepresentationReport":
        """Returns the report that became these JSON values, without its pictures.

        Args:
            value: from `to_json`.
            source: what to call it in messages: its file.

        Raises:
            CheckpointError: it is no such result, or one of another version.
        """
        with reading(value, SCHEMA, source) as found:
            return RepresentationReport(
                rows=tuple(map(RepresentationRow.from_json, found["rows"])),
                classes=tuple(found["classes"]),
                reference=found["reference"],
                protocol=found["protocol"],
                notes=tuple(found["notes"]),
                seconds=found["seconds"],
                pairs=tuple(Pair(**pair) for pair in found.get("pairs", ())),
            )

    def table(self) -> Table:
        """Returns a line for each kind of features, for a terminal: accuracies and k, not the other settings."""
        # Text, because a folder's name may look like markup.
        title, caption = Text(self.summary()), Text("\n".join(self.notes))
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        heads, lines = self.cells()
        shown = [i for i, head in enumerate(heads) if head not in ("width", "rate", "decay")]
        for i in shown:
            table.add_column(heads[i], justify="right" if i else "left")
        for line in lines:
            table.add_row(*(line[i] for i in shown))
        return table

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Returns the heading and the lines of a table; what was not measured has no column."""
        columns: list[tuple[str, list[str], str]] = [("width", [str(row.width) for row in self.rows], "")]
        knn = [row.knn for row in self.rows if row.knn is not None]
        linear = [row.linear for row in self.rows if row.linear is not None]
        if knn:
            columns += _accuracies("k-NN", [found.score for found in knn])
            columns.append(("k", [str(found.k) for found in knn], ""))
        if linear:
            columns += _accuracies("linear", [found.score for found in linear])
            rates = [found.learning_rate for found in linear]
            if rates[0] is not None:
                columns.append(("rate", [f"{rate:g}" for rate in rates], ""))
            if len({tried.weight_decay for tried in linear[0].tried}) > 1:
                columns.append(("decay", [f"{found.weight_decay:g}" for found in linear], ""))
        few = [row.few_shot for row in self.rows if row.few_shot is not None]
        for i, first in enumerate(few[0] if few else ()):
            columns.append((f"{first.shots}-shot", [_few(found[i]) for found in few], "top1"))
        lines = [[row.name, *(cells[i] for _, cells, _ in columns)] for i, row in enumerate(self.rows)]
        for name, key in (("always the most frequent class", "majority"), ("a class at random", "chance")):
            cells = [_percent(self.reference[f"{key}_{which}"]) if which else "" for _, _, which in columns]
            lines.append([name, *cells])
        return ["", *(head for head, _, _ in columns)], lines

    def summary(self) -> str:
        """Returns what was measured, in one line."""
        train, test = self.protocol["train"], self.protocol["test"]
        return (
            f"Probes of features, top-1 in %: {test['images']:,} test and {train['images']:,} training images of "
            f"{len(self.classes)} classes, {train['data']}"
        )

    def write_html(self, path: str | Path, **options: Any) -> None:
        """Writes one self-contained page; see `mergevq.evaluation.representation_report.render_representation`.

        Raises:
            MissingDependencyError: matplotlib or jinja2 is not installed.
            WriteError: the file cannot be written.
        """
        from mergevq.evaluation.representation_report import render_representation
        from mergevq.files import atomic_write

        atomic_write(path, render_representation(self, **options).encode())

    def with_notes(self, notes: Sequence[str]) -> "RepresentationReport":
        """Returns the report with these notes."""
        return replace(self, notes=tuple(notes))

    def __str__(self) -> str:
        console = Console(width=180)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _accuracies(title: str, scores: Sequence[ProbeScore]) -> list[tuple[str, list[str], str]]:
    """Columns of a probe, each with the part of the reference that belongs below it."""
    halves = [(score.top1_interval[1] - score.top1_interval[0]) / 2 for score in scores]
    first = [f"{_percent(score.top1)} ± {_percent(half)}" for score, half in zip(scores, halves, strict=True)]
    found = [(title, first, "top1")]
    if scores[0].top5 is not None:
        found.append(("top-5", [_percent(score.top5 or 0.0) for score in scores], "top5"))
    return found


def _few(few: FewShot) -> str:
    return _percent(few.top1) + ("" if few.half_width is None else f" ± {_percent(few.half_width)}")
