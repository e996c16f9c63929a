"""Text in and out of the artifact, with the tokenizer files that it carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import DecodeStream
from torch import Tensor

from .runtime import ArtifactError

Message = dict[str, Any]
"""`{"role": "user", "content": "..."}` and whatever else the chat template reads."""


class Tokenizer:
    """Encodes prompts and chats, decodes tokens.

    Raises `ArtifactError` where the artifact in `folder` has no `tokenizer.json`.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise ArtifactError(f"{folder} has no tokenizer.json; pass token ids to generate")
        self.encoder = Encoder.from_file(str(folder / "tokenizer.json"))
        settings = folder / "tokenizer_config.json"
        self.settings: dict[str, Any] = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        template = folder / "chat_template.jinja"
        self.chat_template: str | None = (
            template.read_text("utf-8") if template.is_file() else self.settings.get("chat_template")
        )

    def encode(self, text: str) -> Tensor:
        """Token ids [1, S] of a text, with the special tokens that the tokenizer puts around one."""
        return torch.tensor([self.encoder.encode(text).ids])

    def encode_chat(self, messages: Sequence[Message]) -> Tensor:
        """Token ids [1, S] of a conversation, up to where the model is to answer.

        Raises `ArtifactError` where the model has no chat template, or one that does not take these messages.
        """
        if self.chat_template is None:
            raise ArtifactError("this model has no chat template; use encode")
        special = {name: _content(value) for name, value in self.settings.items() if name.endswith("_token")}
        try:
            text = (
                _environment()
                .from_string(self.chat_template)
                .render(messages=messages, add_generation_prompt=True, **special)
            )
        except TemplateError as error:
            raise ArtifactError(f"the chat template does not take these messages ({error})") from error
        return torch.tensor([self.encoder.encode(text, add_special_tokens=False).ids])

    def decode(self, token_ids: Tensor) -> str:
        """The text of token ids [S], without special tokens."""
        return self.encoder.decode(token_ids.tolist(), skip_special_tokens=True)

    def stream(self) -> Stream:
        """Decodes tokens one at a time."""
        return Stream(self.encoder)


class Stream:
    """Call it with token after token: it returns the text that has become certain."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.decoder = DecodeStream(skip_special_tokens=True)

    def __call__(self, token_id: int) -> str:
        return self.decoder.step(self.encoder, token_id) or ""


class _Generation(Extension):
    """`{% generation %}`, with which templates mark what the model has said, means nothing here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: the environment in which transformers renders them."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token
