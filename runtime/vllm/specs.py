"""What vLLM's scheduler knows of the pool: a spec for each group of layers, and the manager of blocks of rows.

Specs are sent between vLLM's processes, so importing this module is what makes the manager known in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from .layout import WINDOWS_WHILE_READING, Group, Pool

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

WORTH_KEEPING = 4
"""Blocks of rows that no later step reads are kept for prefix hits, at most one in so many of the free blocks."""


class GroupOfItsOwn:
    """Specs that vLLM must not put into one group with others: only equal ones are of one type."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        assert all(spec == specs[0] for spec in specs[1:])
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class PagesSpec(GroupOfItsOwn, FullAttentionSpec):
    """Pages of layers that see everything."""

    group: int


@dataclass(frozen=True, kw_only=True)
class SlidingPagesSpec(GroupOfItsOwn, SlidingWindowSpec):
    """Pages of layers whose attention slides."""

    group: int


@dataclass(frozen=True, kw_only=True)
class RowsSpec(GroupOfItsOwn, SlidingWindowSpec):
    """Rows of the last tokens, one of `groups` groups of a pool. A decoding sequence has one window of them, and one
    whose prompt is being read up to WINDOWS_WHILE_READING."""

    group: int
    groups: int

    @property
    def window_blocks(self) -> int:
        """Blocks that a window may lie in."""
        return -(-(self.sliding_window - 1) // self.block_size) + 1

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return min(WINDOWS_WHILE_READING * self.window_blocks, -(-max_model_len // self.block_size))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        most = -(-vllm_config.model_config.max_model_len // self.block_size)
        return min(self.window_blocks, most) * self.page_size_bytes


def spec_of(pool: Pool, number: int) -> KVCacheSpec:
    """The spec of a group: a block is one state of as many bytes as it has, for vLLM divides it by tokens alone."""
    group = pool.groups[number]
    width = pool.block_bytes // group.block
    shared: dict[str, Any] = {
        "block_size": group.block,
        "num_kv_heads": 1,
        "head_size": width // 2,
        "head_size_v": width - width // 2,
        "dtype": torch.uint8,
        "group": number,
    }
    if group.kind == "rows":
        rows = sum(other.kind == "rows" for other in pool.groups)
        return RowsSpec(**shared, sliding_window=_window(group), groups=rows)
    if group.window is None:
        return PagesSpec(**shared)
    return SlidingPagesSpec(**shared, sliding_window=_window(group))


def _window(group: Group) -> int:
    assert group.window is not None
    return group.window


class RowsManager(SlidingWindowManager):
    """Gives blocks of rows only to tokens whose rows a later step will read.

    Of a long chunk these are the last ones; where the others are, the table says nobody's block. While most of the
    pool is free all are kept, and freed in the next step, so that later requests which begin alike find them.
    """

    kv_cache_spec: RowsSpec

    def __init__(self, kv_cache_spec: RowsSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._all_kept: set[str] = set()
        """Requests whose next blocks are all kept."""
        self._released: dict[str, int] = {}
        """Blocks at the beginning of a request's that were looked at and freed already."""

    def _first_needed(self, num_tokens: int) -> int:
        """The first block that the step after `num_tokens` tokens reads."""
        return self.get_num_skipped_tokens(num_tokens) // self.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **others: Any,
    ) -> int:
        """`others` are those that versions of vLLM differ in; they are passed by keyword."""
        if others.get("apply_admission_cap"):  # the whole request is asked about, not one step
            return super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                **others,
            )
        required = -(-num_tokens // self.block_size)
        held, adopted = len(self.req_to_blocks.get(request_id, ())), 0
        if request_id not in self.num_cached_block:
            skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
            adopted = self._get_num_evictable_blocks(new_computed_blocks[max(0, skipped - held) :])
            held = max(skipped, held + len(new_computed_blocks))
        needed = max(0, required - max(held, self._first_needed(num_tokens)))
        every = max(0, required - held)
        self._all_kept.discard(request_id)
        if self.enable_caching and self._worth_keeping(every, adopted):
            self._all_kept.add(request_id)
            needed = every
        return needed + adopted

    def _worth_keeping(self, every: int, adopted: int) -> bool:
        """Whether so many blocks of every group of rows leave plenty for everything else of this step."""
        return (every + adopted) * self.kv_cache_spec.groups * WORTH_KEEPING <= self.block_pool.get_num_free_blocks()

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        required = -(-num_tokens // self.block_size)
        if required <= len(held):
            return []
        first = len(held) if request_id in self._all_kept else max(len(held), self._first_needed(num_tokens))
        fresh = self.block_pool.get_new_blocks(required - first)
        blocks = [self._null_block] * (first - len(held)) + fresh
        held.extend(blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh)
        return blocks

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        blocks = self.req_to_blocks.get(request_id)
        if blocks is None:
            return
        first = max(first_block, self._released.get(request_id, 0))
        last = min(last_block, len(blocks))
        freed = [blocks[index] for index in range(last - 1, first - 1, -1) if blocks[index] is not self._null_block]
        blocks[first:last] = [self._null_block] * max(0, last - first)
        self._released[request_id] = max(first, last)
        if freed:
            self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._all_kept.discard(request_id)
        self._released.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


KVCacheSpecRegistry._ensure_registered()  # vLLM registers its own specs only where there are none
KVCacheSpecRegistry.register(RowsSpec, RowsManager, uniform_type_base_spec=RowsSpec)
