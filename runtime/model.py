"""A loaded artifact: weights, the generated forward function and the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import Cache
from .errors import InputError
from .generate import Streamer, generate
from .kernels import LayerKernels
from .plan import CachePlan


@dataclass(frozen=True)
class CompiledModel:
    """Call it for logits, or let it generate.

    `hidden_states(input_ids, position_ids, cache) -> [B, S, hidden_size]` and `logits(hidden) -> [..., vocab_size]` are
    the artifact's `model.py` with the `weights` bound: tensors by their names in the checkpoint, and constants.
    """

    plan: CachePlan
    weights: dict[str, Tensor]
    hidden_states: Callable[[Tensor, Tensor, Cache], Tensor]
    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    eos_token_ids: frozenset[int]
    pad_token_id: int | None
    dtype: torch.dtype
    device: torch.device
    kernels: Sequence[LayerKernels] | None = None
    """The generated kernels of every layer; None where the reference path attends."""

    @property
    def kernels_from(self) -> str:
        """What made the kernels: "triton", when they are first launched, or the compiler, for a target such as "sm_90";
        "reference" where there are none."""
        return "reference" if self.kernels is None else getattr(self.kernels[0].module, "target", "triton")

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        only: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, S, vocab_size] of the tokens `input_ids` [B, S] that follow the cached ones, which they then join.

        `attention_mask` [B, S] marks padding (0), at either end of a row; padding is neither attended to nor cached,
        and its logits mean nothing. `position_ids` [B, S] follow each sequence's length unless given. Without a
        `cache` a temporary one is used. `only=(rows, columns)` asks for the logits [N, vocab_size] of some tokens.

        Raises `InputError` for unusable input and `CacheFull` where the tokens do not fit; nothing is changed then.
        """
        mask = self.check_inputs(input_ids, attention_mask)
        if cache is None:
            cache = self.new_cache(batch_size=input_ids.shape[0], max_len=int(mask.sum(-1).max()))
        if cache.batch_size != input_ids.shape[0]:
            raise InputError(
                f"input_ids have {input_ids.shape[0]} rows and the cache {cache.batch_size} sequences; "
                f"make a cache with new_cache(batch_size={input_ids.shape[0]})"
            )
        columns = _own_columns(mask)
        if position_ids is None:
            position_ids = _following_positions(cache.length, columns, input_ids.shape[1])
        cache.begin(columns)
        hidden = self.hidden_states(input_ids.to(self.device), position_ids.to(self.device), cache)
        cache.end()
        return self.logits(hidden if only is None else hidden[only])

    def check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The attention mask as booleans [B, S], after a check of both. Raises `InputError`."""
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise InputError(
                f"input_ids must be integers [batch, tokens], got {input_ids.dtype} {list(input_ids.shape)}"
            )
        if input_ids.numel() == 0:
            raise InputError("the prompt is empty; give at least one token")
        low, high = (int(bound) for bound in torch.aminmax(input_ids))
        if low < 0 or high >= self.vocab_size:
            raise InputError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size:,} tokens "
                f"(0 to {self.vocab_size - 1:,}); was the text encoded with this model's tokenizer?"
            )
        if attention_mask is None:
            return torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask.shape != input_ids.shape:
            raise InputError(
                f"attention_mask has shape {list(attention_mask.shape)} and input_ids {list(input_ids.shape)}; "
                f"give one mask value for each new token"
            )
        return attention_mask.bool()

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> Cache:
        """An empty cache for sequences of up to `max_len` tokens (as many as the budget allows unless given)."""
        return Cache(self.plan, batch_size, max_len, self.dtype, self.device, self.kernels)

    def generate(
        self,
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
        """Continue prompts [B, S] by up to `max_new_tokens`; see `pmkvq_compiler.runtime.generate.generate`."""
        options: dict[str, Any] = {
            "do_sample": do_sample,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "eos_token_id": eos_token_id,
            "seed": seed,
            "streamer": streamer,
            "attention_mask": attention_mask,
            "cache": cache,
        }
        return generate(self, input_ids, max_new_tokens, **options)


def _own_columns(mask: Tensor) -> list[slice]:
    """Each row's run of ones in `mask` [B, S]. Raises `InputError` where a row has more than one run."""
    if bool(mask.all()):
        return [slice(0, mask.shape[1])] * mask.shape[0]
    runs = []
    for row, values in enumerate(mask.tolist()):
        count = sum(values)
        start = values.index(True) if count else 0
        if not all(values[start : start + count]):
            raise InputError(f"attention_mask row {row} has padding between tokens; put padding at one end of the row")
        runs.append(slice(start, start + count))
    return runs


def _following_positions(lengths: list[int], columns: list[slice], count: int) -> Tensor:
    starts = torch.tensor([length - own.start for length, own in zip(lengths, columns, strict=True)])
    return (starts.unsqueeze(-1) + torch.arange(count)).clamp_(min=0)
