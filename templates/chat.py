"""A prompt or a chat in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .runtime import ArtifactError, Cache, CacheFull, CompiledModel, InputError
from .text import Message, Tokenizer

HELP = "Chat in this terminal: /reset forgets the conversation, /quit or the end of input ends it."


def main(package: str, load: Callable[..., CompiledModel], load_tokenizer: Callable[[], Tokenizer]) -> int:
    """`python -m PACKAGE`: answers `--prompt`, or chats. Returns the exit code."""
    chosen = _parser(package).parse_args()
    try:
        talk = Conversation(load(chosen.device, chosen.dtype), load_tokenizer(), chosen)
        if chosen.prompt is not None:
            talk.say(chosen.prompt)
            return 0
        if talk.tokenizer.chat_template is None:
            raise InputError("this model has no chat template, so it continues texts only; give one with --prompt")
        return _chat(talk)
    except (ArtifactError, CacheFull, InputError) as error:
        print(f"{package}: {error}", file=sys.stderr)
        return 1


class Conversation:
    """Prints answers while they come, and keeps the cache from one turn to the next."""

    def __init__(self, model: CompiledModel, tokenizer: Tokenizer, chosen: argparse.Namespace) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chosen = chosen
        self.reset()

    def reset(self) -> None:
        self.messages: list[Message] = []
        self.cache: Cache = self.model.new_cache()
        self.cached: list[int] = []

    def say(self, text: str) -> None:
        """Answer `text`, or continue it where the model has no chat template."""
        if self.tokenizer.chat_template is None or self.chosen.raw:
            self._generate(self.tokenizer.encode(text))
            return
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self._generate(self.tokenizer.encode_chat(messages))
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _generate(self, token_ids: Tensor) -> str:
        """Continue `token_ids` [1, S]. Only the ids that the cache does not hold yet are fed to the model."""
        ids = token_ids[0].tolist()
        if ids[: len(self.cached)] != self.cached or len(ids) == len(self.cached):
            self.cache, self.cached = self.model.new_cache(), []
        room = self.cache.max_len - len(ids) + 1
        if room < 1:
            raise InputError(
                f"the conversation has {len(ids):,} tokens and the cache holds {self.cache.max_len:,}; "
                f"start anew with /reset, or compile with a larger --max-len"
            )
        stream, answer = self.tokenizer.stream(), []

        def show(column: Tensor) -> None:
            answer.append(stream(int(column)))
            print(answer[-1], end="", flush=True)

        out = self.model.generate(
            token_ids[:, len(self.cached) :],
            min(self.chosen.max_new_tokens, room),
            **self._sampling(),
            streamer=show,
            cache=self.cache,
        )
        print()
        self.cached = [*self.cached, *out[0].tolist()][: self.cache.length[0]]
        return "".join(answer)

    def _sampling(self) -> dict[str, Any]:
        if self.chosen.temperature == 0:
            return {}
        seed = torch.seed() if self.chosen.seed is None else self.chosen.seed
        return {"do_sample": True, "temperature": self.chosen.temperature, "top_p": self.chosen.top_p, "seed": seed}


def _chat(talk: Conversation) -> int:
    print(HELP, file=sys.stderr)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        except UnicodeDecodeError as error:
            print(f"the input is not valid text ({error}); type it again", file=sys.stderr)
            continue
        if text == "/quit":
            return 0
        if text == "/reset":
            talk.reset()
        elif text:
            try:
                talk.say(text)
            except (ArtifactError, InputError) as error:  # the conversation goes on after /reset
                print(error, file=sys.stderr)
            except KeyboardInterrupt:  # the conversation forgets the unfinished answer
                talk.cache, talk.cached = talk.model.new_cache(), []
                print()


def _parser(package: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=f"{__doc__} {HELP}")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens per answer (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus to sample from (%(default)s)")
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    parser.add_argument("--device", metavar="NAME", help="cpu (default), cuda:0 ...")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the artifact's own)")
    return parser
