"""Run a transformers model of any architecture and observe the operands of every attention.

The model's own code computes everything but the attention itself, which transformers looks up in a registry. We
register a function that first shows its operands (K after RoPE, V as it enters attention) to an observer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from pmkvq_compiler.source.state_functions import own_functions

ATTENTION = "pmkvq_calibrate"
"""The `attn_implementation` to load a model with, if it is to be observed."""


@dataclass(frozen=True)
class AttentionCall:
    """The operands of one layer's attention.

    `query` is [B, Hq, S, dk], `key` [B, Hkv, S, dk] and `value` [B, Hkv, S, dv]. `mask` (bool, True where a query sees
    a key) broadcasts to [B, Hq, S, S]; None means plain causal attention. `sinks` [Hq] are logits without a value: they
    take part in the softmax and only take probability away. `layer` is the one in whose cache `key` and `value` are.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None

    def at(self, positions: Tensor) -> AttentionCall:
        """The same call for only the queries at `positions` (int64), which still see their whole past."""
        return replace(self, query=self.query[..., positions, :], mask=self._visible()[..., positions, :])

    def detached(self) -> AttentionCall:
        """The same call in float32, detached from autograd."""
        query, key, value = (x.detach().float() for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def output(self, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """The attention's output [B, Hq, S, dv], with other keys and values if given. Batches of one broadcast."""
        key, value = self.key if key is None else key, self.value if value is None else value
        if self.mask is None and self.softcap is None and self.sinks is None:
            return F.scaled_dot_product_attention(
                self.query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True
            )
        return self.values_under(self.weights(self.scores(self.query, key)), value)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """q . k [B, Hq, queries, keys], scaled and soft-capped."""
        groups = (key.shape[1], query.shape[1] // key.shape[1])
        query = query.unflatten(1, groups).flatten(2, 3)  # one matrix product for all queries of a key head
        scores = (query @ key.transpose(-1, -2) * self.scaling).unflatten(2, (groups[1], -1)).flatten(1, 2)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def weights(self, scores: Tensor, visible: Tensor | None = None) -> Tensor:
        """Softmax of scores over the keys that each query may see: by this call's mask, or by `visible` (bool)."""
        visible = self._visible() if visible is None else visible
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        if self.sinks is None:
            return scores.softmax(dim=-1)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks.to(scores.dtype)], dim=-1).softmax(dim=-1)[..., :-1]

    def values_under(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sums [B, Hq, queries, dv] of the values, weighted by `weights` [B, Hq, queries, keys]."""
        groups = (value.shape[1], weights.shape[1] // value.shape[1])
        weights = weights.unflatten(1, groups).flatten(2, 3)
        return (weights @ value).unflatten(2, (groups[1], -1)).flatten(1, 2)

    def _visible(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        length = self.key.shape[-2]
        return torch.ones(length, length, dtype=torch.bool, device=self.key.device).tril()


Seen = tuple[AttentionCall, Callable[[Tensor], Tensor]]
"""A call in another form, and how to make the output of the first form from its output."""


@contextmanager
def observed(
    observe: Callable[[AttentionCall], Tensor | None], seen: Callable[[AttentionCall], Seen] | None = None
) -> Iterator[None]:
    """Within, models whose `attn_implementation` is `ATTENTION` call `observe` with each attention before computing it.

    If `observe` returns a tensor [B, Hq, S, dv], it is used as the attention's output. `seen` may turn the call into
    another one for it (see `Caches`), and says how to make the model's output of that call's.
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        call = AttentionCall(
            layer=int(module.layer_idx),  # type: ignore[arg-type]
            query=query,
            key=key,
            value=value,
            mask=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap,
            sinks=s_aux,
        )
        call, restore = (call, None) if seen is None else seen(call)
        output = observe(call)
        output = call.output() if output is None else output
        return (output if restore is None else restore(output)).transpose(1, 2).contiguous(), None

    before = AttentionInterface()[ATTENTION]
    AttentionInterface.register(ATTENTION, attention)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION, before)  # else the observer, and the model that it knows, would stay


AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionInterface.register(ATTENTION, AttentionInterface()["sdpa"])


def run(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, last: int = 0) -> Tensor:
    """Logits [B, S, V] of a model at the given positions (int64 [B, S]), or only those of the `last` tokens.

    The mask of ones is needed because transformers would otherwise take positions with gaps for packed sequences. The
    last tokens are given by their places, because given their number, some architectures run layers for them alone. The
    places are no tensor, because it would have to be on the device of the last layer.
    """
    length = input_ids.shape[1]
    kept = slice(max(0, length - last), length) if last else 0
    with own_functions(model):
        logits: Tensor = model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=torch.ones_like(input_ids),
            use_cache=False,
            logits_to_keep=kept,
        ).logits
    return logits[:, -last:]
