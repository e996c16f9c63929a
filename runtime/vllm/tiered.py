"""What kernels do with pages of several tiers beside attending to them: they sort them, and lower those that fall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """Layers of a group whose pages fall in one launch, because they have the same kernels and final bits: what they
    are launched with, which is the same every time but for the pages."""

    kernel: Any
    grid: tuple[int, int]
    words: Tensor
    others: tuple[Any, ...]
    constants: dict[str, int]

    @classmethod
    def of(cls, layers: Sequence[KernelPages]) -> Falling:
        one = layers[0]
        layer, pages, ties = one.layer, one.pages, one.ties
        assert ties is not None
        offsets = torch.tensor([some.page_offset for some in layers], dtype=torch.int32, device=pages.device)
        constants = {
            "tie_width": ties.stride(0),
            "KEY_BITS": layer.plan.key_bits,
            "VALUE_BITS": layer.plan.value_bits,
            "HIGHEST": layer.highest_tier,
            "num_warps": one.kernels.tuning.lower_warps,
        }
        others = (ties, offsets, pages.stride(0), layer.record_bytes)
        grid = (layer.heads, 2 * len(layers))
        return cls(one.kernels.module.lower_pages, grid, pages.view(torch.int16), others, constants)

    def lower(self, told: Tensor) -> None:
        """`LayerPages.lower` of all these layers."""
        grid = (len(told), *self.grid)
        self.kernel[grid](self.words, told, *self.others, told_width=told.stride(0), **self.constants)


def falling(layers: Sequence[KernelPages]) -> list[Falling]:
    """What lowers the pages of a group with these layers, in as few launches as possible."""
    alike: dict[tuple[int, int, int], list[KernelPages]] = {}
    for one in layers:
        if one.ties is not None and one.layer.highest_tier > 1:
            plan = one.layer.plan
            alike.setdefault((id(one.kernels.module), plan.key_bits, plan.value_bits), []).append(one)
    return [Falling.of(some) for some in alike.values()]
