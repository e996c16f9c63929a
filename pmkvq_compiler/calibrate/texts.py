"""Calibration texts, as samples of tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pmkvq_compiler.calibrate.chats import Chat, render_chats
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.source.source import Source

BUILTIN_TEXT = files("pmkvq_compiler") / "data" / "calibration.txt"


def read_samples(source: Source, problem: Problem) -> list[Tensor]:
    """Calibration samples, int64 [at most calib_len] each, spread evenly over the text.

    A document is cut into pieces of `calib_len` tokens; of what is left, at least half as long a piece is a sample too,
    shorter ones are joined. Raises `CompileError` where there are too few tokens, or text but no tokenizer.
    """
    length, wanted, recipe = problem.calib_len, problem.calib_samples, problem.recipe
    if length < recipe.sink + recipe.block:
        raise UsageError(
            f"calibration texts of {length} tokens hold no block of {recipe.block} to quantize; raise --calib-len"
        )
    prefix, documents = _read_tokens(source, problem.calib)
    largest, limit = max(map(max, filter(None, [prefix, *documents])), default=0), _vocabulary(source)
    if largest >= limit:
        raise CompileError(
            f"the tokenizer of {source.name} makes token {largest:,} of the calibration text and the model has "
            f"{limit:,} tokens; fetch the tokenizer that belongs to this model"
        )
    body = length - len(prefix)
    chunks, rest = [], []
    for document in documents:
        pieces = [document[start : start + body] for start in range(0, len(document), body)]
        chunks += [piece for piece in pieces if 2 * len(piece) >= body]
        rest += [token for piece in pieces if 2 * len(piece) < body for token in piece]
    chunks += [rest[start : start + body] for start in range(0, len(rest) - body + 1, body)]
    if len(chunks) < wanted:
        raise CompileError(
            f"calibration text {problem.calib!r} has {sum(map(len, documents)):,} tokens, and {wanted} samples of "
            f"{length} need {wanted * body:,}; give more text or lower --calib-samples or --calib-len"
        )
    return [torch.tensor(prefix + chunks[index * len(chunks) // wanted]) for index in range(wanted)]


def calibration_bytes(calib: str) -> bytes:
    if calib == "builtin":
        return BUILTIN_TEXT.read_bytes()
    try:
        return Path(calib).read_bytes()
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise CompileError(f"calibration text {calib!r} cannot be read: {reason}; name a text file") from error


def _read_tokens(source: Source, calib: str) -> tuple[list[int], list[list[int]]]:
    """Tokens that begin every sample (a model's `<bos>`), and the tokens of each document."""
    try:
        text = calibration_bytes(calib).decode("utf-8-sig")  # editors of some systems begin a file with a mark
    except UnicodeDecodeError as error:
        raise CompileError(f"calibration text {calib!r} is not UTF-8; convert it") from error
    if calib == "builtin" or Path(calib).suffix not in (".jsonl", ".ndjson", ".json"):
        tokenizer = _needed_tokenizer(source, calib)
        return _prefix(tokenizer), [tokenizer.encode(text, add_special_tokens=False)]
    records = [
        _record(source, f"calibration text {calib!r}, line {number}", line)
        for number, line in enumerate(text.split("\n"), 1)  # splitlines would also split at U+2028 inside of a string
        if line.strip()
    ]
    chats = [record for record in records if isinstance(record, Chat)]
    texts = render_chats(_needed_tokenizer(source, calib), chats) if chats else iter(())
    documents = []
    for record in records:
        if isinstance(record, _Text | Chat):
            body = record.text if isinstance(record, _Text) else next(texts)
            documents.append(_encode(_needed_tokenizer(source, calib), body, record.where))
        else:
            documents.append(record)
    return (_prefix(source.tokenizer) if source.tokenizer else []), documents


@dataclass(frozen=True)
class _Text:
    where: str
    text: str


def _record(source: Source, where: str, line: str) -> _Text | Chat | list[int]:
    """What one JSON line holds: `{"text": ...}`, `{"messages": [...]}` (chat template) or `{"input_ids": [...]}`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CompileError(f"{where}, is not JSON; write one object a line, or name the file .txt") from error
    match record:
        case {"input_ids": [*ids]}:
            limit = _vocabulary(source)
            if not all(type(token) is int and 0 <= token < limit for token in ids):
                raise CompileError(f"{where}, has input_ids that are not whole numbers below {limit:,}")
            return ids
        case {"text": str(text)}:
            return _Text(where, text)
        case {"messages": [*messages]}:
            return Chat(where, messages)
    raise CompileError(f'{where}, has no "text", "messages" or "input_ids"')


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name halves of a surrogate pair, which no tokenizer takes
        raise CompileError(f"{where}, has text that is not Unicode ({error.reason}); remove it") from error
    return tokenizer.encode(text, add_special_tokens=False)


def _vocabulary(source: Source) -> int:
    """Tokens that the model has embeddings for."""
    return int(source.config.get_text_config().vocab_size)


def _needed_tokenizer(source: Source, calib: str) -> PreTrainedTokenizerBase:
    if source.tokenizer is None:
        raise CompileError(
            f"{source.name} has no tokenizer, so {calib!r} cannot be turned into tokens; "
            f'give --calib a JSON lines file with {{"input_ids": [...]}}'
        )
    return source.tokenizer


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id][:1]
