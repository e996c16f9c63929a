"""Jinja2 sources of everything that the compiler writes."""

from __future__ import annotations

import importlib.resources
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """The text of a template of this folder; a value that it lacks is an error."""
    source = importlib.resources.files(__name__).joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(source).render(**values)
