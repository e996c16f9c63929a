"""Renders a chat template, as a program of its own: `chat_process.py` runs it with little memory and time.

A template is a program of whoever made the model. Jinja's sandbox keeps it from everything but memory and time:
`'a' * 10**10` takes the one, nested loops the other. The request comes as JSON on standard input; the text of each
chat, or the reason why there is none, goes as JSON to standard output. The arguments are folders to find jinja2 in.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any

sys.path += sys.argv[1:]

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

try:
    import resource
except ImportError:  # where there are no such limits, the time that the parent waits is the only one
    resource = None  # type: ignore[assignment]


class Generation(Extension):
    """`{% generation %}`, with which templates mark what the model has said: a block that is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return str(caller())


class Dict:
    """`dict` for templates: makes dictionaries, and gives no way to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class PublicNamespace(Namespace):
    """`namespace` for templates, whose attributes do not begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *pairs = args
        attributes = dict(*pairs, **kwargs)
        for name in attributes:
            PublicNamespace._check(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        PublicNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"the namespace's attribute {name!r} begins with an underscore")


def environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: the environment in which transformers renders them."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    made.globals["dict"] = Dict()
    made.globals["namespace"] = PublicNamespace
    return made


def to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja's escapes for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(message: str) -> None:
    raise TemplateError(message)


def limit(memory: int, seconds: int) -> None:
    """Let this process take so many bytes and seconds of a processor."""
    if resource is not None:
        for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
            _, hard = resource.getrlimit(what)
            with suppress(OSError, ValueError):  # some systems know a limit and refuse it
                resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """`{"text": ...}` of the request's template and variables in so many characters, or `{"error": a reason}`."""
    try:
        text = environment().from_string(request["template"]).render(**request["variables"])
    except TemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # whatever a program may raise: a division by zero, a type that does not fit
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    if len(text) > request["characters"]:
        return {"error": f"it makes {len(text):,} characters of them"}
    return {"text": text}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    limit(asked["memory"], asked["seconds"])
    json.dump([answer({"template": asked["template"], **chat}) for chat in asked["chats"]], sys.stdout)
