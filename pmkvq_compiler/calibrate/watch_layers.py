"""Runs the source model in float32 and keeps what every layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import AttentionCall, observed, run
from pmkvq_compiler.calibrate.layer_outputs import QUERIES, TOKENS, LayerOutputs
from pmkvq_compiler.passes.program import AttentionSite

HALVES = (torch.float16, torch.bfloat16)


def layer_outputs(model: PreTrainedModel, sites: Sequence[AttentionSite], input_ids: Tensor) -> LayerOutputs:
    """Run `model` in float32 on the first tokens of `input_ids` [1, S]; it must be loaded with `ATTENTION`."""
    modules = _layer_modules(model, sites)
    scores: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}

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


def _layer_modules(model: PreTrainedModel, sites: Sequence[AttentionSite]) -> dict[int, str]:
    """The paths of the modules of all layers, with and without attention, by the layers' indices; empty if the model's
    layers are not one list."""
    paths = {site.module for site in sites if site.module is not None}
    lists = {path.rpartition(".")[0] for path in paths}
    if len(paths) < len(sites) or len(lists) != 1:
        return {}
    (path,) = lists
    return {int(name): f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()}


@contextmanager
def in_float32(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Within, `model` computes in float32 with its stored weights.

    Each of its `layers` is converted only while it runs: a device may not have room for two copies of a large model.
    """
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
