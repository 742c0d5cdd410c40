"""The images that come with the package: small enough, labelled, and divided so that no emoji is on both sides."""

import zipfile
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest

from mergevq.data.embedded import EmbeddedImages
from mergevq.errors import ConfigError

CLASSES = (
    "activities", "animals_nature", "flags", "food_drink", "objects",
    "people_body", "smileys_emotion", "symbols", "travel_places",
)  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> dict[str, EmbeddedImages]:
    return {"train": EmbeddedImages("train"), "val": EmbeddedImages("val")}


def drawn(part: EmbeddedImages) -> list[tuple[str, str]]:
    """Vendor and code points of every image."""
    split = [part.name(i).split("/") for i in range(len(part))]
    return [(parts[0], parts[-1].removesuffix(".webp")) for parts in split]


def test_archives_are_small_and_licensed() -> None:
    folder = files("mergevq.data") / "emoji_64"
    archives = {entry.name: len(entry.read_bytes()) for entry in folder.iterdir() if entry.name.endswith(".zip")}
    assert set(archives) == {"noto.zip", "fluent.zip"}
    assert max(archives.values()) < 5_000_000
    licences = (folder / "LICENSES.md").read_text(encoding="utf-8")
    for name, size in archives.items():
        assert name in licences and f"{size:,}" in licences


def test_counts_are_those_of_the_licence_file(parts: dict[str, EmbeddedImages]) -> None:
    text = (files("mergevq.data") / "emoji_64" / "LICENSES.md").read_text(encoding="utf-8")
    counts = {part: Counter(vendor for vendor, _ in drawn(images)) for part, images in parts.items()}
    for vendor in ("noto", "fluent"):
        assert f"| `{vendor}.zip` | {counts['train'][vendor]} + {counts['val'][vendor]} |" in text
    total = len(parts["train"]) + len(parts["val"])
    assert total >= 3000 and 0.08 < len(parts["val"]) / total < 0.12


def test_nine_classes_in_both_parts(parts: dict[str, EmbeddedImages]) -> None:
    for part, least in (("train", 140), ("val", 15)):
        images = parts[part]
        assert images.classes == CLASSES
        counts = Counter(images.labels)
        assert set(counts) == set(range(9)) and min(counts.values()) >= least
        for i in range(0, len(images), 97):
            assert images.name(i).split("/")[2] == CLASSES[images[i].label]


def test_no_code_point_is_on_both_sides(parts: dict[str, EmbeddedImages]) -> None:
    def people(code: str) -> str:
        return code.replace("1f468", "1f9d1").replace("1f469", "1f9d1")

    train = {people(code) for _, code in drawn(parts["train"])}
    val = {people(code) for _, code in drawn(parts["val"])}
    assert not train & val
    both = Counter(code for images in parts.values() for _, code in drawn(images))
    assert sum(count == 2 for count in both.values()) > 1200


def test_no_skin_tones_and_no_country_flags_twice(parts: dict[str, EmbeddedImages]) -> None:
    for images in parts.values():
        for vendor, code in drawn(images):
            assert not any(f"1f3f{tone}" in code for tone in "bcdef")
            assert vendor == "noto" or not code.startswith("1f1e")


def test_every_image_is_whole_square_and_on_white(parts: dict[str, EmbeddedImages]) -> None:
    white_corners, seen = 0, set()
    for images in parts.values():
        for i in range(len(images)):
            image = images.read(i).image
            assert image.size == (64, 64) and image.mode == "RGB"
            corners = np.asarray(image)[[0, 0, -1, -1], [0, -1, 0, -1]]
            white_corners += int((corners >= 250).all())
            seen.add(image.tobytes())
        assert images.unreadable == {}
    total = sum(map(len, parts.values()))
    assert white_corners > 0.95 * total
    assert len(seen) == total


def test_edges_are_not_darkened(parts: dict[str, EmbeddedImages]) -> None:
    # The yellow faces are light to their rims: resizing colour and alpha apart would leave a dark ring.
    images = parts["train"]
    number = next(i for i in range(len(images)) if images.name(i) == "fluent/train/smileys_emotion/1f610.webp")
    grey = np.asarray(images.read(number).image.convert(mode="L")).astype(int)
    rim = grey[32, : int(np.argmax(grey[32] < 240)) + 3]
    assert rim.min() > 120


def test_other_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="'train' or 'val'"):
        EmbeddedImages("test")


def test_images_are_lossless() -> None:
    with zipfile.ZipFile(str(files("mergevq.data") / "emoji_64" / "noto.zip")) as archive:
        for member in archive.infolist()[::100]:
            assert member.compress_type == zipfile.ZIP_STORED
            assert archive.read(member)[12:16] == b"VP8L"
