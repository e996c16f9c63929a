"""What every layer of the source model makes of one text, in float32: an artifact's layers are held against that.

Rounding in 16 bits grows from layer to layer until it hides a fault. So nothing is rounded here, and the artifact's
layers are later given what came out of the source's layers, one by one: the error of a layer is then its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import AttentionCall, observed, run
from pmkvq_compiler.passes.program import AttentionSite

TOKENS = 64
"""Tokens of the text, from its beginning."""
QUERIES = 8
"""The last of them, whose scores and logits are kept."""
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LayerOutputs:
    """Of every layer, by its index and in float32 on the CPU: `scores` [Hq, QUERIES, TOKENS], the products of the last
    queries with all keys, and `hidden` [1, TOKENS, hidden_size] (or what else the layers hand on); there are none of a
    model whose layers are no list of modules. `logits` [QUERIES, V] are those of the whole model."""

    logits: Tensor
    scores: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)


def layer_outputs(model: PreTrainedModel, sites: Sequence[AttentionSite], input_ids: Tensor) -> LayerOutputs:
    """Run `model`, whose attention is observed, in float32 on the first tokens of `input_ids` [1, S]."""
    modules = {site.layer: site.module for site in sites if site.module is not None}
    scores: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}
    if len({*modules.values()}) < len(sites):
        modules = {}

    def keep_scores(call: AttentionCall) -> None:
        if modules:
            plain = replace(call, softcap=None, scaling=1.0)
            scores[call.layer] = plain.scores(call.query[..., -QUERIES:, :], call.key)[0].cpu()

    def keep_hidden(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            hidden[layer] = (output if isinstance(output, Tensor) else output[0]).cpu()

        return hook

    input_ids = input_ids[:, :TOKENS].to(model.device)
    positions = torch.arange(input_ids.shape[1], device=model.device).unsqueeze(0)
    layers = {layer: model.get_submodule(path) for layer, path in modules.items()}
    with ExitStack() as stack, torch.no_grad(), observed(keep_scores):
        stack.enter_context(in_float32(model, list(layers.values())))
        for layer, module in layers.items():
            stack.callback(module.register_forward_hook(keep_hidden(layer)).remove)
        logits = run(model, input_ids, positions, QUERIES)[0].cpu()
    return LayerOutputs(logits, scores, hidden)


@contextmanager
def in_float32(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, `model` computes in float32 with the weights that it has. Only one of its `layers` is widened at a time,
    for as long as it runs: two copies of a large model may not fit the device."""
    inside = {part for layer in layers for part in layer.modules()}
    outside = [part for part in model.modules() if part not in inside]
    kept: dict[nn.Module, dict[Tensor, Tensor]] = {}

    def widen(module: nn.Module, arguments: Any = None) -> None:
        tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.dtype in HALVES]
        kept[module] = {tensor: tensor.data for tensor in tensors}
        for tensor in tensors:
            tensor.data = tensor.data.float()

    def give_back(module: nn.Module, arguments: Any = None, output: Any = None) -> None:
        for tensor, stored in kept.pop(module).items():
            tensor.data = stored

    with ExitStack() as stack:
        for part in outside:
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                if tensor.dtype in HALVES:
                    stack.callback(setattr, tensor, "data", tensor.data)
                    tensor.data = tensor.data.float()
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(widen).remove)
            stack.callback(layer.register_forward_hook(give_back, always_call=True).remove)
        yield


def layer_tensors(layers: LayerOutputs) -> dict[str, Tensor]:
    """By the names under which they are kept in a file; `layers_of` reads them back."""
    tensors = {"layers.logits": layers.logits}
    tensors |= {f"layers.scores.{layer}": scores for layer, scores in layers.scores.items()}
    return tensors | {f"layers.hidden.{layer}": hidden for layer, hidden in layers.hidden.items()}


def layers_of(tensors: Mapping[str, Tensor]) -> LayerOutputs:
    found: dict[str, dict[int, Tensor]] = {"scores": {}, "hidden": {}}
    for name, tensor in tensors.items():
        kind, _, layer = name.removeprefix("layers.").partition(".")
        if name.startswith("layers.") and layer:
            found[kind][int(layer)] = tensor
    return LayerOutputs(tensors["layers.logits"], **found)
