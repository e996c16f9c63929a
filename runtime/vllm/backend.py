"""vLLM's attention of a planned layer, and the stores that own what its layers keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
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
from .kernels import KernelPages
from .layout import PagedLayer
from .pages import Batch, LayerPages
from .table import NOTHING, Table
from .tiered import Falling, falling

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from ..kernels import LayerKernels
    from .attach import Served


@dataclass(frozen=True)
class Metadata:
    """A group's part in a step: what `Batch` says, with the table of the group's blocks."""

    starts: Tensor
    lengths: Tensor
    table: Tensor
    longest_new: int
    longest: int
    several: range
    single: bool
    known: Sequence[tuple[int, int, int]] = ()
    orders: dict[Any, Tensor] = field(default_factory=dict)

    def batch(self, rows: Metadata) -> Batch:
        """The whole batch: `self` has the table of its pages and `rows` that of its rows."""
        bounds = (self.longest_new, self.longest, self.several, self.single, self.known)
        return Batch(self.starts, self.lengths, self.table, rows.table, *bounds, self.orders)


class Builder(AttentionMetadataBuilder[Metadata]):
    """Hands on vLLM's own tensors: the kernels of a captured graph read them at the same addresses in every step."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type == "cuda":  # sequences of one new token come first
            self._init_reorder_batch_threshold(1)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        if current_platform.is_cuda():
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        count, longest_new = common_attn_metadata.num_reqs, common_attn_metadata.max_query_len
        several, single = range(0), True
        known: list[tuple[int, int, int]] = []
        if longest_new > 1:
            starts = common_attn_metadata.query_start_loc_cpu[: count + 1]
            more = (starts.diff() > 1).nonzero().flatten().tolist()
            several = range(more[0], more[-1] + 1) if more else several
            single = len(more) < count
            lengths = common_attn_metadata.seq_lens_cpu_upper_bound
            if lengths is not None:  # exact, because nothing is speculated
                places = zip(starts.tolist(), starts[1:].tolist(), lengths[:count].tolist(), strict=False)
                known = list(places)[several.start : several.stop]
        return Metadata(
            common_attn_metadata.query_start_loc[: count + 1],
            common_attn_metadata.seq_lens[:count],
            common_attn_metadata.block_table_tensor[:count],
            longest_new,
            common_attn_metadata.max_seq_len,
            several,
            single,
            known,
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
        self.members: list[Impl] = []
        """The group's layers."""
        self._lowers: list[LayerPages | Falling] = []

    def get_attn_backend(self) -> type[AttentionBackend]:
        return Backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        from .specs import spec_of

        self.served.check_layers()
        return spec_of(self.served.pool, self.number)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache, self.blocks, self._lowers = kv_cache, kv_cache.flatten(1), []
        self.served.check_size(len(kv_cache))
        self.served.tie(len(kv_cache), kv_cache.device)

    def lower(self, told: Tensor) -> None:
        """Re-code pages of this group that lie in fewer blocks than before. `told` [n, ROW] (int64, on the device) are
        their blocks, and of each those of its further blocks from now on, 0 where it has none. Those of before are in
        `Table.ties`."""
        if not self._lowers:
            self._lowers = lowering([member.attends() for member in self.members])
        for one in self._lowers:
            one.lower(told)


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
        kernels: LayerKernels | None,
    ) -> None:
        """What the layer is, the stores of its group of pages and of rows, and where in their blocks it begins.
        `rotation` [H, key_head_dim, key_head_dim] turns keys and queries. `kernels` attend on a GPU."""
        self.layer, self.stores, self.places = layer, (pages, rows), (page_offset, row_offset)
        self.rotation, self.kernels = rotation, kernels
        pages.members.append(self)

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
            self._try(query, key, value, output)
            return output.zero_()
        rows = attn_metadata
        if self.stores[1] is not None:
            rows = get_forward_context().attn_metadata[self.stores[1].name]
        q, k, turn = query, key, self.rotation
        if turn is not None and self.kernels is None:
            q, k = (rotate_heads(part.transpose(0, 1)[None], turn)[0].transpose(0, 1) for part in (query, key))
        batch = attn_metadata.batch(rows)
        self.attends().attend_batch(q, k, value, batch, self.scale, self.softcap, self.sinks, output)
        return output

    def attends(self) -> LayerPages | KernelPages:
        """What attends over the layer's part of the pool, made anew when vLLM has made another pool."""
        pages, rows = self.stores
        if self._seen is not pages.blocks:
            self._made = self._over(pages.blocks, None if rows is None else rows.blocks, pages.served.table)
            self._seen = pages.blocks
        return self._made

    def _over(self, pages: Tensor, rows: Tensor | None, table: Table | None) -> LayerPages | KernelPages:
        served, ties = self.stores[0].served, None if table is None else table.ties
        placed: dict[str, Any] = {"pages": pages, "page_offset": self.places[0], "ties": ties}
        if self.stores[1] is not None:
            placed |= {"rows": rows, "row_offset": self.places[1], "row_block": self.stores[1].group.block}
        if self.kernels is None:
            return LayerPages.of(self.layer, served.dtype, **placed)
        rotation = None if self.rotation is None else self.rotation.to(pages.device, torch.float32)
        return KernelPages(self.layer, self.kernels, served.dtype, served.max_len, **placed, rotation=rotation)

    def _try(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Compile the kernels, on a batch of nothing, and take the memory that a prefill takes at most."""
        if self.kernels is None:
            return
        nobody = torch.zeros(1, self.stores[0].served.pool.block_bytes, dtype=torch.uint8, device=query.device)
        zeros = torch.zeros(2, 16, dtype=torch.int32, device=query.device)
        table = Table(1, query.device) if self.stores[0].served.progressive else None
        attends = self._over(nobody, nobody, table)
        for new in (1, 2):
            batch = Batch(zeros[0, :2], zeros[0, :1], zeros[:1], zeros[:1], new, 1, range(new - 1), single=True)
            attends.attend_batch(query, key, value, batch, self.scale, self.softcap, self.sinks, output)
        if table is not None:
            for one in lowering([attends]):
                one.lower(table.told(NOTHING).rows[:1])
        # where the library attends: queries as fp16, and means over two pieces of history
        halves = 3 * query.numel() * 2 if self.kernels.tuning.library_unit else 0
        torch.empty(self.kernels.tuning.prefill_scratch + halves, dtype=torch.uint8, device=query.device)


def lowering(layers: Sequence[LayerPages | KernelPages]) -> list[LayerPages | Falling]:
    """What lowers the pages of these layers."""
    by_torch = [layer for layer in layers if isinstance(layer, LayerPages)]
    return [*by_torch, *falling([layer for layer in layers if isinstance(layer, KernelPages)])]
