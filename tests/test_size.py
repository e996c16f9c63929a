"""Files and functions are short enough to be read at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pmkvq_compiler", "passes", "runtime")
FILE_LINES, FUNCTION_LINES = 400, 50

REASON = "# longer than a screen: "
"""What stands above a function that may be longer, with the reason behind it."""


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def too_long(text: str) -> Iterator[str]:
    """Functions of a module that are longer than they may be and give no reason."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno is None:
            continue
        length = node.end_lineno - node.lineno + 1
        above = lines[min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 2].strip()
        if length > FUNCTION_LINES and not (above.startswith(REASON) and above.removeprefix(REASON)):
            yield f"{node.name} has {length} lines"


def test_no_file_is_too_long() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources()}
    assert len(lengths) > 100, "the sources are found"
    assert {name: length for name, length in lengths.items() if length > FILE_LINES} == {}


def test_no_function_is_too_long_without_a_reason() -> None:
    found = [f"{path.relative_to(ROOT)}: {function}" for path in sources() for function in too_long(path.read_text())]
    assert found == []


BODY = "    x = 1\n" * 50


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"def f():\n{BODY}", ["f has 51 lines"]),
        ("class A:\n" + indent(f"async def g(self):\n{BODY}", "    "), ["g has 51 lines"]),
        (f"# a comment\ndef f():\n{BODY}", ["f has 51 lines"]),
        (f"{REASON}\ndef f():\n{BODY}", ["f has 51 lines"]),
        (f"{REASON}one case a line\ndef f():\n{BODY}", []),
        (f"{REASON}one case a line\n@cache\ndef f():\n{BODY}", []),
        (f"def f():\n{BODY[: BODY.rindex('    x')]}", []),
    ],
)
def test_long_functions_are_found(text: str, found: list[str]) -> None:
    assert list(too_long(text)) == found
