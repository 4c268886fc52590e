"""The one way in which pages are rendered: everything escaped, nothing undefined, control characters shown."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from tenbit.report.words import visible

HERE = Path(__file__).parent


def template(name: str) -> Template:
    """A page of this folder. What came from a model, a data set or a recipe is escaped in it."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template(name)


def style() -> Markup:
    """The style sheet that all pages carry in themselves."""
    return Markup((HERE / "style.css.jinja").read_text(encoding="utf-8").strip())
