"""Sources of everything that the compiler writes: jinja2 templates, and Python modules that are copied as they are."""

from __future__ import annotations

import importlib.resources
import json
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """The text of a template of this folder, filled with `values`; a missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["toml"] = toml_string
    return environment.get_template(template).render(**values)


def toml_string(text: str) -> str:
    """A text as a TOML string, which is a JSON string except that TOML has no raw DEL and no lone surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def read(name: str) -> str:
    """The text of a file of this folder."""
    return importlib.resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
