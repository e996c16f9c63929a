"""Compares every layer of an artifact, on its own, with the same layer of the source model.

The artifact computes in float32 with its stored weights, and each of its layers starts from the output of the source's
layer before it. Any difference was then made in this layer: by its folded weights, which were rounded when they were
written, or by a fault. Such errors do not grow with the number of layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.calibrate.layer_outputs import QUERIES, TOKENS, LayerOutputs
from pmkvq_compiler.emit.fetched import Fetched


@dataclass(frozen=True)
class LayerError:
    """The relative norm of a difference, and the place where it was found."""

    place: str
    error: float


def layer_errors(model: runtime.CompiledModel, input_ids: Tensor, expected: LayerOutputs) -> list[LayerError]:
    """The errors of each layer of the artifact, for the beginning of the text `input_ids` [1, S].

    The error of the scores is that of the worst head. The error of the hidden states is relative to what the layer adds
    to them, and is the median over the tokens: if a router chooses another expert for a single token, nothing is wrong.
    The list is empty if the outputs of the source's layers are not known.
    """
    found: list[LayerError] = []
    code = _copied(model.hidden_states.func.__globals__)  # type: ignore[attr-defined]
    layers = [name for name, function in code.items() if _is_layer(function)]
    if not expected.hidden or not layers:
        return found
    attentions, keys = iter(sorted(expected.scores)), dict[int, Tensor]()
    code["cached_attention"] = partial(_attend, code["cached_attention"], expected, found, attentions, keys)
    code |= {name: partial(_run_layer, code[name], expected, found) for name in layers}
    hidden_states, logits_of = code["bind"](Fetched(model.weights, model.device, torch.float32))
    widened = replace(model, hidden_states=hidden_states, logits=logits_of, dtype=torch.float32)
    beginning = input_ids[:, :TOKENS]
    logits = widened(beginning, model.new_cache(max_len=beginning.shape[1]))[0, -QUERIES:]
    found.append(LayerError("the logits", _token_error(logits, expected.logits, expected.logits)))
    return found


def _copied(code: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's globals, in which the module's functions use the copy as their globals."""
    copied = dict(code)
    for name, value in code.items():
        if inspect.isfunction(value) and value.__globals__ is code:
            copied[name] = FunctionType(value.__code__, copied, name, value.__defaults__)
    return copied


def _is_layer(function: Any) -> bool:
    return inspect.isfunction(function) and [*inspect.signature(function).parameters][:2] == ["weights", "layer"]


def _attend(
    attention: Callable[..., Tensor],
    expected: LayerOutputs,
    found: list[LayerError],
    attentions: Iterator[int],
    keys: dict[int, Tensor],
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: runtime.Cache,
    layer: int,
    **others: Any,
) -> Tensor:
    """Run the attention of the next of the layers `attentions`, after comparing its scores. `keys` are those of the
    layers before it, by the index of their cache."""
    own = next(attentions)
    if k is not None:
        keys[layer] = k[0]
    group = q.shape[1] // keys[layer].shape[0]
    scores = (q[0, :, -QUERIES:] @ keys[layer].repeat_interleave(group, dim=0).transpose(1, 2)).cpu()
    reference = expected.scores[own]
    errors = (scores - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    head = int(errors.nan_to_num(float("inf")).argmax())
    found.append(LayerError(f"the scores of head {head} in layer {own}", float(errors[head])))
    return attention(q, k, v, cache, layer, **others)


def _run_layer(
    function: Callable[..., Tensor],
    expected: LayerOutputs,
    found: list[LayerError],
    weights: Mapping[str, Tensor],
    layer: int,
    *others: Any,
) -> Tensor:
    """Run a layer and compare its output; returns the output of the source's layer instead."""
    out, reference = function(weights, layer, *others), expected.hidden[layer]
    before = expected.hidden.get(layer - 1)
    added = reference if before is None or before.shape != reference.shape else reference - before
    found.append(LayerError(f"the hidden states after layer {layer}", _token_error(out, reference, added)))
    return reference.to(out.device)


def _token_error(out: Tensor, reference: Tensor, scale: Tensor) -> float:
    errors = (out.cpu() - reference).flatten(0, -2).norm(dim=-1) / scale.flatten(0, -2).norm(dim=-1)
    return float(errors.nan_to_num(float("inf")).median())
