"""Chats are rendered by `chat_template.py` in a process of its own, which gets little memory and time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

RENDER_SECONDS, RENDER_BYTES = 8, 512 << 20
"""What rendering chats may take before it is ended."""

RENDER_CHARACTERS = 1 << 20
"""Characters that a chat may be rendered to, beside sixteen for each of what it is made of."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that a message's reasoning is passed under; templates read the first, some the second."""


class RenderFailed(Exception):
    """The process ended or was ended, and which of its chats was the cause is not known."""


def usual(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: without empty values, its reasoning under the usual names."""
    filled = {name: value for name, value in message.items() if value is not None}
    reasoning = next((filled[name] for name in REASONING if name in filled), None)
    return filled if reasoning is None else {"thinking": reasoning, **filled, "reasoning_content": reasoning}


def rendered(
    program: str, template: str, chats: Sequence[Mapping[str, Any]], seconds: int = RENDER_SECONDS
) -> list[dict[str, str]]:
    """What a template makes of each of `chats`, which are its variables: `{"text": ...}`, or `{"error": a reason}`.

    `program` is the source of `chat_template.py`. All chats share one process, its memory and its `seconds`. Raises
    `RenderFailed` with the reason where that process gives no answer.
    """
    request = {
        "template": template,
        "memory": RENDER_BYTES,
        "seconds": seconds,
        "chats": [
            {"variables": chat, "characters": RENDER_CHARACTERS + 16 * len(json.dumps([template, chat]))}
            for chat in chats
        ],
    }
    folders = dict.fromkeys(str(Path(str(module.__file__)).parent.parent) for module in (jinja2, markupsafe))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, *folders],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode != 0:
            raise RenderFailed(f"it ended with {done.returncode}")
        answers: list[dict[str, str]] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise RenderFailed(f"it takes more than {seconds} seconds") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RenderFailed(f"it cannot be rendered: {error}") from error
    return answers
