"""Traces the step that a CUDA graph is to hold, on a device without memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pmkvq_compiler.runtime.backend import NewTokens
from pmkvq_compiler.runtime.graph import _step
from pmkvq_compiler.runtime.layer_cache import LayerCache
from pmkvq_compiler.runtime.model import CompiledModel
from pmkvq_compiler.runtime.reference import Reference

aten = torch.ops.aten
BY_INDEX = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})


class Silent(Reference):
    """Attention that attends to nothing, and reads no lengths on the host."""

    replayable = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return q.new_zeros(*q.shape[:3], v.shape[-1])

    def read(self, q: Tensor, waiting: Any, store: LayerCache, *_: Any) -> Tensor:
        return q.new_zeros(*q.shape[:3], store.plan.value_head_dim)


class Announced(TorchFunctionMode):
    """Refuses tensors that are made of the host's numbers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy), "the host tells the device numbers"
        return function(*args, **(kwargs or {}))


class Captured(TorchDispatchMode):
    """Refuses what else a CUDA graph cannot hold: numbers read by the host, and tensors in its memory."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, out)):
            assert not isinstance(one, Tensor) or one.is_meta, f"{function} has a tensor on the {one.device}"
        assert torch.Tag.data_dependent_output not in function.tags, f"the host reads what {function} gives"
        assert function is not aten._grouped_mm.default, "except in bfloat16 it reads numbers, too"
        masks = tree_leaves(args[1]) if function in BY_INDEX else ()
        assert not any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in masks), "counts a mask"
        return out


def trace_decode_step(model: CompiledModel, announced: bool = True) -> None:
    """Trace a decode step of two sequences on a device without memory. Unless it is `announced` on the device which of
    them have a token, the host tells it."""
    device = torch.device("meta")
    with torch.inference_mode():
        weights = {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in model.weights.items()}
        bound = {name: partial(getattr(model, name).func, weights) for name in ("hidden_states", "logits")}
        model = replace(model, **bound, device=device, attention=[Silent()] * len(model.plan.layers))
        cache = model.new_cache(2)
        cache.new_tokens = NewTokens([slice(0, 0)] * 2, cache.state if announced else None)
        tokens, counts = (torch.zeros(2, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
        with Announced(), Captured():
            assert _step(model, cache, tokens, counts).shape == (2, model.vocab_size)
