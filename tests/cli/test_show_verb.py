"""`mergevq show`: of one image, of two, of tokens."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mergevq.cli.main import main
from mergevq.data.images import write_images
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import save_tokens


@pytest.fixture
def place(tiny_tokenizer: MergeVQ, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer.save_pretrained("model.safetensors")
    write_images(tmp_path, images, ["a.png", "b.png", "c.png"])
    save_tokens("known.mvq", tiny_tokenizer.encode(images, (20, 9, 64)))
    save_tokens("drawn.mvq", tiny_tokenizer.encode(images, 9).without_source())
    return tmp_path


def _show(words: str) -> int:
    return main(["show", *words.split(), "--model", "model.safetensors"])


@pytest.mark.parametrize(
    ("words", "columns", "rows", "cell", "said"),
    [
        ("a.png -o map.png --num-tokens 40,10", 3, 4, 264, "40 tokens, 624 bits"),
        ("a.png --out map.webp", 2, 4, 264, "20 tokens, 440 bits"),
        ("a.png b.png -o map.png --num-tokens 64,10", 2, 3, 336, "64 patches, "),
        ("known.mvq -o map.png --limit 2", 2, 3, 264, "2 of 3 images"),
        ("drawn.mvq -o map.jpg", 3, 3, 264, "3 of 3 images, source predicted"),
    ],
)
def test_a_picture(
    place: Path, words: str, columns: int, rows: int, cell: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _show(words) == 0
    out = capsys.readouterr().out
    path = re.search(r"map\.\w+", words)
    assert path is not None and out.startswith(f"{path[0]}: {said}")
    with Image.open(path[0]) as picture:
        # Cells with the gap beside them, and room for titles.
        assert columns * cell <= picture.width < columns * cell + 230
        assert rows * cell <= picture.height < rows * cell + 90


@pytest.mark.parametrize(
    ("words", "sheets", "told"),
    [
        ("a.png -o page.html --num-tokens 40,10", 1, "class token&#39;s attention"),
        ("a.png b.png -o page.html --num-tokens 10", 2, "What corresponds"),
        ("drawn.mvq -o page.html", 1, "source predicted"),
    ],
)
def test_a_page(place: Path, words: str, sheets: int, told: str) -> None:
    assert _show(words) == 0
    page = Path("page.html").read_text()
    assert page.count("data-sources='") == sheets and told in page
    assert "model.safetensors" in page, "how it was made"
    assert not re.search(r'(?:src|href)="(?!data:)', page)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-o new.png", "an image, two images or a token file"),
        ("a.png b.png c.png -o new.png", "a token file (.mvq), got a.png b.png c.png"),
        ("known.mvq a.png -o new.png", "a token file (.mvq), got known.mvq a.png"),
        ("known.mvq -o new.png --num-tokens 5", "with images only"),
        ("known.mvq -o new.png --size 64", "with images only"),
        ("known.mvq -o new.png --limit 0", "--limit to be at least 1, got 0"),
        ("a.png -o new.gif", "a page in .html, got new.gif"),
        ("a.png -o a.png", "a.png"),
        ("a.png -o new.png --num-tokens 65", "1..64"),
        ("nowhere.png -o new.png", "no such file"),
        ("nowhere.mvq -o new.png", "nowhere.mvq"),
    ],
)
def test_wrong_input_is_named_in_one_line(
    place: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in place.iterdir())
    assert _show(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert sorted(path.name for path in place.iterdir()) == before
