"""A worker without a model: it keeps in every block what a real one would have written there, and looks at it whenever
a real one would read."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.vllm.attach import pool_on
from pmkvq_compiler.runtime.vllm.layout import Group, PagedLayer
from pmkvq_compiler.runtime.vllm.scheduler import ProgressiveAsyncScheduler, ProgressiveScheduler
from pmkvq_compiler.runtime.vllm.specs import spec_of
from pmkvq_compiler.runtime.vllm.tiers import TOLD, Changes
from tests.runtime.test_tiers import NOTHING, rows_of

from .engines import ENGINE

VOCABULARY = 5
MAX_LEN = 400
MAX_FED = 96
"""Tokens at most that a step feeds."""


@dataclass(frozen=True)
class Arrival:
    """A request that comes before a step: its prompt, how many tokens it asks for, and the step before which it is
    aborted, if it is."""

    name: str
    step: int
    prompt: tuple[int, ...]
    new: int
    aborted: int | None

    def token(self, position: int) -> int:
        """The token at a position, which the simulated model gives where it is not of the prompt."""
        if position < len(self.prompt):
            return self.prompt[position]
        return random.Random(f"{self.prompt[-1]} {len(self.prompt)} {position}").randrange(VOCABULARY)


@dataclass
class Running:
    """What a worker knows of a request."""

    arrival: Arrival
    tables: list[list[int]]
    cached: int
    stamps: list[int] = field(default_factory=list)

    def stamp(self, position: int) -> int:
        """Stands for the token at a position and all before it."""
        while len(self.stamps) <= position:
            before = self.stamps[-1] if self.stamps else 0
            self.stamps.append(hash((before, self.arrival.token(len(self.stamps)))))
        return self.stamps[position]


class Worker:
    """Blocks, and what was written into them last."""

    def __init__(self, config: Any, kv_cache_config: Any, folder: Any) -> None:
        self.layers, _, pool = pool_on(config, runtime.open_artifact(folder).manifest.plan)
        self.numbers = [group.kv_cache_spec.group for group in kv_cache_config.kv_cache_groups]
        self.groups = [pool.groups[number] for number in self.numbers]
        self.written: dict[Any, Any] = {}
        self.ties: dict[int, tuple[int, ...]] = {}
        self.sequences: dict[str, Running] = {}
        self.further_read = self.lowered = 0

    def step(self, output: Any, arrivals: dict[str, Arrival], idle: set[int]) -> list[str]:
        """Do a step while these blocks hold nothing; the requests that get a token from it."""
        self._note(getattr(output, TOLD, NOTHING))
        for block in idle:
            self.written.pop(block, None)
        self._take_in(output, arrivals)
        steps = [(self.sequences[name], new) for name, new in output.num_scheduled_tokens.items()]
        for phase in (self._write_tokens, self._write_pages, self._read):
            for sequence, new in steps:
                for number, group in enumerate(self.groups):
                    phase(sequence, sequence.cached + new, number, group)
        for sequence, new in steps:
            sequence.cached += new
        return list(output.num_scheduled_tokens)

    def _note(self, told: Changes) -> None:
        """All pages that fall are coded anew at once, so none may touch the blocks of another."""
        rows, read = iter(rows_of(told)), list[int]()
        for group, count in told.fallen:
            for block, *further in itertools.islice(rows, count):
                old, new = self._lie_in(block), [block, *filter(None, further)]
                page = self.written[block][0][:-2]
                assert self.numbers[page[0]] == group
                assert [self.written[one][0] for one in old] == parts_of(page, len(old)), f"page in block {block} falls"
                assert len(new) < len(old)
                assert new == old[: len(new)]
                self._write_page(page, new)
                self.lowered += 1
                read += old
        assert len(read) == len({*read})
        self.ties |= {block: tuple(filter(None, further)) for block, *further in rows_of(told)}

    def _lie_in(self, block: int) -> list[int]:
        """The blocks in which a page lies."""
        return [block, *self.ties.get(block, ())]

    def _write_page(self, page: tuple[int, int, int], blocks: list[int]) -> None:
        for block, part in zip(blocks, parts_of(page, len(blocks)), strict=True):
            self.written[block] = (part, {})

    def _take_in(self, output: Any, arrivals: dict[str, Arrival]) -> None:
        for name in output.finished_req_ids:
            self.sequences.pop(name, None)
        for new in output.scheduled_new_reqs:
            tables = [list(ids) for ids in new.block_ids]
            self.sequences[new.req_id] = Running(arrivals[new.req_id], tables, new.num_computed_tokens)
        old = output.scheduled_cached_reqs
        for name, ids, cached in zip(old.req_ids, old.new_block_ids, old.num_computed_tokens, strict=True):
            sequence = self.sequences[name]
            if name in old.resumed_req_ids:
                sequence.tables = [[] for _ in self.groups]
            sequence.cached = cached
            for table, more in zip(sequence.tables, ids or [], strict=False):
                table.extend(more)

    def _packed(self, group: Group) -> PagedLayer | None:
        return next((self.layers[index] for index in group.layers if not self.layers[index].exact), None)

    def _write_tokens(self, sequence: Running, end: int, number: int, group: Group) -> None:
        layer = self._packed(group)
        last = end if group.kind == "rows" or layer is None else min(end, layer.plan.sink)
        for position in range(sequence.cached, last):
            block = sequence.tables[number][position // group.block]
            if block:
                place = (number, position // group.block)
                held = self.written.get(block)
                if held is None or held[0] != place:
                    held = self.written[block] = (place, {})
                held[1][position] = sequence.stamp(position)

    def _write_pages(self, sequence: Running, end: int, number: int, group: Group) -> None:
        layer = self._packed(group)
        if group.kind == "rows" or layer is None:
            return
        for page in range(*layer.pages_between(sequence.cached, end).indices(len(sequence.tables[number]))):
            block = sequence.tables[number][page]
            if block:
                self._write_page((number, page, sequence.stamp(self._last(layer, page))), self._lie_in(block))

    @staticmethod
    def _last(layer: PagedLayer, page: int) -> int:
        return layer.plan.sink + (page - layer.sink_pages + 1) * layer.plan.block - 1

    def _read(self, sequence: Running, end: int, number: int, group: Group) -> None:
        layer = self._packed(group)
        seen = 0 if group.window is None else max(0, sequence.cached + 1 - group.window)
        if group.kind == "rows":
            recent = min(self.layers[index].quantized_until(sequence.cached) for index in group.layers)
            self._read_tokens(sequence, recent, end, number, group)
        elif layer is None:
            self._read_tokens(sequence, seen, end, number, group)
        else:
            self._read_tokens(sequence, seen, min(layer.plan.sink, end), number, group)
            first = max(0, seen - layer.plan.sink) // layer.plan.block
            last = (layer.quantized_until(end - 1) - layer.plan.sink) // layer.plan.block
            for page in range(first + layer.sink_pages, last + layer.sink_pages):
                self._read_page(sequence, page, layer, number)

    def _read_page(self, sequence: Running, page: int, layer: PagedLayer, number: int) -> None:
        blocks = self._lie_in(sequence.tables[number][page])
        expected = parts_of((number, page, sequence.stamp(self._last(layer, page))), len(blocks))
        assert [self.written.get(block, (None,))[0] for block in blocks] == expected, f"page {page} in blocks {blocks}"
        self.further_read += len(blocks) - 1

    def _read_tokens(self, sequence: Running, start: int, stop: int, number: int, group: Group) -> None:
        """Look at the first and the last token of each block."""
        for first in range(start // group.block * group.block, stop, group.block):
            block = sequence.tables[number][first // group.block]
            for position in {max(start, first), min(stop, first + group.block) - 1}:
                if position < sequence.cached or block:  # new tokens are at hand
                    held = self.written.get(block)
                    assert held is not None, f"token {position} in block {block}"
                    assert held[1].get(position) == sequence.stamp(position), f"token {position} in block {block}"


def parts_of(page: tuple[int, int, int], tier: int) -> list[tuple[int, ...]]:
    """What the blocks of a page hold. A page is the number of its group, its place and what it stands for."""
    return [(*page, tier, part) for part in range(tier)]


@dataclass(frozen=True)
class Outcome:
    """What happened in a run: the tokens of every request in every step and who was preempted; how many further blocks
    were read, and how many pages were lowered."""

    steps: list[tuple[dict[str, int], set[str]]]
    further_read: int
    lowered: int

    @property
    def preemptions(self) -> int:
        return sum(len(preempted) for _, preempted in self.steps)


class Simulation:
    """Runs vLLM's own scheduler, progressive and not, on the pool of an artifact."""

    def __init__(self, folder: Path) -> None:
        init_none_hash(sha256)
        self.folder = folder
        args = {**ENGINE, "max_model_len": MAX_LEN, "max_num_seqs": 6, "kv_cache_memory_bytes": 1 << 20}
        options = {"pmkvq": {"progressive": True}}
        self.config = EngineArgs(model=str(folder), **args, additional_config=options).create_engine_config()
        self.manager = StructuredOutputManager(self.config)
        plan = runtime.open_artifact(folder).manifest.plan
        _, _, self.pool = pool_on(self.config, plan)
        self.least = self.pool.bytes_needed(1, MAX_LEN, 2 * MAX_FED) // self.pool.block_bytes
        """Blocks in which a request that is alone never preempts itself."""

    def run(
        self,
        arrivals: Sequence[Arrival],
        progressive: bool,
        blocks: int,
        caching: bool,
        fed: int,
        ahead: bool,
        sparing: bool = False,
        reserve: int = 0,
    ) -> Outcome:
        """`ahead` schedules a step before the tokens of the one before it are known. A `sparing` scheduler
        lends no prefix's block."""
        scheduler, hasher = self._scheduler(progressive, blocks, caching, fed, ahead)
        if progressive:
            scheduler._pool.reserve = reserve
        if sparing:
            lift = scheduler._pool.lift
            scheduler._pool.lift = lambda pages, spare_prefixes: lift(pages, spare_prefixes=True)
        worker, named = Worker(self.config, scheduler.kv_cache_config, self.folder), {one.name: one for one in arrivals}
        steps: list[tuple[dict[str, int], set[str]]] = []
        waiting = sorted(arrivals, key=lambda one: one.step)
        pending: deque[tuple[Any, ModelRunnerOutput]] = deque()
        while waiting or scheduler.has_requests() or pending:
            step = len(steps)
            while waiting and waiting[0].step <= step:
                scheduler.add_request(_request(waiting.pop(0), hasher))
            for one in arrivals:
                if one.aborted == step:
                    scheduler.finish_requests([one.name], RequestStatus.FINISHED_ABORTED)
            output = scheduler.schedule()
            idle = idle_blocks(scheduler, progressive)
            worker.step(output, named, idle)
            steps.append((dict(output.num_scheduled_tokens), set(output.preempted_req_ids or ())))
            pending.append((output, _sampled(scheduler, output, named)))
            while len(pending) > ahead or (pending and not output.total_num_scheduled_tokens):
                scheduler.update_from_output(*pending.popleft())
            assert step < 5000
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == blocks - 1
        return Outcome(steps, worker.further_read, worker.lowered)

    def _scheduler(self, progressive: bool, blocks: int, caching: bool, fed: int, ahead: bool) -> tuple[Any, Any]:
        config = copy(self.config)
        config.cache_config, config.scheduler_config = copy(config.cache_config), copy(config.scheduler_config)
        config.cache_config.enable_prefix_caching = caching
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.max_num_batched_tokens = config.scheduler_config.max_num_scheduled_tokens = fed
        specs = {f"{group.kind}.{number}": spec_of(self.pool, number) for number, group in enumerate(self.pool.groups)}
        groups = [KVCacheGroupSpec([name], spec) for name, spec in specs.items()]
        cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(cache, config)
        kinds = ((Scheduler, AsyncScheduler), (ProgressiveScheduler, ProgressiveAsyncScheduler))
        config.scheduler_config.async_scheduling = ahead
        made = kinds[progressive][ahead](
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=self.manager,
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        return made, get_request_block_hasher(hash_block_size, sha256) if caching else None


def _request(arrival: Arrival, hasher: Any) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=arrival.new, ignore_eos=True)
    return Request(arrival.name, list(arrival.prompt), sampling, None, block_hasher=hasher)


