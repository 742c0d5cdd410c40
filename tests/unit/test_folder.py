"""Folders and archives of images have one order and one division, and lose no run to a broken file."""

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from mergevq.data.class_folders import empty_class_folders
from mergevq.data.folder import ImageFolder
from mergevq.data.sources import evaluation_images, training_and_validation
from mergevq.errors import ConfigError, DataError


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (shade, shade, shade))


def fill(root: Path, names: Iterable[str]) -> Path:
    """Writes an image a name, the i-th of shade i."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(root / name)
    return root


def archive(path: Path, folder: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """Packs the files of `folder` in an order that is not the sorted one."""
    with zipfile.ZipFile(path, "w", method) as file:
        for source in sorted(folder.rglob("*.*"), reverse=True):
            file.write(source, source.relative_to(folder).as_posix())
    return path


def shades(data: ImageFolder) -> list[int]:
    return [sample.image.getpixel((0, 0))[0] for sample in (data[i] for i in range(len(data)))]


def names(data: ImageFolder) -> list[str]:
    return [data.name(i) for i in range(len(data))]


def test_classes_are_the_sorted_folders(tmp_path: Path) -> None:
    data = ImageFolder(fill(tmp_path, ["dogs/b.png", "cats/z/x.png", "dogs/a.png", "cats/y.png"]))
    assert data.classes == ("cats", "dogs")
    assert names(data) == ["cats/y.png", "cats/z/x.png", "dogs/a.png", "dogs/b.png"]
    assert data.labels == [0, 0, 1, 1]
    sample = data[2]
    assert (sample.label, sample.name, sample.number) == (1, "dogs/a.png", 2)
    assert shades(data) == [3, 1, 2, 0]


@pytest.mark.parametrize("files", [["b.png", "a.png"], ["cats/a.png", "b.png"], ["only/a.png", "only/b.png"]])
def test_without_class_folders_labels_are_minus_one(tmp_path: Path, files: list[str]) -> None:
    data = ImageFolder(fill(tmp_path, files))
    assert data.classes == () and data.labels == [-1, -1]


def test_given_classes_number_the_labels(tmp_path: Path) -> None:
    fill(tmp_path, ["cats/a.png", "dogs/a.png", "eels/a.png"])
    assert ImageFolder(tmp_path, classes=("dogs", "cats")).labels == [1, 0, -1]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_is_the_folder_it_holds(tmp_path: Path, method: int) -> None:
    files = ["train/dogs/b.png", "train/cats/x.png", "train/dogs/a.png"]
    loose = ImageFolder(fill(tmp_path / "loose", files))
    packed = ImageFolder(archive(tmp_path / "all.zip", tmp_path / "loose", method))
    assert names(packed) == names(loose) and packed.labels == loose.labels == [0, 1, 1]
    assert packed.classes == loose.classes == ("cats", "dogs")
    assert shades(packed) == shades(loose) == [1, 2, 0]


def test_several_archives_are_one_data_set(tmp_path: Path) -> None:
    for i, kind in enumerate(["eels", "cats"]):
        archive(tmp_path / f"train-{i}.zip", fill(tmp_path / f".{i}", [f"train/{kind}/a.png", f"train/{kind}/b.png"]))
    archive(tmp_path / "val.zip", fill(tmp_path / ".2", ["val/cats/a.png"]))
    everything = ImageFolder(tmp_path)
    assert names(everything)[0] == "train-0/train/eels/a.png" and len(everything) == 5
    assert everything.classes == ("cats", "eels") and everything.parts == ("train", "val")
    assert everything.labels == [1, 1, 0, 0, 0]
    assert everything.part("val").labels == [0]
    pattern = ImageFolder(tmp_path / "train-*.zip")
    assert names(pattern) == names(everything.part("train"))
    assert names(ImageFolder(tmp_path, part="train")) == names(pattern)
    with pytest.raises(DataError, match="folder test"):
        everything.part("test")


def test_same_names_in_two_archives_stay_apart(tmp_path: Path) -> None:
    for i in (0, 1):
        folder = fill(tmp_path / f".{i}", ["cats/skipped.png", "dogs/a.png"] if i else ["cats/a.png", "dogs/a.png"])
        archive(tmp_path / f"{i}.zip", folder)
    data = ImageFolder(tmp_path)
    assert names(data) == ["0/cats/a.png", "0/dogs/a.png", "1/cats/skipped.png", "1/dogs/a.png"]
    assert data.labels == [0, 1, 0, 1]


def test_split_is_disjoint_whole_and_stable(tmp_path: Path) -> None:
    files = [f"c{i % 3}/{i}.png" for i in range(200)]
    fill(tmp_path, files[:100])
    train, val = ImageFolder(tmp_path).split(0.2)
    assert sorted(names(train) + names(val)) == sorted(files[:100])
    assert not set(names(train)) & set(names(val))
    assert 8 <= len(val) <= 35
    assert names(val) == sorted(names(val)) and val.classes == train.classes
    fill(tmp_path, files)
    more_train, more_val = ImageFolder(tmp_path).split(0.2)
    assert set(names(train)) < set(names(more_train)) and set(names(val)) < set(names(more_val))
    assert val[3].label == int(val.name(3)[1])


def test_shared_images_are_those_of_the_same_file(tmp_path: Path) -> None:
    files = ["train/a/1.png", "train/b/1.png", "val/a/1.png"]
    whole = ImageFolder(fill(tmp_path / "x", files))
    train, val = whole.part("train"), whole.part("val")
    assert (train.shared_with(whole), whole.shared_with(train), train.shared_with(val)) == (2, 2, 0)
    # The names differ, the files do not; nor do they behind links, of folders and of files.
    assert ImageFolder(tmp_path / "x" / "train").shared_with(train) == 2
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one.png").symlink_to(tmp_path / "x" / "val" / "a" / "1.png")
    assert ImageFolder(tmp_path / "link").shared_with(whole) == 3
    assert ImageFolder(tmp_path / "links").shared_with(whole) == 1
    assert ImageFolder(fill(tmp_path / "copy", files)).shared_with(whole) == 0
    packed = ImageFolder(archive(tmp_path / "x.zip", tmp_path / "x"))
    assert packed.shared_with(packed.part("train")) == 2 and packed.shared_with(whole) == 0


def test_empty_class_folders_are_found_beside_the_others(tmp_path: Path) -> None:
    def empty(root: Path, **options: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in empty_class_folders(ImageFolder(root, **options))]

    parts = fill(tmp_path / "x", [f"{part}/{kind}/1.png" for part in ("train", "val") for kind in ("cat", "cow")])
    assert empty(parts) == []
    for name in ("train/dog/deep", "val/dog", "val/.dog", "test", "train/cat/none"):
        (parts / name).mkdir(parents=True)
    assert empty(parts) == ["x/train/dog", "x/val/dog"]
    assert empty(parts, part="val") == ["x/val/dog"] and empty(parts / "train") == ["x/train/dog"]
    assert [path.parent.name for path in empty_class_folders(ImageFolder(parts / "val", classes=("cow",)))] == ["val"]
    assert ImageFolder(parts).classes == ("cat", "cow"), "reading is as it was"
    # A folder that holds something else is no class, nor is a part beside classes; and archives keep no folders.
    (parts / "val" / "dog" / "notes.txt").write_text("none")
    assert empty(parts) == ["x/train/dog"]
    plain = fill(tmp_path / "y", ["cat/cat/1.png", "cow/1.png"])
    (plain / "val").mkdir()
    assert empty(plain) == []
    (tmp_path / "z" / "dog").mkdir(parents=True)
    packed = archive(tmp_path / "z" / "x.zip", parts)
    assert empty(packed) == empty(tmp_path / "z") == []
    # One class alone is none; what lies beside it is told all the same. Loose images have no class beside them.
    single = fill(tmp_path / "s", ["train/cat/1.png"])
    (single / "train" / "dog").mkdir()
    assert empty(single) == ["s/train/dog"]
    flat = fill(tmp_path / "f", ["train/1.png", "val/2.png"])
    (flat / "train" / "dog").mkdir()
    assert empty(flat) == []


def test_split_leaves_an_image_on_either_side(tmp_path: Path) -> None:
    data = ImageFolder(fill(tmp_path, ["a.png", "b.png"]))
    for fraction in (0.001, 0.999):
        train, val = data.split(fraction)
        assert len(train) == len(val) == 1 and train.name(0) != val.name(0)
    with pytest.raises(DataError, match="at least two"):
        data.select([0]).split(0.5)
    for fraction in (0.0, 1.0):
        with pytest.raises(ConfigError, match="fraction"):
            data.split(fraction)


def test_unreadable_images_give_way_to_the_next(tmp_path: Path) -> None:
    fill(tmp_path, [f"{i}.png" for i in range(5)])
    for broken in ("1.png", "2.png", "4.png"):
        (tmp_path / broken).write_bytes(b"broken")
    data = ImageFolder(tmp_path)
    assert data.unreadable == {}
    assert shades(data) == [0, 3, 3, 3, 0]
    assert list(data.unreadable) == ["1.png", "2.png", "4.png"]
    assert data[1].number == 3 and data[1].name == "3.png"
    with pytest.raises(DataError, match=r"2\.png"):
        data.read(2)


def test_only_unreadable_images(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"all 2 tried are broken, first a\.png") as caught:
        ImageFolder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_member_is_unreadable(tmp_path: Path) -> None:
    path = archive(tmp_path / "all.zip", fill(tmp_path / "loose", ["a.png", "b.png"]))
    with zipfile.ZipFile(path) as file:
        start = file.getinfo("b.png").header_offset
    data = bytearray(path.read_bytes())
    data[start + 50] ^= 255
    path.write_bytes(bytes(data))
    images = ImageFolder(path)
    assert shades(images) == [0, 0]
    assert list(images.unreadable) == ["b.png"] and "all.zip" in images.unreadable["b.png"]


def test_missing_and_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing there"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(DataError, match="empty folder"):
        ImageFolder(tmp_path)
    (tmp_path / "a.zip").write_bytes(b"PK no archive")
    with pytest.raises(DataError, match=r"a\.zip: File is not a zip file"):
        ImageFolder(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("readme.txt", "no image")
        file.writestr("__MACOSX/a.png", "no image")
    with pytest.raises(DataError, match="archives without any"):
        ImageFolder(tmp_path)


def test_numbers_outside(tmp_path: Path) -> None:
    data = ImageFolder(fill(tmp_path, ["a.png", "b.png"]))
    for number in (-1, 2):
        with pytest.raises(IndexError, match=r"0\.\.1"):
            data[number]
    assert [sample.name for sample in data] == ["a.png", "b.png"]


def test_cached_images_are_decoded_once(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "b.png"])
    data = ImageFolder(tmp_path, cache=True)
    assert shades(data) == [0, 1]
    for path in tmp_path.iterdir():
        path.unlink()
    assert shades(data) == [0, 1]


def test_pickled_with_an_open_archive(tmp_path: Path) -> None:
    data = ImageFolder(archive(tmp_path / "all.zip", fill(tmp_path / "loose", ["a.png", "b.png"])))
    copied = pickle.loads(pickle.dumps(data))
    assert shades(copied) == shades(data) == [0, 1]


def test_every_process_opens_the_archive_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageFolder(archive(tmp_path / "all.zip", fill(tmp_path / "loose", ["a.png", "b.png"])))
    opened = []
    monkeypatch.setattr(
        zipfile, "ZipFile", lambda path, original=zipfile.ZipFile: opened.append(path) or original(path)
    )
    data.read(1)
    assert opened == []
    monkeypatch.setattr("os.getpid", lambda: -1)  # As in a forked worker: handles of one file share its position.
    data.read(1)
    data.read(0)
    assert opened == [tmp_path / "all.zip"]


def test_sources_of_a_run(tmp_path: Path) -> None:
    parts = fill(tmp_path / "parts", ["train/cats/a.png", "train/dogs/a.png", "train/dogs/b.png", "val/dogs/c.png"])
    train, val = training_and_validation(parts)
    assert names(train) == ["train/cats/a.png", "train/dogs/a.png", "train/dogs/b.png"]
    assert names(val) == ["val/dogs/c.png"] and val.labels == [1] and val.classes == ("cats", "dogs")

    other = fill(tmp_path / "other", ["dogs/x.png", "eels/x.png"])
    train, val = training_and_validation(parts, other)
    assert len(train) == 3 and val.labels == [1, -1]

    train, val = training_and_validation(parts / "train", val_fraction=0.4)
    assert len(train) + len(val) == 3 and len(val) >= 1

    assert names(evaluation_images(parts)) == ["val/dogs/c.png"]
    assert names(evaluation_images(other)) == ["dogs/x.png", "eels/x.png"]
    assert evaluation_images(val) is val


def test_the_embedded_source() -> None:
    train, val = training_and_validation("embedded")
    assert len(train) > 5 * len(val) > 500 and train.classes == val.classes
    assert names(evaluation_images("embedded")) == names(val)
