"""Renders a chat template. `chat_process.py` runs this file as a program with bounded memory and time.

A template is a program by whoever made the model. Jinja's sandbox keeps it from everything but memory, which
`'a' * 10**10` uses up, and time, which nested loops do. The request comes as JSON on standard input; the text of each
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
except ImportError:  # a system without such limits: the parent's timeout is the only one
    resource = None  # type: ignore[assignment]


class Generation(Extension):
    """`{% generation %}`, by which templates mark the model's answers. The block is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return str(caller())


class Dict:
    """`dict` for templates: it makes dictionaries but does not lead to the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class PublicNamespace(Namespace):
    """`namespace` for templates; it refuses attributes that begin with an underscore."""

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
    """The environment that chat templates are written for, as transformers sets it up."""
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
    """Limit this process to so many bytes of memory and seconds of processor time."""
    if resource is not None:
        for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
            _, hard = resource.getrlimit(what)
            with suppress(OSError, ValueError):  # some systems define a limit but do not let it be set
                resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Render the request's template with its variables: `{"text": ...}`, or `{"error": a reason}`, for example that the
    text is too long."""
    try:
        text = environment().from_string(request["template"]).render(**request["variables"])
    except TemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # whatever a program may raise: a division by zero, a type that does not fit
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    if len(text) > request["characters"]:
        return {"error": f"it renders them to {len(text):,} characters, which is too long"}
    return {"text": text}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    limit(asked["memory"], asked["seconds"])
    json.dump([answer({"template": asked["template"], **chat}) for chat in asked["chats"]], sys.stdout)
