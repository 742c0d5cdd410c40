import base64
import builtins
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mergevq.errors import MissingDependencyError, ShapeError
from mergevq.evaluation.report import render_html, report_picture
from mergevq.evaluation.result import Example, ReconstructionReport, ReconstructionRow, Reference, Spread


def _row(k: int, psnr: float = 20.0, frechet: float | None = 3.5) -> ReconstructionRow:
    return ReconstructionRow(
        k, 6.0 * k, 64.0, Spread(psnr, 1.5), Spread(0.7, 0.1), 0.25, frechet, 0.01, 3.0, 17, 64, (0.5, 0.25), 9.0, 8.0
    )


def _report(network: str = "lite1", data: str = "photos", **changes: Any) -> ReconstructionReport:
    image = torch.zeros(3, 8, 8)
    source = torch.tensor([0, 0, 1, 2])
    example = Example(image, {4: source, 2: source}, {4: image + 0.5, 2: image - 0.5})
    protocol = {
        "data": data,
        "images": 5,
        "image_size": 8,
        "network": {"name": network, "sha256": "0123"},
        "perceptual": {"name": "lite0", "sha256": "4567"},
    }
    fields: dict[str, Any] = {
        "rows": (_row(4), _row(2, psnr=18.0, frechet=7.25)),
        "reference": Reference(1.5, 0.001, 2),
        "protocol": protocol,
        "notes": ("Something to know.",),
        "grid": (2, 2),
        "examples": (example, example),
    }
    return ReconstructionReport(**{**fields, **changes})


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_page_is_self_contained_and_holds_every_picture() -> None:
    page = _Page(render_html(_report()))
    # One plot; per example an original, and a reconstruction for each K, with a map at K = 2 but not at K = 4 = L.
    assert len(page.links) == 1 + 2 * (1 + 2 + 1)
    assert not {"script", "link", "iframe"} & set(page.tags)
    for link in page.links[1:]:
        kind, data = link.split(",", 1)
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size in ((8, 8), (256, 256))
    plot = base64.b64decode(page.links[0].split(",", 1)[1]).decode()
    assert "<svg" in plot and "Date" not in plot


def test_large_photographs_are_compressed_and_maps_are_not() -> None:
    pixels = torch.rand(3, 80, 80, generator=torch.Generator().manual_seed(0))
    source = torch.tensor([0, 0, 1, 2])
    page = _Page(render_html(_report(examples=(Example(pixels, {4: source, 2: source}, {4: pixels, 2: pixels}),))))
    assert [link.partition(";")[0] for link in page.links[1:]] == 3 * ["data:image/webp"] + ["data:image/png"]
    with Image.open(io.BytesIO(base64.b64decode(page.links[1].split(",", 1)[1]))) as image:
        assert image.size == (80, 80)


def test_the_page_shows_the_numbers_and_the_notes() -> None:
    words = _Page(render_html(_report(), title="A title", about=["Why & how"], facts={"training": "3 steps"})).words
    for text in ("A title", "Why & how", "3 steps", "Something to know.", "20.00 ± 1.50", "18.00 ± 1.50", "7.25"):
        assert text in words
    for text in ("K = 4", "K = 2", "FD-lite1", "KD-lite1", "perceptual (lite0)", "0.25 – 0.50"):
        assert text in words


def test_text_from_outside_is_escaped() -> None:
    text = render_html(_report(data="<script>alert(1)</script>"), title="<b>", facts={"<i>": "<u>"})
    page = _Page(text)
    assert not {"script", "i", "u"} & set(page.tags)
    assert "Reconstruction of 5 images, 8 x 8 pixels, <script>alert(1)</script>" in page.words


def test_equal_reports_give_equal_pages() -> None:
    assert render_html(_report()) == render_html(_report())


def test_what_was_not_measured_has_no_line_and_no_curve() -> None:
    rows = (_row(4, frechet=None), _row(2, frechet=None))
    heads, lines = _report(rows=rows).cells()
    assert heads == ["", "K = 4", "K = 2"]
    assert "FD-lite1" not in [line[0] for line in lines] and "KD-lite1" in [line[0] for line in lines]
    render_html(_report(rows=(_row(4, psnr=float("inf"), frechet=None),), reference=None, examples=()))


def test_only_inception_gives_fid() -> None:
    assert _report("inception").distance_names() == ("rFID", "rKID")
    assert _report("lite1").distance_names() == ("FD-lite1", "KD-lite1")


def test_json_has_a_schema_and_no_infinity() -> None:
    value = json.loads(json.dumps(_report(rows=(_row(4, psnr=float("inf")),)).to_json(), allow_nan=False))
    assert value["schema"] == "mergevq.reconstruction/1"
    row = value["rows"][0]
    assert row["psnr"] == {"mean": None, "std": 1.5} and row["bits"] == 88.0 and row["bit_balance"] == [0.5, 0.25]
    assert value["reference"] == {"frechet": 1.5, "kernel": 0.001, "images": 2}


def test_print_shows_a_table_that_brackets_do_not_confuse() -> None:
    text = str(_report(data="photos[red]"))
    assert "photos[red]" in text and "Something to know." in text
    assert re.search(r"PSNR in dB +│ +20\.00 ± 1\.50 +│ +18\.00 ± 1\.50", text)


def test_the_picture_has_a_row_for_each_image_and_a_map_where_tokens_were_merged() -> None:
    # At K = 4 = L nothing is merged: the original and the result. At K = 2 a map comes between.
    small = report_picture(_report(), [4], rows=1, cell=20)
    large = report_picture(_report(), cell=20)
    assert large.height - small.height == 28 and large.width - small.width == 2 * 28
    # Middle of the last column: the reconstruction at K = 2, of value -0.5.
    assert large.getpixel((large.width - 18, large.height - 18)) == (64, 64, 64)
    with pytest.raises(ShapeError, match="report with examples"):
        report_picture(_report(examples=()))


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named {package!r}")
        return found(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=rf"{package}.*mergevq\[eval\]"):
        render_html(_report())


def test_write_html_replaces_the_file_whole(tmp_path: Path) -> None:
    _report().write_html(tmp_path / "new" / "report.html", title="One")
    assert (tmp_path / "new" / "report.html").read_text().startswith("<!doctype html>")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
