"""What of vLLM is overridden and wrapped still has the form that it had."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import FunctionType

import pytest

from pmkvq_compiler.runtime.vllm.layout import pool_of
from tests.runtime.test_layout import MODELS

METHODS = [
    "get_num_blocks_to_allocate",
    "allocate_new_blocks",
    "_remove_blocks_in_range",
    "pop_blocks_for_free",
]


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_rows_manager_have_vllms_signatures(name: str) -> None:
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager, SlidingWindowManager

    from pmkvq_compiler.runtime.vllm.specs import RowsManager

    own, theirs = getattr(RowsManager, name), getattr(SlidingWindowManager, name)
    assert own is not theirs
    if name == "get_num_blocks_to_allocate":  # hands on what it does not read
        assert parameters(own)[-1] == "others"
        rest = parameters(theirs)[len(parameters(own)) - 1 :]
        assert rest in (["apply_admission_cap"], ["apply_admission_cap", "prefill_end"])
        assert [*parameters(own)[:-1], *rest] == parameters(theirs)
        assert passed_by_name(KVCacheCoordinator.get_num_blocks_to_allocate, name) >= {*rest}
    else:
        assert parameters(own) == parameters(theirs)
    # nothing between us and the base class overrides it for sliding windows
    assert theirs is getattr(SingleTypeKVCacheManager, name)


def test_every_method_that_is_overridden_is_among_them() -> None:
    from pmkvq_compiler.runtime.vllm.specs import RowsManager

    own = {name for name, value in vars(RowsManager).items() if isinstance(value, FunctionType)}
    inherited = {name for base in RowsManager.__mro__[1:] for name in vars(base)}
    assert own & inherited - {"__init__"} == {*METHODS}


def test_specs_and_attention_have_vllms_signatures() -> None:
    from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder
    from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

    from pmkvq_compiler.runtime.vllm.backend import Builder, Impl
    from pmkvq_compiler.runtime.vllm.specs import GroupOfItsOwn, RowsSpec

    pairs = [
        (RowsSpec.max_admission_blocks_per_request, SlidingWindowSpec.max_admission_blocks_per_request),
        (RowsSpec.max_memory_usage_bytes, SlidingWindowSpec.max_memory_usage_bytes),
        (GroupOfItsOwn.is_uniform_with_collection, KVCacheSpec.is_uniform_with_collection),
        (GroupOfItsOwn.merge, KVCacheSpec.merge),
        (Builder.build, AttentionMetadataBuilder.build),
        (Builder.__init__, AttentionMetadataBuilder.__init__),
        (Impl.forward, AttentionImpl.forward),
    ]
    for own, theirs in pairs:
        assert parameters(own) == parameters(theirs), own


@pytest.mark.parametrize("name", ["mixed", "mostly sliding", "some layers as they are"])
def test_a_spec_of_every_group_takes_the_bytes_of_a_block(name: str) -> None:
    from pmkvq_compiler.runtime.vllm.specs import spec_of

    pool = pool_of(MODELS[name][0], 4096)
    for number, group in enumerate(pool.groups):
        spec = spec_of(pool, number)
        assert (spec.page_size_bytes, spec.block_size) == (pool.block_bytes, group.block)


def test_the_pool_that_lends_and_what_tells_of_tiers_have_vllms_signatures() -> None:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from pmkvq_compiler.runtime.vllm.scheduler import LendingPool

    own = {name for name, value in vars(LendingPool).items() if isinstance(value, FunctionType)}
    overridden = own & set(vars(BlockPool))
    public = {"get_new_blocks", "free_blocks", "touch", "reset_prefix_cache"}
    assert overridden == public | {"_maybe_evict_cached_block"}
    assert "_maybe_evict_cached_block" in inspect.getsource(BlockPool.get_new_blocks)
    for name in overridden:
        assert parameters(getattr(LendingPool, name)) == parameters(getattr(BlockPool, name)), name
    assert parameters(GPUModelRunner.execute_model)[:2] == ["self", "scheduler_output"]
    assert {"scheduler_stats", "engine_idx"} <= {*parameters(StatLoggerManager.record)}
    assert SchedulerStats().kv_connector_stats is None
    assert {"_gauge_cls", "_counter_cls"} <= {*vars(PrometheusStatLogger)}
    assert "return self.free_block_queue.num_free_blocks" in inspect.getsource(BlockPool.get_num_free_blocks)
    others = {*BlockPool.__dict__} - overridden
    assert [name for name in sorted(others) if pops_blocks(vars(BlockPool)[name])] == ["__init__"]


def pops_blocks(value: object) -> bool:
    return isinstance(value, FunctionType) and "free_block_queue.pop" in inspect.getsource(value)


def test_wrapped_functions_take_what_is_passed_to_them() -> None:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention.attention import Attention

    names = set(inspect.signature(Attention.__init__).parameters)
    assert {"prefix", "attn_type", "attn_backend", "kv_sharing_target_layer_name", "extra_impl_args"} <= names
    assert isinstance(inspect.getattr_static(VllmConfig, "max_in_flight_tokens"), property)


def parameters(function: object) -> list[str]:
    assert callable(function)
    return list(inspect.signature(function).parameters)


def passed_by_name(function: object, called: str) -> set[str]:
    """The keywords of the last call of the method `called` in the source of a function."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == called
    ]
    return {keyword.arg for keyword in calls[-1].keywords if keyword.arg is not None}
