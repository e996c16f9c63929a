"""What kernels do with pages of several tiers beside attending to them: they sort them, and lower those that fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import LayerKernels
from .layout import PagedLayer
from .pages import Batch

if TYPE_CHECKING:
    from .kernels import KernelPages

SORTED_AT_ONCE = 512
"""Pages of a sequence that a program sorts at a time."""


def order_of(kernels: LayerKernels, layer: PagedLayer, ties: Tensor, batch: Batch) -> Tensor:
    """In which order sequences of one new token read a layer's pages: [B, width] (int32), as the kernel says."""
    width = layer.highest_tier * batch.page_table.shape[1]
    order = batch.page_table.new_empty(batch.count, 4 + -(-width // 4) * 4)
    kernels.module.sort_pages[(batch.count,)](
        order,
        batch.starts,
        batch.lengths,
        batch.page_table,
        ties,
        batch.page_table.stride(0),
        order.stride(0),
        layer.window,
        tie_width=ties.stride(0),
        HIGHEST=layer.highest_tier,
        CHUNK=SORTED_AT_ONCE,
        num_warps=4,
    )
    return order


@dataclass(frozen=True)
class Falling:
    """Layers of a group whose pages fall in one launch, because they have the same kernels and final bits: one of them,
    and where each begins in a block of pages (`offsets`, bytes)."""

    one: KernelPages
    offsets: Tensor

    def lower(self, told: Tensor) -> None:
        """`LayerPages.lower` of all these layers."""
        layer, pages, ties = self.one.layer, self.one.pages, self.one.ties
        assert ties is not None
        self.one.kernels.module.lower_pages[(len(told), layer.heads, 2 * len(self.offsets))](
            pages.view(torch.int16),
            told,
            ties,
            self.offsets,
            pages.stride(0),
            layer.record_bytes,
            told_width=told.stride(0),
            tie_width=ties.stride(0),
            KEY_BITS=layer.plan.key_bits,
            VALUE_BITS=layer.plan.value_bits,
            HIGHEST=layer.highest_tier,
            num_warps=self.one.kernels.tuning.lower_warps,
        )


def falling(layers: Sequence[KernelPages]) -> list[Falling]:
    """What lowers the pages of a group with these layers, in as few launches as possible."""
    alike: dict[tuple[int, int, int], list[KernelPages]] = {}
    for one in layers:
        if one.ties is not None and one.layer.highest_tier > 1:
            plan = one.layer.plan
            alike.setdefault((id(one.kernels.module), plan.key_bits, plan.value_bits), []).append(one)
    return [
        Falling(
            some[0], torch.tensor([one.page_offset for one in some], dtype=torch.int32, device=some[0].pages.device)
        )
        for some in alike.values()
    ]
