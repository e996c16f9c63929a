"""vLLM's attention of a planned layer, and the stores that own what its layers keep."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
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
from ..records import STATE
from ..rotation import rotate_heads
from ..tuning import Tuning
from .kernels import PagedKernels, Tables, tell
from .layout import PagedLayer
from .pages import LayerPages, Step

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from .attach import Served


@dataclass(frozen=True)
class Metadata:
    """A group's part in a step, for the reference: where each sequence's new tokens begin in the batch (and where the
    last ones end), the lengths of the sequences with them, and the table of their blocks."""

    starts: list[int]
    lengths: list[int]
    table: Tensor


@dataclass(frozen=True)
class DeviceMetadata:
    """The same for kernels, which know sequences by `state`. The first `singles` of them have at most one new token
    each, and none has more than `most_new`."""

    state: Tensor
    table: Tensor
    count: int
    singles: int
    most_new: int

    def parts(self, rows: DeviceMetadata) -> list[Tables]:
        """Sequences of one new token, and all others."""
        cuts = [(0, self.singles, 1), (self.singles, self.count, self.most_new)]
        return [
            Tables(self.state[:, first:last], self.table[first:last], rows.table[first:last], last - first, most)
            for first, last, most in cuts
            if first < last
        ]


class Builder(AttentionMetadataBuilder[Any]):
    """Where kernels attend, the host looks at nothing that the device knows, so that a step of single tokens can be a
    CUDA graph. The reference path goes from sequence to sequence and wants their lengths."""

    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        most = max(vllm_config.scheduler_config.max_num_seqs, *_captured(vllm_config), 1)
        self.state = torch.zeros(len(STATE), most, dtype=torch.int32, device=device) if kernels_attend() else None

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE if kernels_attend() else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata | DeviceMetadata:
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        table = common.block_table_tensor[:count]
        if self.state is None:
            starts, lengths = common.query_start_loc_cpu[: count + 1], common.seq_lens[:count]
            return Metadata(starts.tolist(), lengths.tolist(), table)
        tell(self.state, common.query_start_loc[: count + 1], common.seq_lens[:count])
        singles = count
        if common.max_query_len > 1:
            new = common.query_start_loc_cpu[1 : count + 1] - common.query_start_loc_cpu[:count]
            longer = (new > 1).nonzero()
            singles = int(longer[0]) if len(longer) else count
        return DeviceMetadata(self.state, table, count, singles, common.max_query_len)


def kernels_attend() -> bool:
    """Whether the platform is one of the generated kernels'."""
    return bool(current_platform.is_cuda())


def device() -> torch.device:
    """Where this process computes."""
    return torch.device(current_platform.device_type)


def _captured(vllm_config: VllmConfig) -> list[int]:
    """Sizes of batches that CUDA graphs are made of."""
    return list(vllm_config.compilation_config.cudagraph_capture_sizes or ())


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


class Impl(AttentionImpl[Any]):
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
        code: tuple[ModuleType, Tuning] | None,
    ) -> None:
        """What the layer is, the stores of its group of pages and of rows, and where in their blocks it begins.
        `rotation` [H, key_head_dim, key_head_dim] turns keys and queries. `code` are the kernels and how they are
        launched; None where the reference attends."""
        self.layer, self.stores, self.places = layer, (pages, rows), (page_offset, row_offset)
        self.rotation = None if rotation is None else rotation.to(device())
        self.code = code

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | DeviceMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """`query` [T, Hq, key_head_dim], `key` and `value` [T, H, d] of all new tokens, to `output` [T, Hq, dv]."""
        if attn_metadata is None:  # a trial run that measures memory
            return output.zero_()
        pages = attn_metadata
        rows = pages if self.stores[1] is None else get_forward_context().attn_metadata[self.stores[1].name]
        if self._seen is not self.stores[0].blocks:
            self._look_into_pool()
        if self.rotation is not None:
            query, key = (self._turned(part) for part in (query, key))
        if isinstance(pages, DeviceMetadata):
            self.kernels.attend(query, key, value, pages.parts(rows), self.scale, self.sinks, output)
        else:
            self._attend_by_reference(query, key, value, pages, rows, output)
        return output

    def _turned(self, x: Tensor) -> Tensor:
        """Queries or keys [T, heads, key_head_dim] by the rotation of the key head that each belongs to."""
        assert self.rotation is not None
        return rotate_heads(x.transpose(0, 1)[None], self.rotation)[0].transpose(0, 1)

    def _attend_by_reference(
        self, query: Tensor, key: Tensor, value: Tensor, pages: Metadata, rows: Metadata, output: Tensor
    ) -> None:
        q, k, v = (part.transpose(0, 1) for part in (query, key, value))
        steps = {}
        for number, length in enumerate(pages.lengths):
            own = slice(pages.starts[number], pages.starts[number + 1])
            if own.start < own.stop:
                cached = length - (own.stop - own.start)
                steps[own.start] = Step(k[:, own], v[:, own], cached, pages.table[number], rows.table[number])
        for step in steps.values():
            self.views.write_tokens(step)
        for step in steps.values():
            self.views.write_blocks(step)
        for start, step in steps.items():
            own = slice(start, start + step.keys.shape[1])
            output[own] = self.views.attend(q[:, own], step, self.scale, self.softcap, self.sinks).transpose(0, 1)

    def _look_into_pool(self) -> None:
        """Make the layer's views of the pool, which vLLM has made, or made anew."""
        (pages, rows), (page_offset, row_offset) = self.stores, self.places
        served, row_block = pages.served, 0 if rows is None else rows.group.block
        if self.code is None:
            placed = () if rows is None else (rows.blocks, row_offset, row_block)
            self.views = LayerPages.of(self.layer, served.dtype, pages.blocks, page_offset, *placed)
        else:
            assert rows is None or rows.blocks.data_ptr() == pages.blocks.data_ptr(), "all groups are in one pool"
            self.kernels = PagedKernels.of(
                *self.code,
                self.layer,
                pages.blocks,
                served.dtype,
                page_offset,
                row_offset,
                row_block,
                served.max_len,
            )
        self._seen = pages.blocks
