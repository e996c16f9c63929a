"""Text generation: prefill in chunks, then token by token. Knows nothing about tokenizers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cache import Cache
from .errors import ArtifactError, InputError
from .forward import Forward
from .graph import GraphDecoder, call
from .inputs import real_number, whole_number, whole_numbers

PREFILL_CHUNK = 4096
"""Tokens of each prompt that are fed at once: enough to fill a GPU, and few enough to bound the activations."""
Streamer = Callable[[Tensor], None]


def generate(
    model: Forward,
    input_ids: Tensor,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | None = None,
    streamer: Streamer | None = None,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Continue prompts `input_ids` [B, S] by up to `max_new_tokens`; returns [B, S + new] (int64).

    Greedy unless `do_sample`; then `temperature`, `top_k` (0: off) and `top_p` shape the distribution and `seed` makes
    it repeatable. `attention_mask` [B, S] marks padding (0) at either end of a prompt. A sequence ends at
    `eos_token_id` (by default the model's own; an empty list means never) and is then filled with the pad token.
    `streamer` is called with every new column [B]. With a `cache` of earlier turns, `input_ids` are the tokens that
    follow it.

    The cache is in use until the end; a streamer may read it, not change it. If a streamer's exception or an interrupt
    ends the generation early, the cache keeps the tokens that were fed.

    Raises `InputError` before anything is changed where the prompt is empty or the tokens do not fit the cache, and
    `ArtifactError` where tokens are to be sampled from logits that are not finite.
    """
    sampling = _sampling(model, do_sample, temperature, top_k, top_p, seed)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} generates nothing; ask for at least 1")
    ends = model.eos_token_ids if eos_token_id is None else _ends(eos_token_id, model.vocab_size)
    if streamer is not None and not callable(streamer):
        raise InputError(f"the streamer is a {type(streamer).__name__}; give a function of the new tokens [B]")
    ids, mask = model.check_inputs(input_ids, attention_mask)
    if bool((mask.sum(-1) == 0).any()):
        raise InputError("a prompt is empty; give every sequence at least one token")
    cache = model.new_cache(batch_size=ids.shape[0]) if cache is None else cache
    model.check_cache(cache, ids.shape[0])
    with cache.claims.claim():
        _check_room(cache, mask, max_new_tokens)
        return _continue(model, ids.to(model.device), mask, cache, max_new_tokens, sampling, ends, streamer)


def _continue(
    model: Forward,
    ids: Tensor,
    mask: Tensor,
    cache: Cache,
    max_new_tokens: int,
    sampling: Sampling | None,
    ends: frozenset[int],
    streamer: Streamer | None,
) -> Tensor:
    """The prompts `ids` [B, S] and what follows them [B, S + new]."""
    pad = model.pad_token_id if model.pad_token_id is not None else min(ends, default=0)
    logits = _prefill(model, ids, mask, cache)
    running = torch.ones(ids.shape[0], dtype=torch.bool, device=model.device)
    columns = [ids]
    decode = decoder(model, cache)
    for step in range(max_new_tokens):
        chosen = logits.argmax(-1) if sampling is None else _choose(logits, sampling)
        chosen = torch.where(running, chosen, pad)
        columns.append(chosen.unsqueeze(-1))
        if streamer is not None:
            _tell(streamer, chosen, cache)
        for end in ends:
            running &= chosen != end
        if step + 1 == max_new_tokens or (ends and not bool(running.any())):
            break
        logits = decode(chosen, running)
    return torch.cat(columns, dim=-1)


def _tell(streamer: Streamer, chosen: Tensor, cache: Cache) -> None:
    with cache.claims.watch():
        streamer(chosen)


