"""Pages are precise while blocks are idle, and nothing else changes: not what is admitted, nor what is right."""

from __future__ import annotations

import random
import sys
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed here; run make test-serve")

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.load import import_generated
from pmkvq_compiler.runtime.plan import block_bytes
from pmkvq_compiler.runtime.tuning import read_tunings
from pmkvq_compiler.runtime.vllm import worker
from pmkvq_compiler.runtime.vllm.backend import Impl, Store
from pmkvq_compiler.runtime.vllm.layout import PagedLayer, offsets, paged_layers, pool_of
from pmkvq_compiler.runtime.vllm.scheduler import LendingPool, _limit
from pmkvq_compiler.runtime.vllm.tiers import TOLD, Changes, Tiers
from tests.fuzz import rounds
from tests.runtime.test_pages import HEADS, layer_plan
from tests.runtime.test_tiers import NOTHING, rows_of

from .engines import Served, all_free, engine, greedy, random_prompts
from .simulation import MAX_FED, VOCABULARY, Arrival, Simulation, idle_blocks
from .test_engine import preemptions
from .test_server import generate

PROGRESSIVE = {"additional_config": {"pmkvq": {"progressive": True}}}
PLAN: dict[str, Any] = {"recipe": "uniform", "budget": "70%"}
PROMPTS = random_prompts((7, 130, 300, 513, 777))


def test_an_idle_pool_gives_the_text_of_the_wide_format(served_tiny: Served) -> None:
    """Pages of 2 bits at tier 4 are those of 8 bits."""
    found: dict[str, list[list[int]]] = {}
    for name, bits, options in (("8 bits", 8, {}), ("2 bits", 2, {}), ("progressive", 2, PROGRESSIVE)):
        with engine(served_tiny(**PLAN, bits=(bits,)), **options) as llm:
            found[name] = greedy(llm, PROMPTS, 100)
            assert all_free(llm)
    assert found["progressive"] == found["8 bits"]
    assert found["progressive"] != found["2 bits"]


def test_ranks_and_processes_are_told_of_tiers(served_tiny: Served, tmp_path: Path) -> None:
    artifact, prompts = served_tiny(**PLAN, bits=(2,)), PROMPTS[2:3]
    with engine(artifact, **PROGRESSIVE) as llm:
        expected = greedy(llm, prompts)
    with engine(artifact) as llm:
        assert greedy(llm, prompts) != expected
    assert generate(sys.executable, str(artifact), prompts, tmp_path, tensor_parallel_size=2, **PROGRESSIVE) == expected


