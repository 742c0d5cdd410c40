"""Views of images as one HTML page, on which a patch that is pointed at shows its token."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mergevq.errors import ShapeError
from mergevq.evaluation.correspondence import Correspondence, draw_correspondence
from mergevq.evaluation.image_views import ImageView, TokenView
from mergevq.evaluation.page import photograph, png, render_page
from mergevq.evaluation.size_histogram import draw_size_histogram
from mergevq.evaluation.token_map import to_pil
from mergevq.evaluation.view_sheet import (
    attention_legend,
    attention_picture,
    correspondence_title,
    map_picture,
    view_title,
)

SCHEMA = "mergevq.show/1"
_SIDE = 256  # Of maps and plots, in pixels.
_ORIGINAL = -1
"""The view of an original, which has tokens at every K."""


def render_images(
    views: Sequence[ImageView],
    found: Sequence[Correspondence] = (),
    *,
    protocol: Mapping[str, Any],
    title: str = "Images as tokens",
) -> str:
    """Returns a page: each image at its K (token map, reconstruction, class token's attention, token sizes), and the
    pairs of tokens of two images.

    Args:
        views: from `view_image`.
        found: of the first two views, from `correspond`.
        protocol: how the pictures came about.
        title: heading of the page.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
        ShapeError: there is no image, or pairs of another number of images than two.
    """
    if not views or (found and len(views) != 2):
        raise ShapeError(f"expected images to show, two of them for pairs, got {len(views)}")
    originals = [view.original for view in views]
    pairs = []
    for at in found:
        head = ", ".join(correspondence_title(at).split("\n"))
        shares = " and ".join(f"{share:.0%}" for share in at.covered().tolist())
        pairs.append((f"{head}, {shares} of the patches", photograph(_pair(originals, at))))
    shown = [(view.name, at) for view in views for at in view.views]
    return _render(
        [_image_section(view) for view in views],
        pairs,
        table=_numbers([name for name, _ in shown], [at for _, at in shown]),
        summary=f"{', '.join(view.name for view in views)}, {_grid(views[0].views[0])}",
        title=title,
        protocol=protocol,
        json_value={
            "schema": SCHEMA,
            "protocol": dict(protocol),
            "images": [{"name": view.name, "views": [_entry(at) for at in view.views]} for view in views],
            "pairs": [_pairs_entry(at) for at in found],
        },
    )


def render_tokens(
    views: Sequence[TokenView], names: Sequence[str], *, protocol: Mapping[str, Any], title: str = "Tokens"
) -> str:
    """Returns a page of tokens without originals: what comes back, token maps and token sizes, a column for each image.

    Args:
        views: from `view_tokens`.
        names: of the images.
        protocol: how the pictures came about.
        title: heading of the page.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
        ShapeError: there is no image.
    """
    if not views:
        raise ShapeError("expected tokens of at least one image, got none")
    return _render(
        [_tokens_section(views, names)],
        [],
        table=_numbers(names, views),
        summary=f"{len(views)} {'image' if len(views) == 1 else 'images'}, {_grid(views[0])}",
        title=title,
        protocol=protocol,
        json_value={
            "schema": SCHEMA,
            "protocol": dict(protocol),
            "images": [{"name": name, "views": [_entry(at)]} for name, at in zip(names, views, strict=True)],
            "pairs": [],
        },
    )


def _render(sheets: list[dict[str, Any]], pairs: list[tuple[str, str]], **parts: Any) -> str:
    return render_page("show.html.j2", about=(), facts=None, notes=(), sheets=sheets, pairs=pairs, **parts)


def _image_section(view: ImageView) -> dict[str, Any]:
    largest = max(int(at.sizes.max()) for at in view.views)
    original = view.original
    attention = [_cell(attention_picture(at, original, _SIDE), i) for i, at in enumerate(view.views)]
    drawn = [_cell(to_pil(at.drawn), i, photo=True) for i, at in enumerate(view.views)]
    sizes = [_cell(draw_size_histogram(at.sizes, largest, side=_SIDE)) for at in view.views]
    maps = [_cell(map_picture(at, original, _SIDE), i) for i, at in enumerate(view.views)]
    rows = [
        ("token map", [_cell(to_pil(original), _ORIGINAL, photo=True), *maps]),
        ("reconstruction", [None, *drawn]),
        ("class token's attention", [_cell(attention_legend(_SIDE)), *attention]),
        ("token sizes", [None, *sizes]),
    ]
    return _section(view.name, ["original", *(view_title(at) for at in view.views)], rows, view.views, one_image=True)


def _tokens_section(views: Sequence[TokenView], names: Sequence[str]) -> dict[str, Any]:
    largest = max(int(at.sizes.max()) for at in views)
    rows = [
        ("reconstruction", [_cell(to_pil(at.drawn), i, photo=True) for i, at in enumerate(views)]),
        ("token map", [_cell(map_picture(at, at.drawn, _SIDE), i) for i, at in enumerate(views)]),
        ("token sizes", [_cell(draw_size_histogram(at.sizes, largest, side=_SIDE)) for at in views]),
    ]
    titles = [f"{name}\n{view_title(at)}" for name, at in zip(names, views, strict=True)]
    return _section("Images", titles, rows, views, one_image=False)


def _section(
    head: str,
    columns: list[str],
    rows: list[tuple[str, list[dict[str, Any] | None]]],
    views: Sequence[TokenView],
    one_image: bool,
) -> dict[str, Any]:
    return {
        "head": head,
        "columns": columns,
        "rows": [{"head": name, "cells": cells} for name, cells in rows],
        "grid": list(views[0].tokens.grid),
        "sources": [at.source_index.tolist() for at in views],
        "one_image": one_image,
    }


def _cell(picture: Image.Image | None, view: int | None = None, photo: bool = False) -> dict[str, Any] | None:
    """A picture; `view` is the number of the source map whose patches it shows."""
    if picture is None:
        return None
    return {"picture": photograph(picture) if photo else png(picture), "view": view}


def _pair(originals: Sequence[Float[Tensor, "3 H W"]], found: Correspondence) -> Image.Image:
    return draw_correspondence(torch.stack(list(originals)), found)


def _numbers(heads: Sequence[str], views: Sequence[TokenView]) -> tuple[list[str], list[list[str]]]:
    """The table: a line for each view."""
    known = any(at.psnr is not None for at in views)
    lines = []
    for head, at in zip(heads, views, strict=True):
        quality = ["" if at.psnr is None else f"{at.psnr:.2f}"] if known else []
        counts = int(at.sizes.max()), int((at.sizes == 1).sum())
        lines.append([head, f"{at.num_tokens}", f"{at.bits:,}", *quality, *map(str, counts)])
    return ["", "K", "bits", *(["PSNR in dB"] if known else []), "patches in the largest", "tokens of one patch"], lines


def _entry(view: TokenView) -> dict[str, Any]:
    return {
        "num_tokens": view.num_tokens,
        "grid": list(view.tokens.grid),
        "bits": view.bits,
        "psnr": view.psnr if view.psnr is not None and math.isfinite(view.psnr) else None,
        "source": view.source_index.tolist(),
        "source_predicted": view.predicted,
        "index": view.tokens.index[0].tolist(),
    }


def _pairs_entry(found: Correspondence) -> dict[str, Any]:
    matches = found.matches
    return {
        "num_tokens": found.num_tokens,
        "first": matches.first.tolist(),
        "second": matches.second.tolist(),
        "cosine": [round(value, 6) for value in matches.similarity.tolist()],
    }


def _grid(view: TokenView) -> str:
    rows, columns = view.tokens.grid
    return f"{rows} x {columns} patches"
