"""An evaluation in a few sentences: what its numbers say, and what was left out."""

from mergevq.evaluation.generation_result import GenerationReport
from mergevq.evaluation.overall_summary import format_number, probe_score
from mergevq.evaluation.representation_notes import shared_note
from mergevq.evaluation.representation_pairs import baselines
from mergevq.evaluation.representation_result import Probe, RepresentationReport
from mergevq.evaluation.result import ReconstructionReport
from mergevq.evaluation.sanity_result import SanityReport
from mergevq.metrics.paired import is_better


def reconstruction_note(report: ReconstructionReport, sanity: SanityReport | None) -> str:
    """Returns what reconstruction costs and loses, at the K in the middle."""
    row = report.rows[len(report.rows) // 2]
    side = report.protocol["image_size"]
    note = (
        f"At K = {row.num_tokens} an image takes {row.bits:,.0f} bits, {24 * side**2 / row.bits:.0f} times fewer than "
        f"its pixels, and comes back at {format_number(row.psnr.mean, '.1f')} dB"
    )
    blurred, noised = (sanity.row(name) if sanity else None for name in ("blurred", "noised"))
    if sanity is not None and blurred is not None and noised is not None:
        names = [sanity.title(name) for name in ("blurred", "noised")]
        values = [format_number(found.psnr or 0.0, ".1f") for found in (blurred, noised)]
        some = "" if blurred.images == report.protocol["images"] else f"{blurred.images:,} of "
        note += f"; {some}the originals {names[0]}, have {values[0]} dB, and {names[1]}, {values[1]} dB"
    return note + "."


def generation_note(report: GenerationReport) -> str | None:
    """Returns how far generated images are from real ones; None if no distance was measured."""
    row, real = report.rows[report.best or 0], report.reference
    if row.frechet is None:
        return None
    name, head = report.distance_names()[0], report.heads()[report.best or 0]
    note = f"{report.protocol['images']:,} generated images ({head}) have {name} {row.frechet:.4g}"
    if real.frechet is not None:
        note += f"; two halves of the real images, {real.images:,} each, have {real.frechet:.4g}"
    if len({each.setting.guidance for each in report.rows}) > 1:
        note += (
            f". The guidance is the one of {len(report.rows)} settings with the least {name}, on these same images, so "
            "new ones will do a little worse"
        )
    return note + "."


def representation_note(report: RepresentationReport) -> str | None:
    """Returns whether features beat pixels and random weights beyond chance; None without k-NN and linear probe."""
    probe: Probe = "linear" if report.rows[0].linear is not None else "knn"
    number = report.best(probe)
    row, score = report.rows[number], probe_score(report.rows[number], probe)
    if score is None:
        return None
    low, high = score.top1_interval
    note = (
        f"{'A linear probe' if probe == 'linear' else 'k-NN'} on {row.name} is right on {score.top1:.1%} of "
        f"{report.protocol['test']['images']:,} test images of {len(report.classes)} classes (95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} %)"
    )
    simple = {title: other for title, other in baselines(report.rows, number) if title != "teacher"}
    others = {title: found for title, other in simple.items() if (found := probe_score(report.rows[other], probe))}
    if others:
        note += ", " + " and ".join(f"{title} on {found.top1:.1%}" for title, found in others.items())
        not_beaten = [title for title in others if not _beats(report, probe, number, simple[title])]
        note += f": not clearly above {' or '.join(not_beaten)}" if not_beaten else ": clearly above"
        note += f" ({_TESTED if report.pairs else _COMPARED})"
    shared, test = report.protocol.get("shared_images", 0), report.protocol["test"]
    told = f" {shared_note(shared, test['images'] + test['images_unreadable'])}" if shared else ""
    return f"{note}.{told}"


_TESTED = "McNemar's exact test on the same images, 5 %"
_COMPARED = "the 95 % intervals compared, which have to be apart"


def _beats(report: RepresentationReport, probe: Probe, number: int, other: int) -> bool:
    """Whether a row is better than another beyond chance: on the same images, or else by intervals that are apart."""
    for pair in report.pairs:
        if (pair.probe, pair.row, pair.other) == (probe, number, other):
            return is_better(pair.row_alone, pair.other_alone)
    one, two = (probe_score(report.rows[i], probe) for i in (number, other))
    return one is not None and two is not None and one.top1_interval[0] > two.top1_interval[1]


def missing_notes(missing: dict[str, str]) -> list[str]:
    """Returns a sentence for each part that was left out."""
    return [f"{name.capitalize()} was left out: {why}." for name, why in missing.items()]
