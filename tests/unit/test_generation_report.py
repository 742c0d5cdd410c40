"""Table, page and pictures of a report on generated images."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mergevq.errors import ShapeError
from mergevq.evaluation.generation_notes import generation_notes
from mergevq.evaluation.generation_report import guidance_plot, neighbours_picture, render_generation, samples_picture
from mergevq.evaluation.generation_result import (
    GenerationReport,
    GenerationRow,
    Neighbour,
    ReferenceRow,
    Sample,
    Setting,
)
from mergevq.evaluation.result import Spread


def _row(guidance: float, frechet: float | None, **setting: Any) -> GenerationRow:
    chosen = Setting(guidance, **{"num_tokens": 20, "cache": "merge", **setting})
    distinct = Spread(18.0, 2.0)
    return GenerationRow(chosen, frechet, 0.01, 3.5, 0.75, 0.5, 0.125, distinct, 0.7, 2**20, 2.0**16, 1234.5, 99.0, 6.5)


def _samples(value: float, name: str | None = "cat") -> tuple[Sample, ...]:
    image = torch.full((3, 8, 8), value)
    near = Neighbour("train/<b>.png", 0.25, image + 0.25)
    return tuple(Sample(i, 70 + i, i, name, image, near, replace(near, distance=12.0)) for i in range(10))


def _report(**changes: Any) -> GenerationReport:
    protocol = {
        "images": 50,
        "batch_size": 16,
        "image_size": 8,
        "reference": {"data": "photos[red]", "images": 40, "images_unreadable": 0},
        "network": {"name": "lite1", "sha256": "0123456789abcdef", "classifier_sha256": "4567"},
        "neighbours": {"images": 90, "close_distance": 1.5, "close_quantile": 0.05, "are_the_reference": False},
        "processes": 1,
    }
    fields: dict[str, Any] = {
        "rows": (_row(1.0, 9.0), _row(1.5, 4.0), _row(2.0, 6.0)),
        "reference": ReferenceRow(20, 2.0, 0.001, 5.0, 0.9, 0.8, 0.075, {20: Spread(15.0, 1.0)}),
        "protocol": protocol,
        "notes": ("Something to know.",),
        "samples": (_samples(-0.5), _samples(0.0), _samples(0.5)),
    }
    return GenerationReport(**{**fields, **changes})


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


def _opened(link: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(link.split(",", 1)[1])))


def test_the_page_is_self_contained_and_holds_every_picture() -> None:
    page = _Page(render_generation(_report(), title="A title", about=["Why & how"], facts={"training": "3 steps"}))
    # The plot, ten samples of the best setting with two neighbours each, a sheet for each of three settings.
    assert len(page.links) == 1 + 10 * 3 + 3
    assert all(link.startswith("data:image/") for link in page.links)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    # Samples of the best setting, guidance 1.5, have value 0; their neighbours 0.25.
    assert [_opened(link).getpixel((4, 4))[0] for link in page.links[1:4]] == [128, 159, 159]
    for text in ("A title", "Why & how", "3 steps", "Something to know.", "features: 0.25", "pixels: 12", "cat"):
        assert text in page.words
    for text in ("guidance 1.5 (best)", "guidance 2", "reference", "FD-lite1", "inception score (lite1)"):
        assert text in page.words
    assert render_generation(_report()) == render_generation(_report())


def test_a_bare_report_has_a_page() -> None:
    rows = (_row(1.0, None),)
    report = _report(rows=rows, samples=((),), protocol={**_report().protocol, "network": None, "neighbours": None})
    page = _Page(render_generation(report))
    assert page.links == [] and "guidance 1" in page.words and report.network_name() == "none"


def test_the_table_has_a_column_a_setting_and_one_for_the_reference() -> None:
    heads, lines = _report().cells()
    assert heads == ["", "guidance 1", "guidance 1.5 (best)", "guidance 2", "reference"]
    cells = {line[0]: line[1:] for line in lines}
    assert cells["FD-lite1"] == ["9", "4", "6", "2"]
    assert cells["recall"] == ["0.500"] * 3 + ["0.800"]
    assert cells["distinct tokens an image"] == ["18.0 ± 2.0"] * 3 + ["15.0 ± 1.0"]
    assert cells["cache, MiB for 16 images"] == ["1"] * 3 + [""] and cells["cache, KiB an image"][0] == "64"
    assert cells["generated images/s"][0] == "1,234" and cells["decoded images/s"][0] == "99"
    text = str(_report())
    assert "photos[red]" in text and re.search(r"FD-lite1 +│ +9 │ +4 │ +6 │ +2 │", text)
    one = _report(rows=(_row(1.0, 9.0),), samples=(_samples(0.0),))
    assert one.cells()[0] == ["", "guidance 1", "reference"]


def test_settings_that_differ_are_named() -> None:
    rows = (_row(1.0, 9.0), _row(1.0, 9.0, cache="full"), _row(1.0, 9.0, num_tokens=30))
    report = _report(rows=rows)
    assert report.heads() == [
        "guidance 1, K = 20, merge cache",
        "guidance 1, K = 20, full cache",
        "guidance 1, K = 30, merge cache",
    ]
    assert report.heads(without_guidance=True)[1] == "K = 20, full cache"


def test_the_sweep_is_drawn_where_there_is_one() -> None:
    plot = guidance_plot(_report())
    assert plot is not None and b"<svg" in plot and b"Date" not in plot
    assert guidance_plot(_report(rows=(_row(1.0, 9.0), _row(1.0, 8.0, cache="full")))) is None
    two = (_row(1.0, 9.0), _row(2.0, 8.0), _row(1.0, 9.5, cache="full"), _row(2.0, 8.5, cache="full"))
    drawn = guidance_plot(_report(rows=two))
    assert drawn is not None and len(drawn) > len(plot)


def test_sheets_show_the_best_setting_unless_told() -> None:
    # Ten samples in rows of eight, 8 pixels between cells.
    sheet = samples_picture(_report(), cell=20)
    assert sheet.size == (8 + 8 * 28, 8 + 2 * 28) and sheet.getpixel((18, 18)) == (128, 128, 128)
    assert samples_picture(_report(), 2, cell=20).getpixel((18, 18)) == (191, 191, 191)
    picture = neighbours_picture(_report(), columns=4, cell=20)
    # Right-most column from below: by pixels, by features, the sample itself.
    column = [picture.getpixel((picture.width - 18, picture.height - 18 - 28 * i))[0] for i in range(3)]
    assert column == [159, 159, 128]
    with pytest.raises(ShapeError, match="shown=16"):
        samples_picture(_report(samples=((), (), ())))
    alone = tuple(replace(sample, by_features=None, by_pixels=None) for sample in _samples(0.0))
    with pytest.raises(ShapeError, match="got none"):
        neighbours_picture(_report(samples=(alone, alone, alone)))


def test_the_reference_score_is_of_as_many_images_or_it_is_said() -> None:
    def note(count: int | None) -> str:
        reference = replace(_report().reference, inception_images=count)
        return next((n for n in generation_notes(_report(reference=reference)) if "inception score is of" in n), "")

    assert note(50).endswith("is of 50 of its images, as many as generated.")
    assert "of 40 of its images, fewer than the 50 generated" in note(40) and note(None) == ""


def test_notes_say_how_to_read_the_numbers() -> None:
    text = "\n".join(generation_notes(_report()))
    assert "Least Fréchet distance: guidance 1.5." in text and "end of the sweep" not in text
    assert "50 generated from 40 reference images on lite1 (0123456789ab)" in text
    assert "20 different images each; as these are fewer than the 50 generated" in text
    assert "within 1.5 of one of 90 training images, as 5% of these are of another one" in text
    assert "Of the reference images 7.5% are." in text and "processes" not in text
    rows = (_row(1.0, 9.0), _row(1.5, 4.0), _row(2.0, 3.0))
    assert "end of the sweep" in generation_notes(_report(rows=rows))[0]
    protocol = {**_report().protocol, "processes": 2}
    assert generation_notes(_report(protocol=protocol))[-1] == "images/s is the sum over 2 processes."


def test_write_html_writes_the_page(tmp_path: Path) -> None:
    _report().write_html(tmp_path / "new" / "report.html", title="One")
    assert "<title>One</title>" in (tmp_path / "new" / "report.html").read_text()
