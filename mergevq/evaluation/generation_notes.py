"""How the numbers of generated images are to be read, in words below their table."""

from collections.abc import Sequence
from typing import Any

from mergevq.evaluation.generation_result import GenerationReport, GenerationRow, ReferenceRow


def generation_notes(report: GenerationReport) -> tuple[str, ...]:
    """Returns what a reader of the report's table has to know, a sentence or two each."""
    notes = []
    protocol, rows = report.protocol, report.rows
    real, network, near = protocol["reference"], protocol["network"], protocol["neighbours"]
    if real["images_unreadable"]:
        notes.append(f"{real['images_unreadable']} reference images could not be read and were left out.")
    if report.best is not None and len(rows) > 1:
        notes.append(_best_note(report, report.best))
    if network is not None:
        notes += _distance_notes(rows, report.reference, protocol["images"], real["images"], network)
    if near is not None and near["close_distance"] is not None:
        notes.append(_close_note(report.reference, near))
    if protocol["processes"] > 1:
        notes.append(f"images/s is the sum over {protocol['processes']} processes.")
    return tuple(notes)


def _best_note(report: GenerationReport, best: int) -> str:
    scales = sorted({row.setting.guidance for row in report.rows})
    note = f"Least Fréchet distance: {report.heads()[best]}."
    if len(scales) > 2 and report.rows[best].setting.guidance in (scales[0], scales[-1]):
        note += " That is an end of the sweep; a scale beyond it may be better."
    return note + " These images chose it, so new ones will do a little worse."


def _distance_notes(
    rows: Sequence[GenerationRow], reference: ReferenceRow, images: int, real: int, network: dict[str, Any]
) -> list[str]:
    notes = []
    if rows[0].frechet is None:
        notes.append(f"The distances need at least 2 images on either side, got {images} and {real}: not measured.")
    else:
        notes.append(
            f"Fréchet distance of {images:,} generated from {real:,} reference images on {network['name']} "
            f"({network['sha256'][:12]}); it falls with both numbers, so compare at equal numbers only. The kernel "
            "distance does not."
        )
    if rows[0].precision is None:
        notes.append(f"Precision and recall need at least 4 images on either side, got {images} and {real}.")
    if reference.frechet is not None:
        note = f"reference: two halves of the reference against each other, {reference.images:,} different images each"
        if reference.images < images:
            note += f"; as these are fewer than the {images:,} generated, their Fréchet distance is larger"
        notes.append(note + ".")
    scored = reference.inception_images
    if network["classifier_sha256"] is not None and scored is not None:
        note = f"The reference's inception score is of {scored:,} of its images"
        note += (
            f", fewer than the {images:,} generated, which makes it smaller."
            if scored < images
            else ", as many as generated."
        )
        notes.append(note)
    if network["classifier_sha256"] is None:
        notes.append(f"{network['name']} has no classifier, so there is no inception score.")
    return notes


def _close_note(reference: ReferenceRow, near: dict[str, Any]) -> str:
    note = (
        f"close to training: share of images that are within {near['close_distance']:.4g} of one of "
        f"{near['images']:,} training images, as {near['close_quantile']:.0%} of these are of another one. "
    )
    if near["are_the_reference"]:
        note += "Here they are the reference. "
    elif reference.close_to_training is not None:
        note += f"Of the reference images {reference.close_to_training:.1%} are. "
    return note + "Clearly more hints at memorised images and proves nothing: look at the neighbours."
