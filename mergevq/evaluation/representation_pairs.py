"""Rows of probes beside what they have to beat, image by image."""

from collections.abc import Iterator, Mapping, Sequence

from mergevq.evaluation.feature_sources import FeatureSetting
from mergevq.evaluation.representation_result import PROBES, Pair, RepresentationRow


def pair_rows(rows: Sequence[RepresentationRow], hits: Sequence[Mapping[str, str]]) -> tuple[Pair, ...]:
    """Returns every row of the tokenizer beside each of its baselines, for each probe.

    Args:
        rows: of a result.
        hits: of each row, by probe: "1" for a test image whose first answer is right, else "0", in one order.
    """
    found = []
    for number, row in enumerate(rows):
        if row.setting.source != "tokenizer":
            continue
        for _, other in baselines(rows, number):
            for probe in PROBES:
                if probe in hits[number]:
                    both = list(zip(hits[number][probe], hits[other][probe], strict=True))
                    found.append(Pair(probe, number, other, both.count(("1", "0")), both.count(("0", "1"))))
    return tuple(found)


def baselines(rows: Sequence[RepresentationRow], number: int) -> Iterator[tuple[str, int]]:
    """Gives name and number of the rows that a row of the tokenizer is compared with.

    Args:
        rows: of a result.
        number: of the tokenizer's row.
    """
    for i, row in enumerate(rows):
        if row.setting.source == "random" and same_kind(row.setting, rows[number].setting):
            yield "random weights", i
        elif row.setting.source in ("pixels", "teacher"):
            yield row.setting.source, i


def same_kind(a: FeatureSetting, b: FeatureSetting) -> bool:
    """Returns whether features differ by their K and model at most."""
    return a.kind == b.kind and a.quantized == b.quantized
