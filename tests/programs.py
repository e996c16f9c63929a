"""Captured programs of tiny models, and an interpreter that runs their graphs in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from transformers import PretrainedConfig, PreTrainedModel

from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.ops import MARKER, cached_attention
from pmkvq_compiler.passes.program import AttentionSite, Program
from pmkvq_compiler.runtime.model import CompiledModel
from pmkvq_compiler.runtime.plan import CachePlan
from pmkvq_compiler.runtime.reference import REFERENCE
from pmkvq_compiler.runtime.rotation import rotate_heads
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.unquantized import exact_plan

from .models import tiny_model

MAX_LEN = 64

CAPTURED: dict[str, Program] = {}
"""Programs by their configs."""


def captured(model_type: str, **overrides: Any) -> Program:
    """The program of a tiny model as captured; a copy that a test may change."""
    return captured_once(tiny_model(model_type, **overrides).config)


def captured_once(config: PretrainedConfig) -> Program:
    """What `capture` returns, which depends on the config alone: it is captured once for all tests that compile it."""
    values = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    key = json.dumps([type(config).__name__, values], sort_keys=True, default=str)
    if key not in CAPTURED:
        CAPTURED[key] = capture(config)
    return CAPTURED[key].copy()


def located(model_type: str, **overrides: Any) -> Program:
    program = captured(model_type, **overrides)
    run_passes(program, [LocateAttention()])
    return program


def full_plan(sites: list[AttentionSite], batch_size: int = 2) -> CachePlan:
    """A plan that keeps all `MAX_LEN` tokens in float32, as `--recipe none` does."""
    return exact_plan(sites, MAX_LEN, batch_size, torch.float32, block=16)


class Float64Interpreter(Interpreter):
    """Runs a graph with every float in float64 and attention as plain causal attention, whose keys it records."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.keys: list[Tensor] = []

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is MARKER:
            q, k, v, _, scale, _, _, _ = args
            return self.attend(q, k, v, scale)
        if target is cached_attention:
            q, k, v = args[:3]
            if kwargs.get("key_rotation") is not None:
                q, k = (rotate_heads(x, kwargs["key_rotation"]) for x in (q, k))
            return self.attend(q, k, v, kwargs["scale"])
        if target is torch.ops.aten._assert_tensor_metadata.default:
            return None
        args, kwargs = torch.utils._pytree.tree_map(_in_float64, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inner = Float64Interpreter.__new__(Float64Interpreter)
        Interpreter.__init__(inner, self.fetch_attr(target))
        inner.keys = self.keys
        return inner.run(*args)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.keys.append(k)
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(_future(q.shape[2]), float("-inf"))
        return scores.softmax(-1) @ v


def _future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def _in_float64(argument: Any) -> Any:
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def run_in_float64(program: Program, model: PreTrainedModel, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, S, V] of `program` with the weights of `model` after the program's edits, and K of each layer."""
    state = {name: value.double() for name, value in model.state_dict().items()}
    for edit in program.edits:
        state[edit.tensor] = edit.apply(state[edit.tensor].clone())
    values: dict[str, Any] = {name: state[tensor] for name, tensor in program.weights.items()}
    values |= {name: constant.value.double() for name, constant in program.constants.items()}
    values |= {
        "input_ids": input_ids,
        "position_ids": torch.arange(input_ids.shape[1]).expand_as(input_ids),
        "cache": None,
    }
    interpreter = Float64Interpreter(program)
    inputs = [values[node.name] for node in program.graph.find_nodes(op="placeholder")]
    return interpreter.run(*inputs), interpreter.keys


def compiled_model(code: Any, plan: CachePlan, program: Program, weights: Mapping[str, Tensor]) -> CompiledModel:
    """The float32 model of `program`, whose generated module is `code`, on the CPU; `weights` are by tensor name."""
    tensors = {name: weights[name] for name in program.weights.values()}
    tensors |= {constant.name: constant.value for constant in program.constants.values()}
    hidden_states, logits = code.bind(tensors)
    return CompiledModel(
        plan=plan,
        weights=tensors,
        hidden_states=hidden_states,
        logits=logits,
        vocab_size=code.VOCAB_SIZE,
        eos_token_ids=frozenset(),
        pad_token_id=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention=[REFERENCE] * len(plan.layers),
    )


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())
