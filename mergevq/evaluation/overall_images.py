"""What an evaluation of everything says of its images: how many, of which part, and whether a model may know them."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergevq.data.folder import PARTS, ImageFolder
from mergevq.errors import DataError


def image_facts(
    images: ImageFolder, training: ImageFolder, limit: int | None, results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns what a result says of the images that were looked at: those that could be read, and how many could not.

    Where no part has looked at all of them, how many could not be read is not known, and None.

    Args:
        images: to measure on.
        training: those that the caller calls training images, or that the data has for it.
        limit: of the images that are looked at, evenly spread; None is all.
        results: of each part, as JSON values.
    """
    total, looked_at = len(images), min(len(images), limit or len(images))
    chosen = images.select([i * total // looked_at for i in range(looked_at)])
    prints = {images.fingerprint(), chosen.fingerprint()}
    known = (
        found["images_unreadable"]
        for found in _image_counts(results)
        if found["fingerprint"] in prints and found["images"] + found["images_unreadable"] == looked_at
    )
    unreadable = next(known, None)
    read = _readable(chosen, unreadable) if unreadable else chosen
    return {
        "images": len(read),
        "images_unreadable": unreadable,
        "images_available": total,
        "held_out_part": held_out_part(images),
        "shared_images": read.shared_with(training),
    }


def _image_counts(results: Mapping[str, Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Gives what each part says of the held-out images that it looked at."""
    inside = {"generation": "reference", "representation": "test"}
    for name, result in results.items():
        protocol = result["protocol"]
        yield protocol[inside[name]] if name in inside else protocol


def _readable(images: ImageFolder, unreadable: int) -> ImageFolder:
    """The images without those that cannot be read, as many as are known: they are decoded up to the last of these."""
    broken: set[int] = set()
    for number in range(len(images)):
        if len(broken) == unreadable:
            break
        try:
            images.read(number)
        except DataError:
            broken.add(number)
    return images.select([number for number in range(len(images)) if number not in broken])


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
