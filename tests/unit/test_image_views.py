"""Views of images: what they hold, and what their pictures show."""

import html
import json
import re

import pytest
import torch
from PIL import Image
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.evaluation.correspondence import correspond
from mergevq.evaluation.heat_map import colours, draw_heat_map
from mergevq.evaluation.image_views import TokenView, view_image, view_tokens
from mergevq.evaluation.page import INK
from mergevq.evaluation.size_histogram import count_sizes, draw_size_histogram, size_classes
from mergevq.evaluation.token_map import contact_sheet
from mergevq.evaluation.view_page import render_images, render_tokens
from mergevq.evaluation.view_sheet import (
    attention_picture,
    correspondence_sheet,
    image_sheet,
    map_picture,
    tokens_sheet,
)
from mergevq.merging import SourceMap
from mergevq.metrics.image import psnr
from mergevq.tokenizer.class_attention import class_attention
from mergevq.tokenizer.model import MergeVQ
from mergevq.tokens import MergedTokens


def _pixels(picture: Image.Image) -> Tensor:
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3).long()
    )


# -------------------------------------------------------------------------------------------------------------- values


def test_a_view_holds_what_the_model_gives(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    view = view_image(tiny_tokenizer, images[0], (40, 5), name="a.png")
    assert (view.name, [at.num_tokens for at in view.views]) == ("a.png", [40, 5])
    for at in view.views:
        tokens = tiny_tokenizer.encode(images[:1], at.num_tokens)
        assert at.tokens.equal(tokens) and torch.equal(at.drawn, tiny_tokenizer.decode(tokens)[0])
        assert at.attention is not None and at.psnr == float(psnr(at.drawn[None], images[:1]))
        assert torch.equal(at.attention, class_attention(tiny_tokenizer, images[:1], at.num_tokens)[0].mean(0))
        assert int(at.sizes.sum()) == 64 and len(at.sizes) == at.num_tokens
    assert [at.bits for at in view.views] == [40 * 6 + 64 * 6, 5 * 6 + 64 * 3]


def test_tokens_of_a_generator_get_the_source_that_recovery_predicts(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    tokens = tiny_tokenizer.encode(images, (20, 9, 64))
    known, guessed = view_tokens(tiny_tokenizer, tokens), view_tokens(tiny_tokenizer, tokens.without_source())
    predicted = tiny_tokenizer.recover(tokens)
    assert predicted.source is not None
    for i in range(3):
        assert known[i].tokens.equal(tokens[i]) and not known[i].predicted
        assert guessed[i].predicted and torch.equal(guessed[i].source_index, predicted.source.index[i])
        assert known[i].attention is None and known[i].psnr is None
        # What is drawn is what the tokens decode to, whichever others are in the batch.
        torch.testing.assert_close(guessed[i].drawn, tiny_tokenizer.decode(tokens[i].without_source())[0])
    assert [at.bits for at in guessed] == [20 * 6, 9 * 6, 64 * 6]


# ----------------------------------------------------------------------------------------------------------- heat maps


def test_colours_grow_brighter_with_the_value() -> None:
    table = colours(torch.linspace(-0.5, 1.5, 41))
    bright = (table * torch.tensor([0.299, 0.587, 0.114])[:, None]).sum(0)
    assert bool((bright[10:31].diff() > 0).all()) and table.abs().max() <= 1
    torch.testing.assert_close(table[:, :11], table[:, :1].expand(3, 11), msg="below 0 is as dark as 0")
    torch.testing.assert_close(table[:, 30:], table[:, -1:].expand(3, 11), msg="above 1 is as bright as 1")


def test_a_heat_map_colours_each_patch_by_its_own_value() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    picture = draw_heat_map(torch.full((3, 4, 6), -1.0), values, 1.0, 4.0, scale=3)
    assert picture.shape == (3, 12, 18)
    brightness = picture.mean(0).unflatten(0, (2, 6)).unflatten(2, (3, 6))
    assert float(brightness.std((1, 3), correction=0).max()) < 1e-6, "flat inside a patch"
    a, b, c, d, e, f = brightness.mean((1, 3)).flatten().tolist()
    assert a == pytest.approx(b) and b < c < d < e and e == pytest.approx(f)
    over_white = draw_heat_map(torch.ones(3, 4, 6), values, 1.0, 4.0, scale=3)
    assert bool((over_white > picture).all()) and over_white.abs().max() <= 1


def test_wrong_heat_is_named() -> None:
    with pytest.raises(ShapeError, match="3 x 3 grid divides, got 8 x 8"):
        draw_heat_map(torch.zeros(3, 8, 8), torch.zeros(3, 3), 0.0, 1.0)
    with pytest.raises(ShapeError, match="finite values and low < high"):
        draw_heat_map(torch.zeros(3, 8, 8), torch.full((2, 2), torch.nan), 0.0, 1.0)
    with pytest.raises(ShapeError, match="finite values and low < high"):
        draw_heat_map(torch.zeros(3, 8, 8), torch.zeros(2, 2), 1.0, 1.0)


def _view(attention: Tensor | None = None) -> TokenView:
    """Four patches in three tokens."""
    index, num = torch.tensor([[5, 1, 2]]), torch.tensor([3])
    tokens = MergedTokens(index, SourceMap(torch.tensor([[0, 1, 1, 2]]), num), (2, 2), 6, None, num)
    return TokenView(tokens, torch.zeros(3, 8, 8), attention=attention)


def test_attention_is_shown_relative_to_its_mean() -> None:
    image = torch.zeros(3, 8, 8)
    weights = torch.tensor([[0.1, 0.1], [0.1, 0.4]])
    a, b = (attention_picture(_view(weights * factor), image, 32) for factor in (1.0, 0.02))
    assert a is not None and b is not None and torch.equal(_pixels(a), _pixels(b))
    patches = _pixels(a)[8::16, 8::16].sum(2)
    assert patches[1, 1] > patches[0, 0] == patches[0, 1] == patches[1, 0]
    none = attention_picture(_view(torch.zeros(2, 2)), image, 32)
    assert none is not None and int(_pixels(none).max()) < int(_pixels(a).max()), "no attention at all is dark"
    assert attention_picture(_view(), image, 32) is None


# ---------------------------------------------------------------------------------------------------------- histograms


def test_classes_of_sizes_leave_no_gap() -> None:
    classes = size_classes(100)
    assert classes == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128)]
    assert size_classes(1) == [(1, 1)] and size_classes(2)[-1] == (2, 2) and size_classes(3)[-1] == (3, 4)
    sizes = torch.arange(1, 101)
    assert count_sizes(sizes, classes) == [1, 1, 2, 4, 8, 16, 32, 36]


