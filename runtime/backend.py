"""What attends over a layer's cache: the interface of the reference path, of generated kernels, and of whatever comes.

A backend is a class with the members of `Attention`. `Cache.attend_by` puts an object of it into each layer's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .layer_cache import LayerCache


@dataclass(frozen=True)
class NewTokens:
    """Which tokens a call of the model adds to each sequence. All layers are told the same."""

    columns: Sequence[slice]
    """The columns of `q`, `k` and `v` that are each sequence's own; the rest is padding."""
    state: Tensor | None
    """What the device knows of the call, for attention that is `replayable`; see `Cache.state`."""

    @property
    def counts(self) -> list[int]:
        """New tokens of each sequence."""
        return [own.stop - own.start for own in self.columns]


class Attention(Protocol):
    """What attends over the cache of one layer, adds new tokens to it, and lowers it."""

    @property
    def name(self) -> str:
        """What people call it: "reference", "triton", or the target of compiled kernels, such as "sm_90"."""

    @property
    def replayable(self) -> bool:
        """Whether it reads the lengths of sequences in `NewTokens.state`, where steps of a captured CUDA graph count
        them. The host then counts later, and lowers the layer between replays."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Causal attention [B, Hq, S, value_head_dim] of new tokens over those in `store` and themselves, in the dtype
        of `q`; the new tokens are in `store` afterwards, which is lowered where they do not fit.

        `q` is [B, Hq, S, key_head_dim], `k` [B, Hkv, S, key_head_dim], `v` [B, Hkv, S, value_head_dim] and `sinks`
        [Hq]. Padding columns of the result hold zeros.
        """

    def lower(self, store: LayerCache, state: Tensor | None) -> None:
        """Rewrite what `store` holds at its next stage, within `store.lowering()`. `state` is that of `NewTokens`."""


def lower_until_fit(attention: Attention, store: LayerCache, state: Tensor | None, counts: Sequence[int]) -> None:
    """Lower a layer until `counts` new tokens of the sequences fit."""
    for _ in store.stages_until_fit(counts):
        attention.lower(store, state)
