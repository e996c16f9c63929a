"""vLLM's scheduler and its pool of blocks, which lends the blocks that are idle to pages.

To vLLM a lent block is free: admission, watermark and preemption count it as such, and when a request needs it, a page
falls. A page is lent blocks in the step that quantizes it and never later, because only then the numbers themselves are
still there.

Blocks that hold nothing are lent first. Blocks of cached prefixes that nobody owns are, too, oldest first: a server
that has run for a while has no others. But the younger half of the free blocks is left to them, and all while a request
waits, which may begin as they do: it would need more of the pool if they were gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
            rising = [page for page in pages if len(page.further) == number - 1 and page.limit >= number]
            if not rising:
                continue
            count = self._room(len(rising), number, kept, self.tiers.turn(True, height), spare_prefixes)
            if count:
                blocks = self.free_block_queue.popleft_n(count * number)
                self.free_block_queue.num_free_blocks += count * number
                self.tiers.lend(rising[:count], [block.block_id for block in blocks])
            if count < len(rising):
                return

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Blocks that hold nothing, then those that are lent, then those of cached prefixes."""
        if self.tiers.lent:
            missing = num_blocks - self._empty_blocks(num_blocks)[0]
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

    def _room(self, count: int, number: int, kept: int, turn: int, spare_prefixes: bool) -> int:
        """How often, `count` times at most, there are so many blocks that hold nothing while others are kept. Pages
        whose turn comes before this one fall for them, or prefixes are forgotten."""
        wanted = count * number
        empty, block = self._empty_blocks(kept + wanted)
        while empty < kept + wanted:
            lent = self.tiers.lent
            if not self._fall(wanted - empty, turn):
                more = (max(0, empty - kept) // number + 1) * number
                if spare_prefixes or not self._forget_prefix(block, more):
                    break
                empty, block = empty + 1, block.next_free_block
            empty += lent - self.tiers.lent  # what pages give back comes to the head of the queue
        return min(count, max(0, empty - kept) // number)

    def _empty_blocks(self, most: int) -> tuple[int, KVCacheBlock]:
        """How many of the first blocks in the queue hold nothing, counted up to `most` at least, and the block behind
        them. Cached prefixes come behind all that hold nothing, and then the end of the queue, which is no block."""
        queue = self.free_block_queue
        if not self.enable_caching:
            return queue.num_free_blocks - self.tiers.lent, queue.fake_free_list_tail
        block, count = queue.fake_free_list_head.next_free_block, 0
        while count < most and block is not queue.fake_free_list_tail and block.block_hash is None:
            block, count = block.next_free_block, count + 1
        return count, block

    def _fall(self, number: int, turn: int | None = None) -> bool:
        """Lower pages for so many blocks and the reserve, if there are any whose turn comes before this one."""
        given = self.tiers.fall(number + self.reserve, turn)
        self._take_back(given)
        return bool(given)

    def _forget_prefix(self, block: KVCacheBlock, number: int) -> bool:
        """Forget a cached prefix, should the block hold one, if half of the free blocks are left to such after so many
        more have been lent."""
        if 2 * (self.tiers.lent + number) > self.free_block_queue.num_free_blocks:
            return False
        return self._maybe_evict_cached_block(block)

    def _maybe_evict_cached_block(self, block: KVCacheBlock) -> bool:
        """A prefix that is forgotten may have been a page; any other block that vLLM gives out is none."""
        if block.ref_cnt == 0:
            self._forget(block)
        return super()._maybe_evict_cached_block(block)

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
        self._pages: list[tuple[PagedLayer, int, Mapping[str, Sequence[KVCacheBlock]]]] = []
        """Of each group of pages a layer, its number and the blocks of requests."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for group, manager in zip(self.kv_cache_config.kv_cache_groups, managers, strict=True):
            if isinstance(group.kv_cache_spec, PagesSpec | SlidingPagesSpec) and coded[group.kv_cache_spec.group]:
                number = group.kv_cache_spec.group
                self._pages.append((coded[number][0], number, manager.req_to_blocks))
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
        completions = self._completions.of(output, self.requests)
        if completions:
            self._pool.lift(self._quantized(completions), spare_prefixes=bool(self.waiting))
        changes = self.tiers.changes()
        if changes is not None:
            setattr(output, TOLD, changes)

    def _quantized(self, completions: Sequence[tuple[str, int, int]]) -> list[Page]:
        """The pages that a step quantizes."""
        found, tiers = [], self.tiers
        for request_id, cached, end in completions:
            for layer, group, blocks in self._pages:
                for block in blocks[request_id][layer.pages_between(cached, end)]:
                    if not block.is_null and block.block_id not in tiers.pages:
                        found.append(tiers.add(block.block_id, group))
        return found

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