def test_bars_are_as_long_as_the_counts() -> None:
    sizes = torch.cat([torch.full((12,), 1), torch.full((6,), 2), torch.full((3,), 20)])
    ink = torch.tensor([int(INK[i : i + 2], 16) for i in (1, 3, 5)])
    is_bar = (_pixels(draw_size_histogram(sizes)) == ink).all(2)
    lengths = is_bar.sum(1)
    bars = [int(lengths[row]) for row in range(1, 256) if lengths[row] and not lengths[row - 1]]
    # One, two and twenty patches; the classes between are empty.
    assert len(bars) == 3 and bars[0] > 100
    assert bars[1] / bars[0] == pytest.approx(0.5, abs=0.02) and bars[2] / bars[0] == pytest.approx(0.25, abs=0.02)
    more_classes = (_pixels(draw_size_histogram(sizes, 1000)) == ink).all(2).sum(1)
    assert int((more_classes > 0).sum()) < int((lengths > 0).sum()), "eleven bars are thinner than six"


def test_tokens_without_patches_have_a_bar_of_their_own() -> None:
    without, with_empty = torch.tensor([1, 1, 2]), torch.tensor([1, 0, 2])
    assert draw_size_histogram(without).tobytes() != draw_size_histogram(with_empty).tobytes()


# -------------------------------------------------------------------------------------------------------------- sheets


def _place(sheet: Image.Image, rows: int, columns: int, row: int, column: int, cell: int, gap: int = 8) -> Tensor:
    """A cell of a contact sheet, counted from its lower right corner, where no title moves it."""
    left = sheet.width - (columns - column) * (cell + gap)
    top = sheet.height - (rows - row) * (cell + gap)
    return _pixels(sheet.crop((left, top, left + cell, top + cell)))


