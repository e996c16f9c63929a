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

    Weights are converted only while they are needed: each of the `layers` while it runs, and of the other modules each
    by itself. A device may not have room for two copies of a large model, or of its embedding and its head.
    """
    inside = {part for layer in layers for part in layer.modules()}
    with ExitStack() as stack:
        for layer in layers:
            _widened(stack, layer, whole=True)
        for part in model.modules():
            if part not in inside:
                _widened(stack, part, whole=False)
        yield


def _widened(stack: ExitStack, module: nn.Module, whole: bool) -> None:
    """Until `stack` is closed, `module` runs in float32: with its own tensors or, if it is taken as a `whole`, with
    those of the modules inside it, too."""
    stored: dict[Tensor, Tensor] = {}

    def widen(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        for tensor in (*module.parameters(recurse=whole), *module.buffers(recurse=whole)):
            if tensor.dtype in HALVES:  # a tensor that two modules share may be converted already
                stored[tensor] = tensor.data
                tensor.data = tensor.data.float()
        # some models round what they pass to a module to the dtype that its weights have before it runs
        return tuple(one.float() if isinstance(one, Tensor) and one.dtype in HALVES else one for one in arguments)

    def give_back(module: nn.Module, arguments: Any, output: Any) -> None:
        while stored:
            tensor, data = stored.popitem()
            tensor.data = data

    stack.callback(module.register_forward_pre_hook(widen).remove)
    stack.callback(module.register_forward_hook(give_back, always_call=True).remove)
