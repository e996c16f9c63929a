"""Conversations of a calibration text, rendered by the model's chat template as an artifact renders them: by the same
program, in a process of its own with bounded time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.templates import read
from pmkvq_compiler.templates.chat_process import RENDER_SECONDS, RenderFailed, rendered, usual

AT_ONCE = 64
"""Chats that are rendered by one process: to start it takes longer than to render a chat."""


@dataclass(frozen=True)
class Chat:
    """A conversation, and where it was found."""

    where: str
    messages: Sequence[Any]


def render_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> Iterator[str]:
    """The text of each of `chats`. Raises `CompileError` for one that the template does not take, or that takes it too
    much time or memory."""
    for start in range(0, len(chats), AT_ONCE):
        yield from _render(tokenizer, chats[start : start + AT_ONCE])


def _render(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> Iterator[str]:
    variables = [_variables(tokenizer, chat) for chat in chats]
    template = _template(tokenizer, chats[0])
    try:
        answers = rendered(read("chat_template.py"), template, variables, RENDER_SECONDS)
    except RenderFailed as error:
        if len(chats) == 1:
            raise _does_not_fit(chats[0], str(error)) from error
        for chat in chats:  # to find the one that is too much
            yield from _render(tokenizer, [chat])
        return
    for chat, answer in zip(chats, answers, strict=True):
        if "text" not in answer:
            raise _does_not_fit(chat, answer["error"])
        yield answer["text"]


def _variables(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> dict[str, Any]:
    if not chat.messages or not all(isinstance(message, dict) for message in chat.messages):
        raise _does_not_fit(chat, "its messages are no list of objects with role and content")
    return {
        "messages": [usual(message) for message in chat.messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": False,
        **tokenizer.special_tokens_map,
    }


def _template(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # there is none, or none of several is the default
        raise _does_not_fit(chat, first_line(error)) from error


def _does_not_fit(chat: Chat, reason: str) -> CompileError:
    return CompileError(
        f"{chat.where}, does not fit the model's chat template: {' '.join(reason.split())[:300].rstrip('. ')}; change "
        f'the messages, or give their "text"'
    )
