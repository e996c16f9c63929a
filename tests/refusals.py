"""What a call that may be refused was refused with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pmkvq_compiler.errors import CompileError


def refusal(call: Callable[[], Any]) -> str | None:
    """The sentence, None where the call went through. Every other exception is raised on."""
    try:
        call()
    except CompileError as error:
        return str(error)
    return None


def is_one_sentence(text: str) -> bool:
    return 20 < len(text) < 1000 and "\n" not in text and "Traceback" not in text
