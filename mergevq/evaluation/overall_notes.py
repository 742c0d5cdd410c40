"""An evaluation in a few sentences: what its numbers say, and what was left out."""

from mergevq.evaluation.generation_result import GenerationReport
from mergevq.evaluation.overall_summary import baselines, format_number, probe_score
from mergevq.evaluation.representation_notes import shared_note
from mergevq.evaluation.representation_result import RepresentationReport
from mergevq.evaluation.result import ReconstructionReport
from mergevq.evaluation.sanity_result import SanityReport


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
        note += f"; the originals {names[0]}, have {values[0]} dB, and {names[1]}, {values[1]} dB"
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
    return note + "."


def representation_note(report: RepresentationReport) -> str | None:
    """Returns whether features beat pixels and random weights beyond chance; None without k-NN and linear probe."""
    row = report.rows[report.chosen]
    probe = "linear" if row.linear is not None else "knn"
    score = probe_score(row, probe)
    if score is None:
        return None
    low, high = score.top1_interval
    note = (
        f"{'A linear probe' if probe == 'linear' else 'k-NN'} on {row.name} is right on {score.top1:.1%} of "
        f"{report.protocol['test']['images']:,} test images of {len(report.classes)} classes (95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} %)"
    )
    others = [(title, found.top1) for title, other in baselines(report) if (found := probe_score(other, probe))]
    simple = [(title, top1) for title, top1 in others if title != "teacher"]
    if simple:
        note += ", " + " and ".join(f"{title} on {top1:.1%}" for title, top1 in simple)
        beaten = [title for title, top1 in simple if low > top1]
        if len(beaten) == len(simple):
            note += ": clearly above"
        else:
            note += f": not clearly above {' or '.join(title for title, _ in simple if title not in beaten)}"
    shared, test = report.protocol.get("shared_images", 0), report.protocol["test"]
    told = f" {shared_note(shared, test['images'] + test['images_unreadable'])}" if shared else ""
    return f"{note}.{told}"


def missing_notes(missing: dict[str, str]) -> list[str]:
    """Returns a sentence for each part that was left out."""
    return [f"{name.capitalize()} was left out: {why}." for name, why in missing.items()]
