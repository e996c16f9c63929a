"""Run a transformers model with every attention observed, whatever the architecture.

The model's own code computes everything but the attention itself, which transformers takes from a registry: there
stands a function that shows its operands (K after RoPE, V as it enters attention) to an observer and then attends.
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

ATTENTION = "pmkvq_calibrate"
"""The `attn_implementation` of a model that is to be observed."""


@dataclass(frozen=True)
class AttentionCall:
    """The operands of one layer's attention.

    `query` [B, Hq, S, dk], `key` [B, Hkv, S, dk], `value` [B, Hkv, S, dv]; `mask` (bool, True where a query sees a key)
    broadcasts to [B, Hq, S, S], None being plain causality; `sinks` [Hq] are logits that only take probability away.
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
        """The same call for the queries at `positions` (int64) alone; they still see their whole past."""
        return replace(self, query=self.query[..., positions, :], mask=self._visible()[..., positions, :])

    def detached(self) -> AttentionCall:
        """The same call in float32, outside of any gradient's way."""
        query, key, value = (x.detach().float() for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def output(self, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        """The attention [B, Hq, S, dv], with other keys and values if given; batches of one broadcast."""
        key, value = self.key if key is None else key, self.value if value is None else value
        if self.mask is None and self.softcap is None and self.sinks is None:
            return F.scaled_dot_product_attention(
                self.query, key, value, is_causal=True, scale=self.scaling, enable_gqa=True
            )
        return self.values_under(self.weights(self.scores(self.query, key)), value)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """q . k [B, Hq, queries, keys], scaled and soft-capped."""
        groups = (key.shape[1], query.shape[1] // key.shape[1])
        query = query.unflatten(1, groups).flatten(2, 3)  # a key head's queries side by side: one product
        scores = (query @ key.transpose(-1, -2) * self.scaling).unflatten(2, (groups[1], -1)).flatten(1, 2)
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def weights(self, scores: Tensor, visible: Tensor | None = None) -> Tensor:
        """Softmax of scores over the keys that each query may see: this call's own ones unless `visible` (bool)."""
        visible = self._visible() if visible is None else visible
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        if self.sinks is None:
            return scores.softmax(dim=-1)
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks.to(scores.dtype)], dim=-1).softmax(dim=-1)[..., :-1]

    def values_under(self, weights: Tensor, value: Tensor) -> Tensor:
        """Sums [B, Hq, queries, dv] of values under weights [B, Hq, queries, keys]."""
        groups = (value.shape[1], weights.shape[1] // value.shape[1])
        weights = weights.unflatten(1, groups).flatten(2, 3)
        return (weights @ value).unflatten(2, (groups[1], -1)).flatten(1, 2)

    def _visible(self) -> Tensor:
        if self.mask is not None:
            return self.mask
        length = self.key.shape[-2]
        return torch.ones(length, length, dtype=torch.bool, device=self.key.device).tril()


@contextmanager
def observed(observe: Callable[[AttentionCall], Tensor | None]) -> Iterator[None]:
    """Within, models whose `attn_implementation` is `ATTENTION` show each attention to `observe` before it is done.

    What `observe` returns, if anything, takes the place of the attention's output [B, Hq, S, dv].
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
        output = observe(call)
        return (call.output() if output is None else output).transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attention)
    yield


AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionInterface.register(ATTENTION, AttentionInterface()["sdpa"])


def run(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, last: int = 0) -> Tensor:
    """Logits [B, S, V] of a model at the given positions (int64 [B, S]), or those of the `last` tokens alone.

    The mask of ones keeps transformers from reading positions that do not follow each other as packed sequences.
    """
    logits: Tensor = model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=torch.ones_like(input_ids),
        use_cache=False,
        logits_to_keep=last,
    ).logits
    return logits[:, -last:]