@pytest.mark.parametrize("name", ["several widths", "rotated keys"])
def test_pages_that_have_fallen_are_those_of_the_final_bits(
    served_tiny: Served, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert_fallen_pages_are_final(served_tiny(**FALLING[name]), monkeypatch)


SLIDING = {"sliding_window": 200, "num_hidden_layers": 4, "query_pre_attn_scalar": 32}
FALLING: dict[str, dict[str, Any]] = {
    "several widths": {"model_type": "gemma2", "overrides": SLIDING, "budget": "36%"},
    "rotated keys": {"recipe": "rotation", "bits": (2,), "budget": "45%"},
}


@dataclass
class Unlaunched:
    """A kernel whose launches are noted, not made."""

    launches: set[tuple[Any, ...]]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.note

    def note(self, *arguments: Any, **constants: Any) -> None:
        """What Triton compiles a kernel for: types of tensors, whether numbers are 1 or multiples of 16, constants."""
        kinds = [one.dtype if isinstance(one, Tensor) else (one == 1, one % 16 == 0) for one in arguments]
        self.launches.add((*kinds, *sorted(constants.items())))


class Kernels:
    """A module of kernels in which `lower_pages` is noted, and no other kernel is launched."""

    def __init__(self, module: Any) -> None:
        self.module, self.lowering = module, Unlaunched(set())

    def __getattr__(self, name: str) -> Any:
        from triton.runtime.jit import KernelInterface

        found = getattr(self.module, name)
        if name == "lower_pages":
            return self.lowering
        return defaultdict(lambda: lambda *_, **__: None) if isinstance(found, KernelInterface) else found


def test_what_lowers_pages_is_compiled_when_a_server_starts(served_tiny: Served) -> None:
    """Otherwise all requests would wait for it when the first page falls."""
    artifact = served_tiny(**FALLING["rotated keys"])
    package = runtime.open_artifact(artifact).package.folder
    tuning = next(iter(read_tunings((package / "kernels" / "tuning.json").read_text()).values()))
    name = import_generated(package / "kernels" / "layers.py").KERNELS[0]
    kernels = Kernels(import_generated(package / "kernels" / f"{name}.py"))
    with engine(artifact, **PROGRESSIVE) as llm:
        context = llm.llm_engine.engine_core.engine_core.vllm_config.compilation_config.static_forward_context
        served = next(layer.served for layer in context.values() if isinstance(layer, Store))
        stores = [store for store in served.stores if store.group.kind == "pages"]
        for store in stores:
            for impl in store.members:
                plan, heads = impl.layer.plan, (impl.num_heads, impl.layer.heads, impl.layer.heads)
                impl.kernels, impl._seen = LayerKernels(kernels, tuning), None
                widths = (plan.key_head_dim, plan.key_head_dim, plan.value_head_dim)
                q, k, v = (torch.zeros(2, *shape) for shape in zip(heads, widths, strict=True))
                impl._try(q, k, v, torch.zeros(2, impl.num_heads, plan.value_head_dim))
        tried = {*kernels.lowering.launches}
        rows = torch.tensor([(block, 0, 0, 0) for block in (1, 2, 3)])
        for store in stores:
            for some in (rows, rows[1:2]):
                store.lower(some)
    assert kernels.lowering.launches == tried != set()


def assert_fallen_pages_are_final(artifact: Path, patch: pytest.MonkeyPatch, **options: Any) -> None:
    """One request, progressively and not. Some of its pages fall a tier and then another, all others fall two at once.
    What attention gives is left out of the model, so that all keys and values are the same in both."""
    attend = Impl.forward
    patch.setattr(Impl, "forward", lambda self, *args, **kwargs: attend(self, *args, **kwargs).zero_())
    found: list[dict[tuple[int, int], Tensor]] = []
    for progressive in (False, True):
        chosen = {"max_num_batched_tokens": 300, "enable_prefix_caching": True, **(PROGRESSIVE if progressive else {})}
        with engine(artifact, **chosen, **options) as llm:
            ask(llm, "0", random_prompts((777,))[0], 60)
            core, tiers = llm.llm_engine, []
            for step in range(40):
                core.step()
                if progressive and step in (5, 15, 35):
                    scheduler = core.engine_core.engine_core.scheduler
                    tiers.append({1 + len(page.further) for page in scheduler.tiers.pages.values()})
                    scheduler._pool._take_back(scheduler.tiers.fall({5: 3, 15: 12, 35: 10_000}[step]))
            if progressive:
                assert 1 not in tiers[0], "the pool is nearly empty"
                assert all({2, 4} <= some for some in tiers[1:]), "some fall twice, others from 4 to 1"
            found.append(records(llm))
            core.abort_request(["0"])
            while core.has_unfinished_requests():
                core.step()
            assert all_free(llm)
    assert len(found[0]) > 20
    for place, expected in found[0].items():
        assert torch.equal(found[1][place], expected), f"layer and page {place}"


def ask(llm: Any, name: str, prompt: list[int], new: int, **more: Any) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, **more)
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def records(llm: Any) -> dict[tuple[int, int], Tensor]:
    """The records of the only request by layer and page, as they lie in the pages' own blocks."""
    core = llm.llm_engine.engine_core.engine_core
    context, scheduler = core.vllm_config.compilation_config.static_forward_context, core.scheduler
    (request,) = scheduler.requests.values()
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    served = next(layer.served for layer in context.values() if isinstance(layer, Store))
    found = {}
    for group, manager in zip(scheduler.kv_cache_config.kv_cache_groups, managers, strict=True):
        store = served.stores[group.kv_cache_spec.group]
        if store.group.kind == "pages":
            for index, start in offsets(store.group, served.layers, served.stage).items():
                layer = served.layers[index]
                pages = layer.pages_between(0, request.num_computed_tokens - 1)  # a step may be ahead
                for page, block in list(enumerate(manager.req_to_blocks[request.request_id]))[pages]:
                    if not layer.exact and not block.is_null:
                        raw = store.blocks[block.block_id][start : start + layer.page_bytes].view(layer.heads, -1)
                        size = block_bytes(layer.plan, layer.plan.key_bits, layer.plan.value_bits)
                        found[index, page] = raw[:, :size].cpu()
    return found


