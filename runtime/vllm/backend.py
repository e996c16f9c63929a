"""vLLM's attention of a planned layer, and the stores that own what its layers keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)

from ..errors import InputError
from ..rotation import rotate_heads
from .layout import PagedLayer
from .pages import LayerPages, Step

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from .attach import Served


@dataclass(frozen=True)
class Metadata:
    """A group's part in a step: where each sequence's new tokens begin in the batch (and where the last ones end), the
    lengths of the sequences with them, and the table of their blocks."""

    starts: list[int]
    lengths: list[int]
    table: Tensor


class Builder(AttentionMetadataBuilder[Metadata]):
    """The reference path goes from sequence to sequence, so it wants lengths on the host."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        count = common_attn_metadata.num_reqs
        return Metadata(
            common_attn_metadata.query_start_loc_cpu[: count + 1].tolist(),
            common_attn_metadata.seq_lens[:count].tolist(),
            common_attn_metadata.block_table_tensor[:count],
        )


class Backend(AttentionBackend):
    """One for all formats: what a layer's pages look like is known to the layer."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012 - vLLM declares it so
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Store(AttentionLayerBase):
    """The blocks of one group: in vLLM's eyes a layer that owns a cache, which the group's layers share."""

    def __init__(self, served: Served, number: int) -> None:
        self.served, self.number = served, number
        self.group = served.pool.groups[number]
        self.name = f"pmkvq_{self.group.kind}.{number}"
        self.kv_cache = self.blocks = torch.empty(0, 0, dtype=torch.uint8)
        """`blocks` [N, block_bytes] (uint8)."""

    def get_attn_backend(self) -> type[AttentionBackend]:
        return Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        from .specs import spec_of

        self.served.check_layers()
        return spec_of(self.served.pool, self.number)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache, self.blocks = kv_cache, kv_cache.flatten(1)
        self.served.check_size(len(kv_cache))


class Impl(AttentionImpl[Metadata]):
    """Attention of one layer, once `attach` has told it which."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        asked = [name for name, value in others.items() if value not in (None, False, -1)]
        asked += ["alibi_slopes"] * (alibi_slopes is not None)
        if asked:
            raise InputError(
                f"the model's attention has {asked[0]}, which packed pages do not know; serve the original model"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype, self.sinks = kv_cache_dtype, sinks
        self.softcap = logits_soft_cap or None
        self._seen: Tensor | None = None

    def attach(
        self,
        layer: PagedLayer,
        pages: Store,
        page_offset: int,
        rows: Store | None,
        row_offset: int,
        rotation: Tensor | None,
    ) -> None:
        """What the layer is, the stores of its group of pages and of rows, and where in their blocks it begins.
        `rotation` [H, key_head_dim, key_head_dim] turns keys and queries."""
        self.layer, self.stores, self.places = layer, (pages, rows), (page_offset, row_offset)
        self.rotation = rotation

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """`query` [T, Hq, key_head_dim], `key` and `value` [T, H, d] of all new tokens, to `output` [T, Hq, dv]."""
        if attn_metadata is None:  # a trial run that measures memory
            return output.zero_()
        pages, views = attn_metadata, self._views()
        rows = pages if self.stores[1] is None else get_forward_context().attn_metadata[self.stores[1].name]
        q, k, v = (part.transpose(0, 1) for part in (query, key, value))
        if self.rotation is not None:
            turn = self.rotation = self.rotation.to(query.device)
            q, k = rotate_heads(q[None], turn)[0], rotate_heads(k[None], turn)[0]
        steps = {}
        for number, length in enumerate(pages.lengths):
            own = slice(pages.starts[number], pages.starts[number + 1])
            if own.start < own.stop:
                cached = length - (own.stop - own.start)
                steps[own.start] = Step(k[:, own], v[:, own], cached, pages.table[number], rows.table[number])
        for step in steps.values():
            views.write_tokens(step)
        for step in steps.values():
            views.write_blocks(step)
        for start, step in steps.items():
            own = slice(start, start + step.keys.shape[1])
            output[own] = views.attend(q[:, own], step, self.scale, self.softcap, self.sinks).transpose(0, 1)
        return output

    def _views(self) -> LayerPages:
        """The layer's views of the pool, made anew when vLLM has made another pool."""
        pages, rows = self.stores
        if self._seen is not pages.blocks:
            placed = () if rows is None else (rows.blocks, self.places[1], rows.group.block)
            self._pages = LayerPages.of(self.layer, pages.served.dtype, pages.blocks, self.places[0], *placed)
            self._seen = pages.blocks
        return self._pages
