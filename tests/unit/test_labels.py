"""Labels from a file: the formats, the numbering, and files that do not match."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mergevq.data.folder import ImageFolder
from mergevq.data.labels import label_images
from mergevq.errors import DataError


@pytest.fixture
def data(tmp_path: Path) -> ImageFolder:
    for i in range(3):
        (tmp_path / "images" / "deep").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / "deep" / f"{i}.png")
    return ImageFolder(tmp_path / "images")


NAMED = {"deep/0.png": "wren", "deep/1.png": "ant, red", "deep/2.png": "wren"}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.json", json.dumps(NAMED)),
        ("a.csv", 'name,label\ndeep/2.png,wren\ndeep/0.png,wren\n\ndeep/1.png,"ant, red"\n'),
        ("a.txt", '\ufeffdeep/2.png, wren\r\ndeep/0.png,wren\r\ndeep/1.png,"ant, red"'),
    ],
)
def test_class_names_are_numbered_in_order(data: ImageFolder, tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_bytes(text.encode())
    labelled = label_images(data, tmp_path / file)
    assert (labelled.classes, labelled.labels) == (("ant, red", "wren"), [1, 0, 1])
    assert labelled[1].label == 0
    assert (data.classes, data.labels) == ((), [-1, -1, -1])


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.json", '{"deep/0.png": 2, "deep/1.png": 0, "deep/2.png": -1}'),
        ("a.csv", "deep/0.png,2\ndeep/1.png,0\ndeep/2.png,-1\n"),
    ],
)
def test_class_numbers_stay(data: ImageFolder, tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    labelled = label_images(data, tmp_path / file)
    assert (labelled.classes, labelled.labels) == (("0", "1", "2"), [2, 0, -1])


def test_parts_of_a_data_set_number_alike(data: ImageFolder, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(NAMED))
    known = [data.name(i) for i in range(3)]
    parts = [label_images(data.select(rows), tmp_path / "a.json", known) for rows in ([0, 2], [1])]
    assert [part.labels for part in parts] == [[1, 1], [0]]
    assert parts[0].classes == parts[1].classes == ("ant, red", "wren")


REFUSED = {
    "quote left open": ("a.csv", 'deep/0.png,"x\n' + 200_000 * "y", "the file is damaged"),
    "endless number": ("a.csv", f"deep/0.png,{5000 * '9'}\n", "at most 1000 characters"),
    "endless nesting": ("a.json", 200_000 * "[", "expected JSON, the file is damaged"),
    "missing": ("a.csv", "deep/0.png,x\n", "each of 3 images, 2 have none, first deep/1.png"),
    "unknown": ("a.json", json.dumps({**NAMED, "9.png": "x"}), "such as deep/0.png, 1 are not, first 9.png"),
    "empty": ("a.csv", "", "3 have none"),
    "empty object": ("a.json", "{}", "3 have none"),
    "twice": ("a.csv", "a,x\nb,x\na,y\n", "got a more than once"),
    "twice in JSON": ("a.json", '{"a": "x", "a": "y"}', "got a more than once"),
    "three columns": ("a.csv", "deep/0.png,x,y\n", "name,label in each line, got 'deep/0.png,x,y'"),
    "broken JSON": ("a.json", '{"a": ', "damaged"),
    "a list": ("a.json", '["a"]', 'expected {"name": label'),
    "a number": ("a.json", "3", 'expected {"name": label'),
    "mixed": ("a.json", '{"deep/0.png": "x", "deep/1.png": 1, "deep/2.png": 1}', "all class names, or all whole"),
    "truth": (
        "a.json",
        '{"deep/0.png": true, "deep/1.png": true, "deep/2.png": true}',
        "all class names, or all whole",
    ),
    "nested": ("a.json", '{"deep/0.png": {"a": 1}, "deep/1.png": {}, "deep/2.png": {}}', "all class names, or all"),
    "negative": ("a.csv", "deep/0.png,-2\ndeep/1.png,0\ndeep/2.png,0", "class numbers -1..999999, got -2..0"),
    "huge": ("a.csv", "deep/0.png,9999999\ndeep/1.png,0\ndeep/2.png,0", "got 0..9999999"),
    "no text": ("a.csv", "\udcff", "file of labels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_match_is_one_line(case: str, data: ImageFolder, tmp_path: Path) -> None:
    file, text, message = REFUSED[case]
    (tmp_path / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        label_images(data, tmp_path / file)
    assert message in str(caught.value) and str(tmp_path / file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_is_one_line(data: ImageFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: expected a file of labels"):
        label_images(data, tmp_path / "nowhere.csv")
