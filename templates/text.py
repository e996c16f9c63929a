"""Text in and out of the artifact, with the tokenizer files that it carries."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Encoder
from tokenizers.decoders import DecodeStream
from torch import Tensor

from .chat_process import RENDER_SECONDS, RenderFailed, rendered, usual
from .runtime import ArtifactError, InputError, open_artifact
from .runtime.manifest import AGAIN, Artifact, brief, parse_json

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}` and whatever else the chat template reads."""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"))
CLEANED += tuple((f" {ending}", ending) for ending in ("'m", "'s", "'ve", "'re"))


class Tokenizer:
    """Encodes prompts and chats, decodes tokens, as transformers does with the same files.

    `chat_template` is the template for chats, None where the model has none; it may be replaced by another one.

    Raises `ArtifactError` where the artifact in `folder` has no `tokenizer.json`, or its files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        artifact = open_artifact(folder)
        if "tokenizer.json" not in artifact.files:
            raise ArtifactError(f"{folder} has no tokenizer.json; pass token ids to generate")
        content = artifact.files.read("tokenizer.json")
        self.encoder: Encoder = _guarded(
            lambda: Encoder.from_buffer(content), ArtifactError, f"{folder / 'tokenizer.json'} cannot be read", AGAIN
        )
        self.settings = _settings(artifact)
        self.encoder.no_truncation()  # what a tokenizer was trained with is not to shorten or fill a prompt
        self.encoder.no_padding()
        self.encoder.encode_special_tokens = bool(self.settings.get("split_special_tokens"))
        self.special_tokens = _special_tokens(self.settings)
        self.chat_templates = _chat_templates(artifact, self.settings)
        self.chat_template = self.chat_templates.get("default")
        self.renderer = artifact.package.read("chat_template.py").decode("utf-8")

    def encode(self, text: str) -> Tensor:
        """Token ids [1, S] of a text, with the special tokens that the tokenizer puts around one."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> Tensor:
        """Token ids [1, S] of a conversation, up to where the model is to answer. Arguments are those of `render_chat`.

        Raises `ArtifactError` where the model has no chat template, or one that does not take these messages.
        """
        text = self.render_chat(messages, tools, documents, add_generation_prompt, **variables)
        return self._encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text that the model's chat template makes of a conversation.

        `tools` are JSON schemas of functions that the model may call, `documents` what it may quote; `variables` are
        whatever else the template reads, such as `enable_thinking`. Templates run in a process of their own, with
        bounded time and memory. Raises `ArtifactError`.
        """
        template = self.chat_templates.get("tool_use") if tools is not None else None
        template = template or self.chat_template
        if template is None:
            raise ArtifactError("this model has no chat template; use encode")
        if not messages:
            raise ArtifactError("the conversation is empty; give at least one message")
        chosen = {
            "messages": [_message(message) for message in messages],
            "tools": _plain(tools),
            "documents": _plain(documents),
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
            **{name: _plain(value) for name, value in variables.items()},
        }
        return _render(self.renderer, template, chosen)

    def decode(self, token_ids: Tensor) -> str:
        """The text of token ids [S], without special tokens."""
        ids = token_ids.tolist()
        decode = self.encoder.decode
        what = f"tokens {brief(ids)} cannot be decoded"
        text: str = _guarded(lambda: decode(ids, skip_special_tokens=True), InputError, what, "give ids of this model")
        if self.settings.get("clean_up_tokenization_spaces") and type(self.encoder.model).__name__ != "BPE":
            for before, after in CLEANED:
                text = text.replace(before, after)
        return text

    def stream(self) -> Stream:
        """Decodes tokens one at a time."""
        return Stream(self.encoder)

    def _encode(self, text: str, add_special_tokens: bool) -> Tensor:
        encode = self.encoder.encode
        ids = _guarded(
            lambda: encode(text, add_special_tokens=add_special_tokens).ids,
            InputError,
            f"the text {brief(text)!r} cannot be encoded",
            "give a string of Unicode characters",
        )
        return torch.tensor([ids], dtype=torch.int64)


class Stream:
    """Call it with token after token: it returns the text that has become certain."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.decoder = DecodeStream(skip_special_tokens=True)

    def __call__(self, token_id: int) -> str:
        step, what = self.decoder.step, f"token {token_id} cannot be decoded"
        return _guarded(lambda: step(self.encoder, token_id), InputError, what, "give ids of this model") or ""


def _guarded(call: Callable[[], Any], kind: type[Exception], what: str, advice: str) -> Any:
    """What `call` returns. The tokenizers library raises bare exceptions and panics: they become one of `kind`."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = brief(error) or type(error).__name__
        raise kind(f"{what} ({reason}); {advice}") from error


# ---- the tokenizer's settings ----


def _settings(artifact: Artifact) -> dict[str, Any]:
    name = "tokenizer_config.json"
    if name not in artifact.files:
        return {}
    settings = parse_json(artifact.files.read(name), str(artifact.folder / name))
    if not isinstance(settings, dict):
        raise ArtifactError(f"{artifact.folder / name} is no JSON object; {AGAIN}")
    return settings


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The special tokens that have a name, which templates know them by."""
    named = {name: value for name, value in settings.items() if name in SPECIAL_TOKENS or name.endswith("_token")}
    for extra in (settings.get("model_specific_special_tokens"), settings.get("extra_special_tokens")):
        named |= extra if isinstance(extra, dict) else {}
    found = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _chat_templates(artifact: Artifact, settings: dict[str, Any]) -> dict[str, str]:
    """Templates by their names, of which one is "default"; files go before what is in the settings."""
    found: dict[str, str] = {}
    for name in artifact.files.digests or ():
        match = re.fullmatch(r"chat_template\.jinja|additional_chat_templates/([^/]+)\.jinja", name)
        if match is not None:
            try:
                found[match[1] or "default"] = artifact.files.read(name).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ArtifactError(f"{artifact.folder / name} is not in UTF-8 ({error}); {AGAIN}") from error
    if found:
        return found
    stored = settings.get("chat_template")
    if stored is None or isinstance(stored, str):
        return {} if stored is None else {"default": stored}
    try:
        found = {one["name"]: one["template"] for one in stored} if isinstance(stored, list) else dict(stored)
        if all(isinstance(one, str) for one in (*found, *found.values())):
            return found
    except (KeyError, TypeError, ValueError):
        pass
    raise ArtifactError(f"{artifact.folder / 'tokenizer_config.json'} has a chat_template that is no text; {AGAIN}")


# ---- chats ----


def _message(message: Message) -> dict[str, Any]:
    """A message as templates see it: of plain data, without empty values, its reasoning under the usual names."""
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise ArtifactError(f"a message is {brief(message)!r}; give a dictionary with role and content")
    return usual(plain)


def _plain(value: Any) -> Any:
    """What JSON can say of a value; whatever else it is becomes the name of its type."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(name): _plain(one) for name, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"


def _render(renderer: str, template: str, variables: dict[str, Any]) -> str:
    """Run the program `renderer`, which is chat_template.py. Raises `ArtifactError`."""
    try:
        (answer,) = rendered(renderer, template, [variables], RENDER_SECONDS)
    except RenderFailed as error:
        answer = {"error": str(error)}
    if "text" not in answer:
        raise ArtifactError(f"the chat template does not take these messages ({brief(answer['error'])})")
    return str(answer["text"])