def decoder(model: Forward, cache: Cache) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from tokens [B] and the sequences that are running [B] (bool) to the next logits [B, V]. It replays a
    CUDA graph where the device, the cache's attention and the model allow it, and calls the model elsewhere."""
    if cache.replayable and model.device.type == "cuda":
        return GraphDecoder(model, cache)
    return partial(call, model, cache)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; `top_k` 0 and `top_p` 1 change nothing."""

    temperature: float
    top_k: int
    top_p: float
    generator: torch.Generator


def _sampling(model: Forward, do_sample: bool, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> Sampling | None:
    """How to draw tokens, or None for greedy decoding. The arguments are checked in either case."""
    temperature, top_p = real_number("temperature", temperature), real_number("top_p", top_p)
    top_k, smallest = whole_number("top_k", top_k), torch.finfo(torch.float32).tiny
    if temperature < smallest:
        raise InputError(
            f"temperature {temperature} is not above 0 (from {smallest:.0e} on); for greedy decoding leave "
            f"do_sample=False"
        )
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p} is not in (0, 1]; 1 switches it off")
    if top_k < 0:
        raise InputError(f"top_k {top_k} is negative; 0 switches it off")
    seed = None if seed is None else whole_number("seed", seed)
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise InputError(f"seed {seed} does not fit 64 bits; give a smaller one")
    if not do_sample:
        return None
    # Even without a seed the generator is our own: a graph capture in another thread locks the device's default one.
    drawn = int(torch.randint(sys.maxsize, ())) if seed is None else seed
    return Sampling(temperature, top_k, top_p, torch.Generator(model.device).manual_seed(drawn))


def _ends(eos_token_id: Any, vocab_size: int) -> frozenset[int]:
    several = (
        isinstance(eos_token_id, set | frozenset)
        or bool(getattr(eos_token_id, "shape", ()))
        or (isinstance(eos_token_id, Sequence) and not isinstance(eos_token_id, str | bytes))
    )
    listed = whole_numbers("eos_token_id", eos_token_id if several else [eos_token_id])
    for token in listed:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"eos_token_id {token} is outside the vocabulary of {vocab_size:,} tokens (0 to {vocab_size - 1:,}); "
                f"an empty list lets a sequence go on to the end"
            )
    return frozenset(listed)


def _check_room(cache: Cache, mask: Tensor, max_new_tokens: int) -> None:
    """Raises `InputError` where the tokens do not fit. The last generated token is never fed back and needs no room."""
    for sequence, prompt in enumerate(mask.sum(-1).tolist()):
        held = cache.length[sequence]
        if held + prompt + max_new_tokens - 1 > cache.max_len:
            earlier = f" after {held:,} cached tokens" if held else ""
            raise InputError(
                f"a prompt of {prompt:,} tokens{earlier} and max_new_tokens {max_new_tokens:,} do not fit a cache of "
                f"{cache.max_len:,} tokens; shorten one of them or compile with a larger --max-len"
            )


def _prefill(model: Forward, input_ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Feed the prompts in chunks; returns the logits [B, V] of every sequence's last token, padding aside."""
    last = mask.shape[1] - 1 - mask.flip(-1).int().argmax(-1)
    found: Tensor | None = None
    for start in range(0, input_ids.shape[1], PREFILL_CHUNK):
        part = slice(start, start + PREFILL_CHUNK)
        if not bool(mask[:, part].any()):
            continue
        ending = ((last >= start) & (last < start + PREFILL_CHUNK)).nonzero().flatten()
        logits = model(input_ids[:, part], cache, attention_mask=mask[:, part], only=(ending, last[ending] - start))
        if found is None:
            found = logits.new_empty(input_ids.shape[0], logits.shape[-1])
        found[ending] = logits
    assert found is not None, "every prompt has a token, so some chunk was run"
    return found


def _choose(logits: Tensor, sampling: Sampling) -> Tensor:
    """Sample [B] from `logits` [B, V] after temperature, top-k and top-p, in this order. Raises `ArtifactError` where
    the logits are not finite."""
    scores = logits.float()
    scores = (scores - scores.amax(-1, keepdim=True)) / sampling.temperature  # the largest is 0, never infinite
    if bool(scores.isnan().any()):
        raise ArtifactError(
            f"the model's logits are not finite in {str(logits.dtype).removeprefix('torch.')}, so no token can be "
            f"drawn; load the artifact with dtype='float32', or copy it again"
        )
    if 0 < sampling.top_k < scores.shape[-1]:
        smallest = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(scores.softmax(-1), 1, generator=sampling.generator).squeeze(-1)
