"""vLLM's scheduler and its pool of blocks, with planes in the blocks that are idle.

To vLLM a plane's block is free: admission, watermark and preemption count it as such, and when a request needs it, the
plane falls. Nothing is moved and no kernel runs then; the worker is told before its next step. A plane is written in
the step that quantizes its page and never later, because only then the numbers themselves are still there.

Blocks that hold nothing become planes first. Blocks of cached prefixes that nobody owns do, too, oldest first: a server
that has run for a while has no others. But planes leave the younger half of the free blocks to them, and all while a
request waits, which may begin as they do: it would need more of the pool if they were gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from .attach import pool_on
from .checks import artifact_of
from .layout import PagedLayer, bits_of
from .metrics import STATS, counted
from .planes import CHANGES, Page, Planes
from .specs import PagesSpec, SlidingPagesSpec

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.metrics.stats import SchedulerStats


class PlanePool(BlockPool):
    """A pool that lends its free blocks to planes. They are not in vLLM's queue of free blocks, but counted with it."""

    planes: Planes

    @classmethod
    def take_over(cls, pool: BlockPool, planes: Planes) -> PlanePool:
        """Make a pool of vLLM's one of these, in its place: others know it already."""
        pool.__class__ = cls
        assert isinstance(pool, cls)
        pool.planes = planes
        return pool

    def refine(self, pages: Sequence[Page], spare_prefixes: bool = False) -> None:
        """Give pages as many planes as there are blocks for: every page its first one, then every page its second.
        Cached prefixes keep their blocks where they are to be spared."""
        for number in range(1, self.planes.most + 1):
            for page in pages:
                if len(page.planes) == number - 1 < page.limit:
                    block = self._block_for_plane(number, spare_prefixes)
                    if block is None:
                        return
                    self.planes.tie(page, block)

    def get_num_free_blocks(self) -> int:
        return super().get_num_free_blocks() + len(self.planes)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Blocks that hold nothing, then those of planes, then those of cached prefixes."""
        if num_blocks <= self.get_num_free_blocks():
            missing = num_blocks - self._empty_blocks(num_blocks)
            fallen = [self.planes.fall() for _ in range(min(missing, len(self.planes)))]
            self._return([plane for plane in fallen if plane is not None])
        blocks = super().get_new_blocks(num_blocks)
        for block in blocks:
            self._return(self.planes.forget(block.block_id))
        return blocks

    def free_blocks(self, ordered_blocks: Iterable[KVCacheBlock]) -> None:
        blocks = list(ordered_blocks)
        super().free_blocks(blocks)
        for block in blocks:
            if block.ref_cnt == 0 and block.block_hash is None:
                self._return(self.planes.forget(block.block_id))
            elif block.ref_cnt == 0:
                self.planes.own(block.block_id, False)

    def touch(self, blocks: Sequence[KVCacheBlock]) -> None:
        super().touch(blocks)
        for block in blocks:
            self.planes.own(block.block_id, True)

    def reset_prefix_cache(self) -> bool:
        done = super().reset_prefix_cache()
        if done:
            for block in list(self.planes.pages):
                self._return(self.planes.forget(block))
        return done

    def _block_for_plane(self, number: int, spare_prefixes: bool) -> int | None:
        """A block for a plane of this number: an empty one, that of a plane which is worth less, or a prefix's."""
        queue = self.free_block_queue
        if self._empty_blocks(1):
            return queue.popleft().block_id
        plane = self.planes.fall(before=self.planes.rank(True, number))
        if plane is not None or spare_prefixes or 2 * (len(self.planes) + 1) > self.get_num_free_blocks():
            return plane
        block = queue.popleft()
        self._maybe_evict_cached_block(block)
        self._return(self.planes.forget(block.block_id))
        return block.block_id

    def _empty_blocks(self, most: int) -> int:
        """How many of the first blocks in the queue, `most` at most, hold nothing; cached prefixes come behind."""
        block, count = self.free_block_queue.fake_free_list_head.next_free_block, 0
        while count < most and block is not self.free_block_queue.fake_free_list_tail and block.block_hash is None:
            block, count = block.next_free_block, count + 1
        return count

    def _return(self, planes: Sequence[int]) -> None:
        """Blocks that were planes hold nothing any more."""
        self.free_block_queue.prepend_n([self.blocks[plane] for plane in planes])


class ProgressiveScheduler(Scheduler):
    """Gives planes to the pages that a step quantizes, and tells the workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        layers, _, pool = pool_on(self.vllm_config, artifact_of(self.vllm_config).manifest.plan)
        coded = [[layers[index] for index in group.layers if not layers[index].exact] for group in pool.groups]
        self._bits = [bits_of(members) for members in coded]
        self._pages: dict[int, tuple[PagedLayer, list[tuple[int, SingleTypeKVCacheManager]]]] = {}
        """Groups of pages by the sink of their layers, which are quantized in the same steps: one of these layers, and
        of each group its number and its manager."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        for group, manager in zip(self.kv_cache_config.kv_cache_groups, managers, strict=True):
            if isinstance(group.kv_cache_spec, PagesSpec | SlidingPagesSpec):
                number = group.kv_cache_spec.group
                for layer in {layer.plan.sink: layer for layer in coded[number]}.values():
                    self._pages.setdefault(layer.plan.sink, (layer, []))[1].append((number, manager))
        self.planes = Planes([len(bits) - 1 for bits in self._bits])
        self._pool = PlanePool.take_over(self.kv_cache_manager.block_pool, self.planes)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:  # workers compute nothing otherwise
            self._refine(output)
        return output

    def _refine(self, output: SchedulerOutput) -> None:
        """Give planes to the pages that a step quantizes, and say in the step's output what has changed."""
        self._pool.refine(list(self._quantized(output)), spare_prefixes=bool(self.waiting))
        setattr(output, CHANGES, self.planes.changes())

    def _quantized(self, output: SchedulerOutput) -> Iterator[Page]:
        """The pages that a step quantizes."""
        for request_id, new in output.num_scheduled_tokens.items():
            end = self.requests[request_id].num_computed_tokens
            for layer, groups in self._pages.values():
                if (end - layer.plan.sink) % layer.plan.block >= new:
                    continue  # as most steps, this one completes no block
                pages = layer.pages_between(end - new, end)
                for group, manager in groups:
                    for block in manager.req_to_blocks[request_id][pages]:
                        if not block.is_null and block.block_id not in self.planes.pages:
                            yield self.planes.add(block.block_id, group)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.kv_connector_stats = {STATS: counted(self.planes, self._bits)}
        return stats


class ProgressiveAsyncScheduler(ProgressiveScheduler, AsyncScheduler):
    """The same, a step ahead of the workers."""
