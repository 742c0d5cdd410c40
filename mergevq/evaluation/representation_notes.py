"""How the numbers of probes are to be read, in words below their table."""

from collections.abc import Sequence

from mergevq.evaluation.representation_result import RepresentationReport, RepresentationRow


def representation_notes(report: RepresentationReport) -> tuple[str, ...]:
    """Returns what a reader of the report's table has to know, a sentence or two each."""
    protocol, rows = report.protocol, report.rows
    train, test = protocol["train"], protocol["test"]
    notes = []
    if rows[0].knn is not None or rows[0].linear is not None:
        notes.append(
            f"± of k-NN and linear: the 95 % interval that {test['images']:,} test images leave. All rows are measured "
            "on the same images, so their differences are a little surer."
        )
    held = max((row.linear.held_out for row in rows if row.linear is not None), default=0)
    if held or (rows[0].knn is not None and len(rows[0].knn.tried) > 1):
        notes.append(
            f"{_chosen(rows)} chosen for each row on a held-out {protocol['held_out']:.0%} of the training images; the "
            "test images chose nothing."
        )
    ends = _at_an_end(rows)
    if ends:
        notes.append(
            f"The chosen learning rate is an end of the sweep for {'; '.join(ends)}: one beyond may be better."
        )
    few = rows[0].few_shot or ()
    drawn = next((found for found in few if found.half_width is not None), None)
    if drawn is not None:
        notes.append(
            f"few-shot: nearest class mean, mean of {len(drawn.draws)} draws of the labelled images; ± is the 95 % "
            "interval of that mean, by the draw alone."
        )
    notes += [
        f"{found.shots}-shot takes all training images, so it has no interval." for found in few if found.all_images
    ]
    if not all(row.setting.merged for row in rows if row.setting.kind is not None):
        notes.append(f"K = {protocol['num_patches']}, the number of patches, merges nothing.")
    sources = {row.setting.source for row in rows}
    if "random" in sources:
        notes.append("random weights: the same configuration before any training.")
    if "pixels" in sources:
        side = protocol["encoders"]["pixels"]["side"]
        notes.append(f"pixels: images averaged down to {side} x {side}, as one vector.")
    if "teacher" in sources:
        notes.append(f"teacher {protocol['encoders']['teacher']['name']}: another network under the same protocol.")
    if protocol["shared_images"]:
        notes.append(shared_note(protocol["shared_images"], test["images"] + test["images_unreadable"]))
    if protocol["train_and_test"] == "divided within one folder":
        notes.append(
            "Training and test images were divided within one folder. A tokenizer "
            "trained on that folder has seen most of the test images, without their classes."
        )
    for part, what in ((train, "training"), (test, "test")):
        if part["images_unreadable"]:
            notes.append(f"{part['images_unreadable']} {what} images could not be read and were left out.")
    return tuple(notes)


def shared_note(shared: int, images: int) -> str:
    """Returns what it means that test images are training images too.

    Args:
        shared: how many are, at least 1.
        images: of so many test images.
    """
    if shared == images:
        return "The test images are the training images: these numbers say nothing about new images."
    return (
        f"{shared:,} of the {images:,} test images are training images too, so these numbers are too good: give other "
        "images to test on."
    )


def _chosen(rows: Sequence[RepresentationRow]) -> str:
    words = []
    if rows[0].knn is not None and len(rows[0].knn.tried) > 1:
        words.append("k")
    linear = rows[0].linear
    if linear is not None and linear.held_out:
        if len({tried.learning_rate for tried in linear.tried}) > 1:
            words.append("the learning rate")
        if len({tried.weight_decay for tried in linear.tried}) > 1:
            words.append("the weight decay")
    words[0] = words[0][0].upper() + words[0][1:] if words[0] != "k" else "k"
    if len(words) == 1:
        return f"{words[0]} was"
    return f"{', '.join(words[:-1])} and {words[-1]} were"


def _at_an_end(rows: Sequence[RepresentationRow]) -> list[str]:
    """Names of rows whose best learning rate has no neighbour on one side."""
    names = []
    for row in rows:
        if row.linear is None or row.linear.learning_rate is None:
            continue
        rates = sorted({tried.learning_rate for tried in row.linear.tried if tried.learning_rate is not None})
        if len(rates) > 2 and row.linear.learning_rate in (rates[0], rates[-1]):
            names.append(row.name)
    return names
