"""vLLM's scheduler and its pool of blocks, which lends the blocks that are idle to pages.

To vLLM a lent block is free: admission, watermark and preemption count it as such, and when a request needs it, a page
falls. A page is lent blocks in the step that quantizes it and never later, because only then the numbers themselves are
still there.

Blocks that hold nothing are lent first. Blocks of cached prefixes that nobody owns are, too, oldest first: a server
that has run for a while has no others. But the younger half of the free blocks is left to them, and all while a request
waits, which may begin as they do: it would need more of the pool if they were gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .attach import pool_on
from .checks import artifact_of
from .completions import Completions
from .layout import PagedLayer, bits_of
from .metrics import STATS, counted
from .specs import PagesSpec, SlidingPagesSpec
from .tiers import TOLD, Page, Tiers

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.metrics.stats import SchedulerStats


RESERVE = 64
"""Blocks at most that pages give back before they are needed, so that few steps lower some. More would take long."""

IN_RESERVE = 128
"""They are one in so many blocks of a pool at most."""


class LendingPool(BlockPool):
    """A pool that lends its free blocks to pages. They are not in vLLM's queue of free blocks, but in its count."""

    tiers: Tiers
    reserve: int

    @classmethod
    def take_over(cls, pool: BlockPool, tiers: Tiers) -> LendingPool:
        """Make a pool of vLLM's one of these, in its place: others know it already."""
        pool.__class__ = cls
        assert isinstance(pool, cls)
        pool.tiers, pool.reserve = tiers, min(RESERVE, pool.num_gpu_blocks // IN_RESERVE)
        return pool

    def lift(self, pages: Sequence[Page], spare_prefixes: bool = False) -> None:
        """Lend new pages as many blocks as there are: every page its first one, then every page two more, but not from
        the reserve. Cached prefixes keep their blocks where they are to be spared."""
        for height, number, kept in ((1, 1, 0), (2, 2, self.reserve)):
            for page in pages:
                if page.height == height - 1 and len(page.further) + number <= page.limit:
                    blocks = self._idle_blocks(number, kept, self.tiers.turn(True, height), spare_prefixes)
                    if not blocks:
                        return
                    self.tiers.lend(page, blocks)
                    self.free_block_queue.num_free_blocks += number

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Blocks that hold nothing, then those that are lent, then those of cached prefixes."""
        if self.tiers.lent:
            missing = num_blocks - self._empty_blocks(num_blocks)
            if missing > 0:
                self._fall(missing)
        return super().get_new_blocks(num_blocks)

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        pages = self.tiers.pages
        for block in blocks:
            if block.block_id in pages and block.ref_cnt == 0:
                if block.block_hash is None:
                    self._forget(block)
                else:
                    self.tiers.own(block.block_id, False)

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        super().touch(blocks)
        for block in blocks:
            self.tiers.own(block.block_id, True)

    def reset_prefix_cache(self) -> bool:
        done = super().reset_prefix_cache()
        if done:
            for page in list(self.tiers.pages):
                self._forget(self.blocks[page])
        return done

    def _idle_blocks(self, number: int, kept: int, turn: int, spare_prefixes: bool) -> list[int]:
        """So many blocks that hold nothing, of which others are kept; pages whose turn comes before this one fall for
        them, or prefixes are forgotten. None where there are not as many."""
        while self._empty_blocks(kept + number) < kept + number:
            if not self._fall(number, turn) and (spare_prefixes or not self._forget_prefix(number)):
                return []
        return [block.block_id for block in self.free_block_queue.popleft_n(number)]

    def _fall(self, number: int, turn: int | None = None) -> bool:
        """Lower pages for so many blocks and the reserve, if there are any whose turn comes before this one."""
        given = self.tiers.fall(number + self.reserve, turn)
        self._take_back(given)
        return bool(given)

    def _forget_prefix(self, number: int) -> bool:
        """Forget the oldest cached prefix, if there is any and half of the free blocks are left to such after so many
        more have been lent."""
        queue = self.free_block_queue
        if 2 * (self.tiers.lent + number) > queue.num_free_blocks:
            return False
        block = queue.fake_free_list_head.next_free_block
        while block is not queue.fake_free_list_tail and block.block_hash is None:
            block = block.next_free_block
        if block is queue.fake_free_list_tail:
            return False
        return self._maybe_evict_cached_block(block)

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool:
        """A prefix that is forgotten may have been a page; any other block that vLLM gives out is none."""
        if block.ref_cnt == 0:
            self._forget(block)
        return super()._maybe_evict_cached_block(block)

    def _empty_blocks(self, most: int) -> int:
        """How many of the first blocks in the queue, `most` at most, hold nothing; cached prefixes come behind."""
        queue = self.free_block_queue
        block, count = queue.fake_free_list_head.next_free_block, 0
        while count < most and block is not queue.fake_free_list_tail and block.block_hash is None:
            block, count = block.next_free_block, count + 1
        return count

    def _forget(self, block: KVCacheBlock) -> None:
        """A block is no page any more, should it have been one."""
        if block.block_id in self.tiers.pages:
            self._take_back(self.tiers.forget(block.block_id))

    def _take_back(self, blocks: Sequence[int]) -> None:
        """Blocks that were lent hold nothing any more."""
        self.free_block_queue.prepend_n([self.blocks[block] for block in blocks])
        self.free_block_queue.num_free_blocks -= len(blocks)


class ProgressiveScheduler(Scheduler):
    """Lends blocks to the pages that a step quantizes, and tells the workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers, _, pool = pool_on(self.vllm_config, artifact_of(self.vllm_config).manifest.plan)
        coded = [[layers[index] for index in group.layers if not layers[index].exact] for group in pool.groups]
        self._bits = [bits_of(members) for members in coded]
        self._pages: list[tuple[PagedLayer, int, SingleTypeKVCacheManager]] = []
        """Of each group of pages a layer, its number and its manager."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for group, manager in zip(self.kv_cache_config.kv_cache_groups, managers, strict=True):
            if isinstance(group.kv_cache_spec, PagesSpec | SlidingPagesSpec) and coded[group.kv_cache_spec.group]:
                number = group.kv_cache_spec.group
                self._pages.append((coded[number][0], number, manager))
        self.tiers = Tiers([_limit(members) for members in coded])
        self._pool = LendingPool.take_over(self.kv_cache_manager.block_pool, self.tiers)
        self._completions = Completions(layers[0].plan.block, [layer.plan.sink for layer, *_ in self._pages])

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:  # workers compute nothing otherwise
            self._lend(output)
        return output

    def _lend(self, output: SchedulerOutput) -> None:
        """Lend blocks to the pages that a step quantizes, and say in the step's output what has changed."""
        pages = list(self._quantized(output))
        if pages:
            self._pool.lift(pages, spare_prefixes=bool(self.waiting))
        changes = self.tiers.changes()
        if changes is not None:
            setattr(output, TOLD, changes)

    def _quantized(self, output: SchedulerOutput) -> Iterator[Page]:
        """The pages that a step quantizes."""
        for request_id, cached, end in self._completions.of(output, self.requests):
            for layer, group, manager in self._pages:
                for block in manager.req_to_blocks[request_id][layer.pages_between(cached, end)]:
                    if not block.is_null and block.block_id not in self.tiers.pages:
                        yield self.tiers.add(block.block_id, group)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.kv_connector_stats = {STATS: counted(self.tiers, self._bits)}
        return stats


def _limit(layers: Sequence[PagedLayer]) -> int:
    """Further blocks that a page of these layers may have. A page that holds the sink of one of them and codes of
    another could not be coded anew as a whole."""
    return max(bits_of(layers)) - 1 if len({layer.plan.sink for layer in layers}) == 1 else 0


class ProgressiveAsyncScheduler(ProgressiveScheduler, AsyncScheduler):
    """The same, a step ahead of the workers."""
