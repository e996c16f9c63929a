"""Breaks long statements of generated Python into lines."""

from __future__ import annotations

import re

LINE = 120


def wrap(start: str, call: str, indent: int = 4, end: str = "") -> list[str]:
    """The line `start + call + end`. If that is too long, and `call` is a call of a function or a list: its arguments
    in a line of their own, or each in one that is wrapped in the same way."""
    apart = _taken_apart(call)
    if indent + len(start + call + end) <= LINE or apart is None:
        return [start + call + end]
    opening, arguments = apart
    together = ", ".join(arguments)
    inner = [together]
    if indent + 4 + len(together) > LINE and len(arguments) > 1:
        inner = [line for argument in arguments for line in wrap("", argument, indent + 4, ",")]
    return [start + opening, *(f"    {line}" for line in inner), call[-1] + end]


def _taken_apart(call: str) -> tuple[str, list[str]] | None:
    """The beginning of a call or a list, up to its bracket, and its arguments; None for any other expression."""
    opening = re.match(r"[\w.]*[(\[]", call)
    if opening is None:
        return None
    arguments, depth = [""], 0
    for at, letter in enumerate(call[opening.end() :], opening.end()):
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            return (opening[0], [argument.strip() for argument in arguments]) if at == len(call) - 1 else None
        if letter == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += letter
    return None
