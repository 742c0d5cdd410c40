"""A self-contained HTML page: its frame, and pictures that lie inside it."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from PIL import Image

from mergevq.errors import MissingDependencyError

INK, OTHER, FAINT = "#1f4e79", "#c8702a", "#8a8f98"
"""Colours of plots."""

_EXACT_SIDE = 64  # Photographs up to this side keep every pixel in the page.


def check_packages() -> None:
    """Checks that a page can be written, before the work that it reports.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"the report needs jinja2 ({error}): pip install 'mergevq[eval]'") from error
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"plots need matplotlib ({error}): pip install 'mergevq[eval]'") from error


class Section(NamedTuple):
    """A part of a page that could be a page of its own."""

    name: str
    """For links to it."""
    title: str
    html: str
    """From `render_section`."""


def render_page(
    template: str,
    *,
    title: str,
    about: Sequence[str],
    facts: Mapping[str, str] | None,
    summary: str,
    table: tuple[list[str], list[list[str]]],
    notes: Sequence[str],
    protocol: Mapping[str, Any],
    json_value: Mapping[str, Any],
    sections: Sequence[Section] = (),
    **pictures: Any,
) -> str:
    """Returns the page that `template` makes of page.html.j2.

    Args:
        template: name of a file beside this one.
        title: heading of the page.
        about: paragraphs below the heading.
        facts: a short table below them.
        summary: what was measured, in one line.
        table: heading and lines of the numbers.
        notes: what a reader of the numbers has to know.
        protocol: how they were measured.
        json_value: the same for programs.
        sections: what follows the pictures, each under a heading of its own.
        pictures: what the template itself asks for.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    from_json = json.dumps(json_value, indent=1)
    values: dict[str, Any] = {
        "summary": summary,
        "table": table,
        "notes": notes,
        "protocol": protocol,
        "sections": sections,
    }
    return _render(
        template, "page.html.j2", title=title, about=about, facts=facts or {}, json=from_json, **values, **pictures
    )


def render_section(
    template: str,
    *,
    summary: str,
    table: tuple[list[str], list[list[str]]],
    notes: Sequence[str],
    protocol: Mapping[str, Any],
    **pictures: Any,
) -> str:
    """Returns the same without heading, style and JSON, to stand in another page: see `Section`.

    Args:
        template: name of a file beside this one, as for `render_page`.
        summary: what was measured, in one line.
        table: heading and lines of the numbers.
        notes: what a reader of the numbers has to know.
        protocol: how they were measured.
        pictures: what the template itself asks for.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    values: dict[str, Any] = {"summary": summary, "table": table, "notes": notes, "protocol": protocol, "sections": ()}
    return _render(template, "section.html.j2", **values, **pictures)


def photograph(image: Image.Image) -> str:
    """Returns an image for the page: WebP, several times smaller than PNG, unless every pixel would be seen."""
    if max(image.size) <= _EXACT_SIDE:
        return png(image)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return data_uri(buffer.getvalue(), "webp")


def png(image: Image.Image) -> str:
    """Returns an image for the page, pixel by pixel."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue(), "png")


def data_uri(data: bytes, kind: str) -> str:
    """Returns the bytes of a picture as an address that holds them.

    Args:
        data: of a whole file.
        kind: "png", "webp", "svg+xml".
    """
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def readable(value: Any) -> str:
    """Returns a value of a protocol as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {readable(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(readable(entry) for entry in value)
    return "none" if value is None else str(value)


def _render(
    template: str,
    frame: str,
    *,
    table: tuple[list[str], list[list[str]]],
    protocol: Mapping[str, Any],
    sections: Sequence[Section],
    **values: Any,
) -> str:
    check_packages()
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        frame=frame,
        whole=frame == "page.html.j2",
        heads=table[0],
        lines=table[1],
        protocol={name: readable(value) for name, value in protocol.items()},
        # Made by the same templates, which escaped all that came from outside.
        sections=[part._replace(html=Markup(part.html)) for part in sections],
        **values,
    )


def _template(name: str) -> str:
    return files("mergevq.evaluation").joinpath(name).read_text(encoding="utf-8")