TIGHT = (40, 60, 30, 50)


class TestTightPool:
    """A pool whose blocks are lent until the answers need all of them, and more than there are."""

    @pytest.fixture
    def asked(self, served_tiny: Served) -> dict[str, Any]:
        artifact = served_tiny(recipe="uniform", bits=(2,), budget="60%", window=64)
        pool = pool_of(paged_layers(runtime.open_artifact(artifact).manifest.plan, 4), 1400)
        memory = pool.bytes_needed(1, 400, 512) + 4 * pool.block_bytes
        options = {"max_model_len": 400, "kv_cache_memory_bytes": memory, "disable_log_stats": False}
        return {"model": artifact, "enable_prefix_caching": True, **options, **PROGRESSIVE}

    def test_what_is_nobodys_is_never_read(self, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks that hold nothing are filled with NaNs before every step."""
        found = []
        for poison in (False, True):
            with monkeypatch.context() as patch, engine(**asked) as llm:
                if poison:
                    poison_idle_blocks(llm, patch)
                found.append(greedy(llm, random_prompts(TIGHT), 320))
                assert preemptions(llm) > 0
                assert all_free(llm)
        assert found[0] == found[1]

    def test_metrics_tell_how_precise_pages_are(self, asked: dict[str, Any]) -> None:
        with engine(**asked) as llm:
            core, seen = llm.llm_engine, []
            for number, prompt in enumerate(random_prompts(TIGHT)):
                ask(llm, str(number), prompt, 320)
            while core.has_unfinished_requests():
                core.step()
                seen.append(metrics(llm))
        bits = [step["vllm:pmkvq_bits"] for step in seen]
        assert max(bits) == 8
        assert 2 <= min(bit for bit in bits if bit) < 3
        assert all(max(step[f"vllm:pmkvq_pages {tier}"] for step in seen) > 0 for tier in (1, 2, 4))
        assert seen[-1]["vllm:pmkvq_lowered"] > 0
        assert bits[-1] == 0, "no request is running"


def metrics(llm: Any) -> dict[str, float]:
    found = [metric for metric in llm.get_metrics() if metric.name.startswith("vllm:pmkvq")]
    return {f"{metric.name} {metric.labels.get('tier', '')}".strip(): metric.value for metric in found}


def poison_idle_blocks(llm: Any, patch: pytest.MonkeyPatch) -> None:
    """Before every step, once pages that have fallen are coded anew."""
    core = llm.llm_engine.engine_core.engine_core
    context = core.vllm_config.compilation_config.static_forward_context
    stores, schedule = [layer for layer in context.values() if isinstance(layer, Store)], core.scheduler.schedule
    note, idle = worker._note, deque[list[int]]()

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        idle.append(sorted(idle_blocks(core.scheduler, progressive=True)))
        setattr(output, TOLD, getattr(output, TOLD, NOTHING))
        return output

    def noted(config: Any, changes: Changes) -> None:
        if changes.rows:
            note(config, changes)
        blocks = idle.popleft()
        for store in stores:
            store.blocks[blocks] = 0xFF

    patch.setattr(core.scheduler, "schedule", scheduled)
    patch.setattr(worker, "_note", noted)


# ---- the scheduler with a worker that has no model ----


SIMULATED: dict[str, dict[str, Any]] = {
    "one group": {"block": 32, "window": 32, "budget": "35%"},
    "several widths": {
        "model_type": "gemma2",
        "overrides": {**SLIDING, "sliding_window": 100},
        "block": 32,
        "window": 32,
        "budget": "30%",
    },
}
"""The second has two groups of pages, of layers that slide and of others, and in one of them several widths."""


@pytest.mark.parametrize("name", SIMULATED)
def test_random_schedules_lose_no_block_and_read_no_foreign_one(served_tiny: Served, name: str) -> None:
    """Requests come, end and are aborted at random in small pools, with and without a prefix cache. Only where blocks
    of cached prefixes are lent does vLLM decide otherwise than at fixed tiers."""
    simulation = Simulation(served_tiny(**SIMULATED[name]))
    preempted, further, lowered = {False: 0, True: 0}, 0, 0
    for seed in range(rounds(60, 5000)):
        rng = random.Random(seed)
        arrivals, options = list(random_arrivals(rng)), random_options(rng, simulation.least)
        sparing, reserve = not options["caching"] or seed % 2 == 0, rng.choice((0, 0, 1, 4))
        plain = simulation.run(arrivals, progressive=False, **options)
        found = simulation.run(arrivals, progressive=True, sparing=sparing, reserve=reserve, **options)
        if sparing:
            assert found.steps == plain.steps, f"schedule {seed}: vLLM would have decided otherwise"
        preempted[False] += plain.preemptions
        preempted[True] += found.preemptions
        further += found.further_read
        lowered += found.lowered
    print(preempted, further, lowered)
    assert preempted[True] > 5
    assert further > 1000
    assert lowered > 100


def random_arrivals(rng: random.Random) -> Iterator[Arrival]:
    """Requests that often begin as others do."""
    beginnings = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(30, 250))) for _ in range(2)]
    for number in range(rng.randrange(2, 9)):
        shared = rng.choice(beginnings)[: rng.randrange(1, 250)] if rng.random() < 0.7 else ()
        more = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 60)))
        step = rng.randrange(40)
        aborted = step + rng.randrange(1, 60) if rng.random() < 0.15 else None
        yield Arrival(str(number), step, shared + more, rng.choice((5, 40, 90)), aborted)


def random_options(rng: random.Random, least: int) -> dict[str, Any]:
    """A pool that is too small for all of them, or not."""
    blocks = int(least * rng.choice((1, 1.1, 1.3, 1.6, 2, 4))) + rng.randrange(5)
    flags = {"caching": rng.random() < 0.6, "ahead": rng.random() < 0.5}
    return {"blocks": blocks, "fed": rng.choice((20, 50, MAX_FED)), **flags}


# ---- which blocks are lent, and which pages fall ----


def pool_with(blocks: int, cached: int, reserve: int = 0) -> LendingPool:
    """A pool of so many blocks beside nobody's, so many of which hold cached prefixes that nobody owns."""
    pool = LendingPool.take_over(BlockPool(blocks + 1, True, 64), Tiers([3]))
    pool.reserve = reserve
    held = pool.get_new_blocks(cached)
    for number, block in enumerate(held):
        pool._insert_block_hash(make_block_hash_with_group_id(bytes([number]), 0), block, num_tokens=64)
    pool.free_blocks(held)
    return pool


def new_pages(pool: LendingPool, count: int, group: int = 0) -> list[Any]:
    return [pool.tiers.add(block.block_id, group) for block in pool.get_new_blocks(count)]


def cached_blocks(pool: LendingPool) -> int:
    return sum(block.block_hash is not None for block in pool.blocks)


def further(pages: list[Any]) -> list[int]:
    return [len(page.further) for page in pages]


def test_every_page_gets_a_second_block_before_one_gets_four() -> None:
    pool = pool_with(8, cached=0)
    pages = new_pages(pool, 3)
    pool.lift(pages)
    assert further(pages) == [3, 1, 1]
    assert (pool.tiers.lent, pool.get_num_free_blocks()) == (5, 5)
    pool.lift(new_pages(pool, 1))
    assert further([*pool.tiers.pages.values()]) == [1, 1, 1, 1]
    assert pool.get_num_free_blocks() == 4


def test_never_are_two_further_blocks_lent() -> None:
    """An odd block stays idle, and a page that falls gives back two, of which one may stay idle."""
    pool = pool_with(4, cached=0)
    (page,) = new_pages(pool, 1)
    pool.lift([page])
    pool.get_new_blocks(1)
    assert (further([page]), pool.tiers.lent, pool.get_num_free_blocks()) == ([1], 1, 2)
    pool.lift(new_pages(pool, 1))
    assert (further([*pool.tiers.pages.values()]), pool.get_num_free_blocks()) == ([1, 0], 1)


def test_pages_fall_before_they_must_so_that_few_steps_lower_some() -> None:
    pool = pool_with(20, cached=0, reserve=4)
    pages = new_pages(pool, 5)
    pool.lift(pages)
    assert further(pages) == [3, 3, 3, 1, 1], "four blocks are in reserve"
    told = pool.tiers.changes()
    assert told is not None
    assert len(rows_of(told)) == 5
    for wanted, fallen in ((4, 0), (1, 3), (5, 0), (2, 5)):
        pool.get_new_blocks(wanted)
        changes = pool.tiers.changes()
        assert (sum(count for _, count in changes.fallen) if changes else 0) == fallen
    assert pool.get_num_free_blocks() == 3


def test_half_of_the_free_blocks_are_left_to_cached_prefixes() -> None:
    pool = pool_with(12, cached=10)
    pages = new_pages(pool, 2)
    pool.lift(pages)
    assert (pool.tiers.lent, cached_blocks(pool)) == (4, 6)
    pool.lift(pages)
    assert (pool.tiers.lent, cached_blocks(pool)) == (4, 6)
    pool.get_new_blocks(4)
    assert (pool.tiers.lent, cached_blocks(pool)) == (0, 6), "pages fall first"
    pool.get_new_blocks(6)
    assert cached_blocks(pool) == 0
    with pytest.raises(ValueError, match="free blocks"):
        pool.get_new_blocks(1)


def test_nothing_makes_room_for_pages_that_may_have_no_more_blocks() -> None:
    """Neither prefixes nor pages that nobody owns, even where the reserve is gone."""
    pool = LendingPool.take_over(BlockPool(21, True, 64), Tiers([1, 3]))
    pool.reserve = 6
    (old,) = new_pages(pool, 1, group=1)
    held = [pool.blocks[old.block], *pool.get_new_blocks(4)]
    pool.lift([old])
    for number, block in enumerate(held):
        pool._insert_block_hash(make_block_hash_with_group_id(bytes([number]), 0), block, num_tokens=64)
    pool.free_blocks(held)
    pages = new_pages(pool, 6)
    pool.lift(pages)
    assert (further([old, *pages]), cached_blocks(pool)) == ([3, *[1] * 6], 5)


def test_no_prefix_is_forgotten_for_a_page_while_a_request_waits() -> None:
    pool = pool_with(12, cached=8)
    pool.lift(new_pages(pool, 2), spare_prefixes=True)
    assert (pool.tiers.lent, cached_blocks(pool)) == (2, 8), "of what was empty only"


def test_a_prefix_that_is_found_again_keeps_the_tier_that_it_still_has() -> None:
    pool = pool_with(6, cached=0)
    page, other = new_pages(pool, 2)
    block = pool.blocks[page.block]
    pool._insert_block_hash(make_block_hash_with_group_id(b"x", 0), block, num_tokens=64)
    pool.lift([page])
    pool.free_blocks([block])
    assert further([page]) == [3]
    pool.lift([other])
    assert further([page, other]) == [1, 3], "what nobody owns gives way to any"
    pool.touch([block])
    pool.get_new_blocks(3)
    assert further([page, other]) == [1, 0]
    changes = pool.tiers.changes()
    assert changes is not None
    assert sorted(rows_of(changes)) == [(page.block, page.further[0], 0, 0), (other.block, 0, 0, 0)]


def test_a_page_whose_prefix_is_forgotten_gives_its_blocks_back() -> None:
    pool = pool_with(4, cached=0)
    (page,) = new_pages(pool, 1)
    pool.lift([page])
    pool.free_blocks([pool.blocks[page.block]])
    assert (pool.tiers.lent, pool.tiers.pages) == (0, {})
    assert len(pool.get_new_blocks(4)) == 4


def test_a_group_of_several_sinks_stays_in_single_blocks() -> None:
    """A page with the sink of one layer and the codes of another is not coded anew as a whole."""
    layers = [PagedLayer(layer_plan(sink=sink, key_bits=2, value_bits=2), HEADS, 2) for sink in (0, 4)]
    assert [_limit(layers[:1]), _limit(layers[1:]), _limit(layers)] == [3, 3, 0]
