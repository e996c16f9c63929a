"""Compiles the kernels that a model needs first, several at a time, while its weights are read.

Triton compiles a kernel when it is first launched, and one after the other. So the launches are made beforehand, on
tensors without memory, and their kernels are compiled in threads. Triton keeps what it has compiled on the disk: the
next process reads it there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backend import Attention, NewTokens
from .cache import Cache
from .experts import grouped_mm_without_numbers
from .fused import Ops
from .fused_kernels import FusedKernels
from .kernels import LayerKernels
from .layer_cache import LayerCache
from .manifest import DTYPES
from .plan import CachePlan, LayerPlan, sequence_bytes
from .weights import side_by_side

NOWHERE = torch.device("meta")

COMPILED_AT_ONCE = 16
"""How many kernels are compiled at the same time, on a machine with as many cores."""


@dataclass
class Call:
    """The arguments of one attention call of a layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None


@dataclass
class Observer:
    """An `Attention` that records the calls of a layer while the model runs, and stores no tokens."""

    calls: list[Call]
    name = "observer"
    replayable = False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        self.calls.append(Call(q, k, v, scale, softcap, sinks))
        return q.new_empty(*q.shape[:3], v.shape[-1])

    def read(
        self,
        q: Tensor,
        waiting: tuple[Tensor, Tensor] | None,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        k, v = waiting or (self.calls[-1].k, self.calls[-1].v)  # `attend` makes the launches of `read`, too
        return self.attend(q, k, v, store, new, scale, softcap, sinks)

    def append(self, k: Tensor, v: Tensor, store: LayerCache, new: NewTokens) -> None:
        pass

    def lower(self, store: LayerCache, state: Tensor | None) -> None:
        store.lower()


def observed_calls(
    code: ModuleType,
    empty: Mapping[str, Tensor],
    groups: Iterable[Sequence[str]],
    plan: CachePlan,
    ops: Ops,
    batches: Sequence[int],
    counts: Sequence[int],
) -> list[list[Call]]:
    """The attention calls of each layer of the generated model `code`, for so many sequences and tokens of each.

    The model runs with `ops` on weights without memory, whose `groups` lie side by side.
    """
    calls: list[list[Call]] = [[] for _ in plan.layers]
    ops = replace(ops, grouped_mm=grouped_mm_without_numbers)
    hidden_states, _ = code.bind({**empty, **side_by_side(empty, groups, NOWHERE)})
    whole = roomy(plan, *plan.layers)
    with torch.inference_mode():
        for batch in batches:
            for count in sorted({min(count, plan.max_len) for count in counts}):
                observers = [Observer(of_layer) for of_layer in calls]
                cache = Cache(whole, batch, None, DTYPES[plan.dtype], NOWHERE, observers)
                cache.begin([slice(0, count)] * batch)
                ids = torch.zeros(batch, count, dtype=torch.int64, device=NOWHERE)
                hidden_states(ids, ids, cache, ops)
    return calls


@contextmanager
def first_kernels(
    attention: Sequence[Attention],
    ops: Ops,
    run: Callable[[CachePlan, Ops, Sequence[int], Sequence[int]], Any],
    plan: CachePlan,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[None]:
    """Within, the kernels are compiled that a new cache in `dtype` is written and read with, and those of `ops`, if
    Triton compiles them. `run` is `observed_calls` of the model.

    Nothing depends on this, so nothing fails by it: an error of Triton is left to the launch of the kernel, and any
    other becomes a warning.
    """
    kinds = {
        (layer.module, one.stages[:1]): (_Compiled(layer.module, device), layer.tuning, one)
        for layer, one in zip(attention, plan.layers, strict=True)
        if isinstance(layer, LayerKernels) and isinstance(layer.module, ModuleType)
    }
    if device.type != "cuda" or not kinds:
        yield
        return

    def compile_all() -> None:
        import triton

        with (
            torch.cuda.device(device),  # the current one of this thread, which begins with another
            ThreadPoolExecutor(min(COMPILED_AT_ONCE, os.cpu_count() or 1)) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            for module, tuning, one in kinds.values():
                launch_first(LayerKernels(module, tuning), plan, one, dtype)  # type: ignore[arg-type]
            if isinstance(ops, FusedKernels) and isinstance(ops.module, ModuleType):
                run(in_dtype(plan, dtype), FusedKernels(_Compiled(ops.module, device)), (1,), (1, 2))  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as thread:  # a mode of Triton's belongs to a thread, and this one ends with it
        compiling = thread.submit(compile_all)
        yield
        if (error := compiling.exception()) is not None:
            warnings.warn(
                f"the first kernels could not be compiled while the model was loaded ({error}), so its first tokens "
                f"take longer; please report this",
                RuntimeWarning,
                stacklevel=3,
            )


def launch_first(kernels: LayerKernels, plan: CachePlan, layer: LayerPlan, dtype: torch.dtype) -> None:
    """Make the launches for one token, a short prompt, and one that the library attends to, in a new cache of a layer,
    without memory."""
    whole = roomy(in_dtype(plan, dtype), layer)
    for count in (1, 2, kernels.tuning.library_unit):
        if 1 <= count <= plan.max_len:
            for full in (False, True):
                attend(kernels, whole, plan.max_len, 0, _call(kernels, layer, count, dtype), full)


def in_dtype(plan: CachePlan, dtype: torch.dtype) -> CachePlan:
    """The plan of a model that is loaded in `dtype`."""
    return replace(plan, dtype=str(dtype).removeprefix("torch."))


def _call(kernels: LayerKernels, layer: LayerPlan, count: int, dtype: torch.dtype) -> Call:
    module = kernels.module
    heads = layer.num_key_value_heads * module.GROUP.value
    new = partial(torch.empty, dtype=dtype, device=NOWHERE)
    return Call(
        new(1, heads, count, layer.key_head_dim),
        new(1, layer.num_key_value_heads, count, layer.key_head_dim),
        new(1, layer.num_key_value_heads, count, layer.value_head_dim),
        scale=1.0,
        softcap=None,
        sinks=new(heads) if module.HAS_SINKS.value else None,
    )


def roomy(plan: CachePlan, *layers: LayerPlan) -> CachePlan:
    """A plan of these layers with room for two sequences at the widest codes.

    Such caches exist: with fewer sequences or tokens than planned, codes stay wide for longer.
    """
    itemsize = DTYPES[plan.dtype].itemsize
    wide = (replace(layer, arena_bytes=2 * sequence_bytes(layer, plan.max_len, itemsize, stage=0)) for layer in layers)
    return replace(plan, batch_size=2, layers=tuple(wide))


def attend(kernels: Attention, plan: CachePlan, max_len: int, stage: int, call: Call, full: bool = True) -> Cache:
    """Make an attention call on a cache of the one layer in `plan`, without memory. It is at `stage` and its window is
    `full`, so that a block leaves it if one ever can, or empty."""
    batch, _, count, _ = call.q.shape
    cache = Cache(plan, batch, max_len, DTYPES[plan.dtype], NOWHERE, [kernels])
    store = cache.layers[0]
    rows = min(store.plan.sink + store.plan.window, max_len - count) if full else 0
    store.seek([rows] * batch, stage)
    cache.length = [rows] * batch
    cache.begin([slice(0, count)] * batch)
    kernels.attend(call.q, call.k, call.v, store, cache.new_tokens, call.scale, call.softcap, call.sinks)
    return cache


@dataclass(frozen=True)
class _Compiled:
    """Takes the place of a module of kernels, and compiles them instead of launching them."""

    module: ModuleType
    target_device: torch.device

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        return _CompiledKernel(found) if hasattr(found, "warmup") else found


@dataclass(frozen=True)
class _CompiledKernel:
    kernel: Any

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.kernel.warmup, grid=grid)
