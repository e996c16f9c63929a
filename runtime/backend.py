"""The interface of attention backends, which the reference path and the generated kernels implement.

A backend is a class with the members of `Attention`. `Cache.attend_by` takes one object for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .layer_cache import LayerCache
from .records import state_row


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a call of the model adds to each sequence; the same for all layers."""

    columns: Sequence[slice]
    """For each sequence, the columns of `q`, `k` and `v` that are tokens; the rest is padding."""
    state: Tensor | None
    """Lengths and counts in device memory, for `replayable` attention; see `Cache.state`."""

    @property
    def counts(self) -> list[int]:
        """New tokens of each sequence."""
        return [own.stop - own.start for own in self.columns]

    def fill(self, width: int) -> bool:
        """Whether all of a call's `width` columns are known to be tokens, in every sequence."""
        return all(own.start == 0 and own.stop == width for own in self.columns)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first column of each sequence's tokens, and their count [B]. Where a captured CUDA graph counts tokens,
        its counts are meant."""
        if self.state is not None:
            return self.state[state_row("start")].long(), self.state[state_row("count")].long()
        starts = [own.start for own in self.columns]
        return torch.tensor(starts, device=device), torch.tensor(self.counts, device=device)


class Attention(Protocol):
    """The backend of one layer: it attends over the layer's cache, adds new tokens to it, and lowers its codes.

    Only models whose layers share caches need `read` and `append`.
    """

    @property
    def name(self) -> str:
        """The name to show: "reference", "triton", or the target of compiled kernels, such as "sm_90"."""

    @property
    def replayable(self) -> bool:
        """Whether it reads the lengths of sequences from `NewTokens.state`, where a captured CUDA graph counts them.
        The host then counts later, and lowers the layer between replays."""

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
        of `q`. It also adds the new tokens to `store`, which it lowers first if they do not fit.

        `q` is [B, Hq, S, key_head_dim], `k` [B, Hkv, S, key_head_dim], `v` [B, Hkv, S, value_head_dim] and `sinks`
        [Hq]. Padding columns of the result hold zeros.
        """

    def read(
        self,
        q: Tensor,
        waiting: tuple[Tensor, Tensor] | None,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """`attend` for layers that share a cache; it adds nothing to `store`.

        `waiting` are K and V of the new tokens, which `append` adds when all of these layers have attended. None means
        that `store` has them already; that is so in calls of one column.
        """

    def append(self, k: Tensor, v: Tensor, store: LayerCache, new: NewTokens) -> None:
        """Add new tokens to `store`, which is lowered first if they do not fit."""

    def lower(self, store: LayerCache, state: Tensor | None) -> None:
        """Rewrite the codes in `store` at the bits of its next stage, inside `with store.lowering()`. `state` is that
        of `NewTokens`."""


def lower_until_fit(attention: Attention, store: LayerCache, state: Tensor | None, counts: Sequence[int]) -> None:
    """Lower a layer until `counts` new tokens of the sequences fit."""
    for _ in store.stages_until_fit(counts):
        attention.lower(store, state)
