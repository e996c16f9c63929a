"""The forward pass: checks what a caller passes, then calls the generated functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backend import Attention
from .cache import Cache
from .errors import InputError
from .fused import PLAIN, Ops
from .inputs import chosen_tokens, padding_mask, positions_of, token_ids
from .plan import CachePlan
from .recurrence import computed_by


@dataclass(frozen=True, eq=False)
class Forward:
    """A model to be called for logits. Threads may share it; each needs its own cache.

    `hidden_states(input_ids, position_ids, cache, ops) -> [B, S, hidden_size]` and
    `logits(hidden) -> [..., vocab_size]` are the functions of the artifact's `model.py`, bound to the `weights`:
    tensors by their names in the checkpoint, and constants.
    """

    plan: CachePlan
    weights: dict[str, Tensor]
    hidden_states: Callable[[Tensor, Tensor, Cache, Ops], Tensor]
    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    eos_token_ids: frozenset[int]
    pad_token_id: int | None
    dtype: torch.dtype
    device: torch.device
    attention: Sequence[Attention]
    """The backend of each layer."""
    ops: Ops = PLAIN
    """What computes the ops that passes made of several others."""

    @property
    def kernels_from(self) -> str:
        """Where the kernels come from: "triton", which compiles them at their first launch, the target of kernels that
        were compiled with the artifact, such as "sm_90", or "reference", which has none."""
        return ", ".join(dict.fromkeys(one.name for one in self.attention))

    @property
    def recurrences_from(self) -> str:
        """What computes the linear recurrences (gated delta rules and Mamba scans): "reference", which is plain
        PyTorch, or flash-linear-attention with its version, such as "fla 0.6.0"; empty where the model has none.

        Asking imports the library where it would be used. A failure of it, then or later, is a warning."""
        states = (state for state in self.plan.states if state.is_recurrence)
        names = (computed_by(state.shape, self.dtype, self.device, self.attention) for state in states)
        return ", ".join(dict.fromkeys(names))

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        only: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Logits [B, S, vocab_size] of the tokens `input_ids` [B, S], which follow the cached ones and are added to the
        cache.

        `attention_mask` [B, S] marks padding (0), at either end of a row; padding is neither attended to nor cached,
        and its logits mean nothing. `position_ids` [B, S] continue each sequence by default. Without a `cache` a
        temporary one is used. `only=(rows, columns)` asks for the logits [N, vocab_size] of some tokens.

        Raises `InputError` for unusable input and `CacheFull` where the tokens do not fit; nothing is changed then. If
        any other exception ends a call, the cache is as it was, or refuses everything but `reset`.
        """
        ids, mask = self.check_inputs(input_ids, attention_mask)
        columns = _own_columns(mask)
        positions = None if position_ids is None else self.check_positions(position_ids, mask)
        chosen = None if only is None else chosen_tokens(only, ids.shape)
        if cache is None:
            cache = self.new_cache(batch_size=ids.shape[0], max_len=int(mask.sum(-1).max()))
        self.check_cache(cache, ids.shape[0])
        with cache.claims.claim(), current(self.device):
            cache.begin(columns)
            if positions is None:
                positions = _following_positions(cache.length, columns, ids.shape[1])
            hidden = self.hidden_states(ids.to(self.device), positions.to(self.device), cache, self.ops)
            logits = self.logits(hidden if chosen is None else hidden[chosen])
            cache.end()
        return logits

    def check_inputs(self, input_ids: Any, attention_mask: Any) -> tuple[Tensor, Tensor]:
        """Check both arguments; returns the token ids [B, S] as int64 and the mask [B, S] as booleans on the CPU.

        Ids may be of any integer dtype, and arrays or lists of lists. Raises `InputError`.
        """
        ids = token_ids(input_ids, self.vocab_size)
        return ids, padding_mask(attention_mask, ids.shape)

    def check_positions(self, position_ids: Any, mask: Tensor) -> Tensor:
        """`position_ids` [B, S] as int64 on the CPU, for a mask that `check_inputs` gave. Raises `InputError`."""
        return positions_of(position_ids, mask, self.plan.max_len)

    def check_cache(self, cache: Any, sequences: int) -> None:
        """Raises `InputError` where a cache does not fit this model and the number of `sequences`. A cache that comes
        from a file, another process or another device gets this model's attention."""
        if not isinstance(cache, Cache):
            raise InputError(f"the cache is a {type(cache).__name__}; make one with the model's new_cache()")
        if cache.plan is not self.plan and _shapes(cache.plan) != _shapes(self.plan):
            raise InputError("the cache is another model's: its layers differ; make one with this model's new_cache()")
        here = self.device.type, cache.device.index if self.device.index is None else self.device.index
        if here != (cache.device.type, cache.device.index):
            raise InputError(
                f"the cache is on {cache.device} and the model on {self.device}; move it with the cache's "
                f'to("{self.device}") or make a new one'
            )
        if cache.batch_size != sequences:
            raise InputError(
                f"input_ids have {sequences} rows and the cache {cache.batch_size} sequences; "
                f"make a cache with new_cache(batch_size={sequences})"
            )
        if cache.attention is not self.attention and cache.plan == self.plan:
            cache.attend_by(self.attention)

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> Cache:
        """An empty cache for sequences of up to `max_len` tokens (as many as the budget allows unless given)."""
        return Cache(self.plan, batch_size, max_len, self.dtype, self.device, self.attention)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within, `device` is torch's current one, for which Triton launches kernels and graphs are captured."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _shapes(plan: CachePlan) -> tuple[Any, ...]:
    """What the model, not the plan, determines about every layer's cache."""
    shapes = [
        (layer.num_key_value_heads, layer.key_head_dim, layer.value_head_dim, layer.sliding_window)
        for layer in plan.layers
    ]
    return shapes, plan.places, plan.states


def _own_columns(mask: Tensor) -> list[slice]:
    """The columns of each row's tokens, one run of ones in `mask` [B, S]. Raises `InputError` for more than one run."""
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
