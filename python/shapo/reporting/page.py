"""The page as one HTML file: styles, script and drawings inside, nothing fetched, light and dark, for screens and
paper."""

from __future__ import annotations

from typing import Any

from shapo.errors import UserError
from shapo.reporting.contents import Page
from shapo.reporting.svg import drawing


def render(page: Page, *, title: str = "ShaPO: what was measured") -> str:
    """The page as text.

    Raises:
        UserError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UserError("`shapo report` needs the package jinja2; `pip install jinja2`") from error
    environment: Any = Environment(
        loader=PackageLoader("shapo.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["drawing"] = drawing
    text = str(environment.get_template("page.html").render(page=page, title=title))
    return text.encode("utf-8", "backslashreplace").decode()  # a folder's name need not be UTF-8
