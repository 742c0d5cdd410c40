"""What an evaluation of everything says of its images: how many, of which part, and whether a model may know them."""

from typing import Any

from mergevq.data.folder import PARTS, ImageFolder


def image_facts(images: ImageFolder, training: ImageFolder, limit: int | None) -> dict[str, Any]:
    """Returns what a result says of the images that were looked at.

    Args:
        images: to measure on.
        training: those that the caller calls training images, or that the data has for it.
        limit: of the images that are looked at, evenly spread; None is all.
    """
    total, looked_at = len(images), min(len(images), limit or len(images))
    chosen = images.select([i * total // looked_at for i in range(looked_at)])
    return {
        "images": looked_at,
        "images_available": total,
        "held_out_part": held_out_part(images),
        "shared_images": chosen.shared_with(training),
    }


def held_out_part(images: ImageFolder) -> str | None:
    """Returns the name of the held-out part that images are: val, validation or test; None if they are none.

    The part of a data set, or a folder or archive of such a name.
    """
    names = images.parts or (images.root.stem,)
    return names[0] if len(names) == 1 and names[0] in PARTS - {"train"} else None


def known_images_note(protocol: dict[str, Any]) -> str | None:
    """Returns a warning where a model may have been trained on the images; None where it is not likely, or unknown.

    Args:
        protocol: of an evaluation of everything.
    """
    if protocol.get("held_out_part") is not None or not protocol.get("shared_images"):
        return None
    return (
        f"{protocol['data']} has no held-out part (val, validation or test): if the models were trained on it, they "
        f"know {protocol['shared_images']:,} of the {protocol['images']:,} images, and new ones would do worse."
    )
