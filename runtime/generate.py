"""Text generation: prefill in chunks, then token by token. Knows nothing about tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import Cache
from .errors import InputError
from .graph import GraphDecoder

if TYPE_CHECKING:
    from .model import CompiledModel

PREFILL_CHUNK = 4096
"""Tokens of each prompt that are fed at once: one prompt of as many fills a GPU, and activations are bounded."""
Streamer = Callable[[Tensor], None]


def generate(
    model: CompiledModel,
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
    `eos_token_id` (the model's own unless given; an empty sequence: never) and is filled with the pad token.
    `streamer` is called with every new column [B]. With a `cache` of earlier turns, `input_ids` are the tokens that
    follow it.

    Raises `InputError` before anything is changed where the prompt is empty or the cache cannot hold what is asked for.
    """
    _check_sampling(max_new_tokens, temperature, top_p, top_k)
    mask = model.check_inputs(input_ids, attention_mask)
    if bool((mask.sum(-1) == 0).any()):
        raise InputError("a prompt is empty; give every sequence at least one token")
    cache = model.new_cache(batch_size=input_ids.shape[0]) if cache is None else cache
    _check_room(cache, mask, max_new_tokens)
    ends = model.eos_token_ids if eos_token_id is None else _as_set(eos_token_id)
    pad = model.pad_token_id if model.pad_token_id is not None else min(ends, default=0)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)

    logits = _prefill(model, input_ids.to(model.device), mask, cache)
    running = torch.ones(input_ids.shape[0], dtype=torch.bool, device=model.device)
    columns = [input_ids.to(model.device)]
    decode = decoder(model, cache)
    for step in range(max_new_tokens):
        chosen = _choose(logits, temperature, top_k, top_p, generator) if do_sample else logits.argmax(-1)
        chosen = torch.where(running, chosen, pad)
        columns.append(chosen.unsqueeze(-1))
        if streamer is not None:
            streamer(chosen)
        for end in ends:
            running &= chosen != end
        if step + 1 == max_new_tokens or (ends and not bool(running.any())):
            break
        logits = decode(chosen, running)
    return torch.cat(columns, dim=-1)


def decoder(model: CompiledModel, cache: Cache) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes logits [B, V] of the next tokens [B] of the sequences that are running [B]: one CUDA graph where
    generated kernels attend on a CUDA device, a call of the model elsewhere."""
    if cache.kernels is not None and model.device.type == "cuda":
        return GraphDecoder(model, cache)
    return lambda tokens, running: model(tokens.unsqueeze(-1), cache, attention_mask=running.unsqueeze(-1))[:, -1]


def _as_set(eos_token_id: int | Sequence[int]) -> frozenset[int]:
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _check_sampling(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} generates nothing; ask for at least 1")
    if temperature <= 0:
        raise InputError(f"temperature {temperature} is not above 0; for greedy decoding leave do_sample=False")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p} is not in (0, 1]; 1 switches it off")
    if top_k < 0:
        raise InputError(f"top_k {top_k} is negative; 0 switches it off")


def _check_room(cache: Cache, mask: Tensor, max_new_tokens: int) -> None:
    """The last token that is generated is never fed back, so it needs no room."""
    for sequence, prompt in enumerate(mask.sum(-1).tolist()):
        held = cache.length[sequence]
        if held + prompt + max_new_tokens - 1 > cache.max_len:
            earlier = f" after {held:,} cached tokens" if held else ""
            raise InputError(
                f"a prompt of {prompt:,} tokens{earlier} and max_new_tokens {max_new_tokens:,} do not fit a cache of "
                f"{cache.max_len:,} tokens; shorten one of them or compile with a larger --max-len"
            )


def _prefill(model: CompiledModel, input_ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Feed the prompts in chunks; logits [B, V] of every sequence's last own token."""
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


def _choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Sample [B] from `logits` [B, V] after temperature, top-k and top-p, in this order."""
    scores = logits.float() / temperature
    if 0 < top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, float("-inf"))
    if top_p < 1:
        ordered, order = scores.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))
    return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(-1)