def test_the_sheet_of_an_image_has_everything_in_its_place(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    view = view_image(tiny_tokenizer, images[0], (40, 5))
    sheet = image_sheet(view, cell=64)
    for column, at in enumerate(view.views, 1):
        drawn = contact_sheet([[at.drawn]], cell=64, gap=0)
        attention = attention_picture(at, view.original, 64)
        assert attention is not None
        histogram = draw_size_histogram(at.sizes, int(view.views[1].sizes.max()), side=64)
        for row, picture in enumerate((map_picture(at, view.original, 64), drawn, attention, histogram)):
            assert torch.equal(_place(sheet, 4, 3, row, column, 64), _pixels(picture)), (row, column)
    assert torch.equal(_place(sheet, 4, 3, 0, 0, 64), _pixels(contact_sheet([[view.original]], cell=64, gap=0)))
    assert bool((_place(sheet, 4, 3, 1, 0, 64) == 255).all())


def test_a_long_name_does_not_run_into_its_neighbours(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    short, long = (image_sheet(view_image(tiny_tokenizer, images[0], (5,), name="n" * n)) for n in (2, 90))
    assert short.size == long.size and short.tobytes() != long.tobytes()
    last = (short.width - 264, 0, short.width, short.height)
    assert short.crop(last).tobytes() == long.crop(last).tobytes(), "beside the original's title nothing changes"


def test_the_sheet_of_tokens_has_a_column_for_each_image(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    views = view_tokens(tiny_tokenizer, tiny_tokenizer.encode(images, (20, 9, 64)))
    sheet = tokens_sheet(views, ["a", "b", "c"], cell=64)
    for column, at in enumerate(views):
        assert torch.equal(_place(sheet, 3, 3, 0, column, 64), _pixels(contact_sheet([[at.drawn]], cell=64, gap=0)))
        assert torch.equal(_place(sheet, 3, 3, 1, column, 64), _pixels(map_picture(at, at.drawn, 64)))
    with pytest.raises(ShapeError, match="at least one image"):
        tokens_sheet([], [])


def test_the_sheet_of_pairs_has_a_row_for_each_k(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    found = [correspond(tiny_tokenizer, images[:2], k) for k in (64, 9)]
    sheet = correspondence_sheet(images[:2], found, cell=64)
    assert torch.equal(_place(sheet, 3, 2, 0, 1, 64, 16), _pixels(contact_sheet([[images[1]]], cell=64, gap=0)))
    assert not torch.equal(_place(sheet, 3, 2, 1, 1, 64, 16), _place(sheet, 3, 2, 2, 1, 64, 16))


# --------------------------------------------------------------------------------------------------------------- pages


def test_the_page_holds_everything_it_needs(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    views = [view_image(tiny_tokenizer, images[i], (40, 5), name=f"<{i}>.png") for i in range(2)]
    found = [correspond(tiny_tokenizer, images[:2], k) for k in (40, 5)]
    page = render_images(views, found, protocol={"tokenizer": "a & b"})
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    # Of each image 1 original, 3 pictures and a histogram at each K, a legend; and the pairs at each K.
    assert len(addresses) == 2 * (1 + 2 * 4 + 1) + 2 and all(a.startswith("data:image/") for a in addresses)
    assert "<0>" not in page and "&lt;0&gt;.png" in page and "a &amp; b" in page
    sources = [json.loads(text) for text in re.findall(r"data-sources='([^']*)'", page)]
    assert sources == [[at.source_index.tolist() for at in view.views] for view in views]
    assert page.count("data-one-image") == 2
    written = json.loads(html.unescape(re.findall(r"<pre>(.*?)</pre>", page, re.S)[0]))
    assert written["schema"] == "mergevq.show/1"
    assert written["images"][1]["views"][0]["source"] == views[1].views[0].source_index.tolist()
    assert written["pairs"][1]["first"] == found[1].matches.first.tolist()
    assert page == render_images(views, found, protocol={"tokenizer": "a & b"}), "nothing depends on the time"


def test_the_page_of_tokens_has_no_original(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    views = view_tokens(tiny_tokenizer, tiny_tokenizer.encode(images, (20, 9, 64)).without_source())
    page = render_tokens(views, ["a", "b", "c"], protocol={})
    assert len(re.findall('src="data:image/', page)) == 9 and "PSNR" not in page and "attention" not in page
    assert "source predicted" in page
    with pytest.raises(ShapeError, match="at least one image"):
        render_tokens([], [], protocol={})


def test_pairs_need_two_images(tiny_tokenizer: MergeVQ, images: Tensor) -> None:
    found = [correspond(tiny_tokenizer, images[:2], 5)]
    with pytest.raises(ShapeError, match="two of them for pairs, got 1"):
        render_images([view_image(tiny_tokenizer, images[0], (5,))], found, protocol={})
    with pytest.raises(ShapeError, match="got 0"):
        render_images([], protocol={})