def _sampled(scheduler: Any, output: Any, arrivals: dict[str, Arrival]) -> ModelRunnerOutput:
    names = list(output.num_scheduled_tokens)
    tokens = []
    for name in names:
        request = scheduler.requests[name]
        end = request.num_computed_tokens
        tokens.append([] if request.is_prefill_chunk else [arrivals[name].token(end)])
    return ModelRunnerOutput(names, {name: place for place, name in enumerate(names)}, tokens)


def idle_blocks(scheduler: Any, progressive: bool) -> set[int]:
    """The blocks that hold nothing. Every block is owned, or lent, or in vLLM's queue, and never two of these."""
    pool = scheduler.kv_cache_manager.block_pool
    queued = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    lent = [block for page in scheduler.tiers.pages.values() for block in page.further] if progressive else []
    free = [block.block_id for block in pool.blocks if block.ref_cnt == 0 and not block.is_null]
    assert sorted(queued + lent) == free
    assert len(free) == pool.get_num_free_blocks()
    if progressive:
        assert len(lent) == scheduler.tiers.lent
        for page in scheduler.tiers.pages.values():
            block = pool.blocks[page.block]
            assert len(page.further) in (0, 1, 3)
            assert page.owned == (block.ref_cnt > 0)
            assert page.owned or block.block_hash is not None
    return {block for block in queued if pool.blocks[block].block_hash is None}
