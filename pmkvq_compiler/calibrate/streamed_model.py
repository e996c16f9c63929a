"""A model whose layers are read from its checkpoint when they are needed, one at a time.

The embedding, the last norm and the head stay in memory. A layer's weights are read before it runs and dropped after
it. The model's own code computes everything: a run of the model with layers that only hand their input on shows what
each layer is given besides the hidden states, and then the layers run by themselves, each for several texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import ATTENTION
from pmkvq_compiler.calibrate.logits import Logits, logits_of
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.source.source import Source

Layer = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
"""From the hidden states that a layer takes, and its other arguments, to those that it returns."""


@dataclass(frozen=True)
class Text:
    """A text before the first layer, which takes `hidden` [1, S, hidden_size], and the `arguments` that each layer
    takes besides hidden states."""

    input_ids: Tensor
    position_ids: Tensor
    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]


def module_of(model: PreTrainedModel | StreamedModel) -> PreTrainedModel:
    """The module of a model, whether its layers are in memory or read when they are needed."""
    return model.model if isinstance(model, StreamedModel) else model


class StreamedModel:
    """The model of a source on a device; `model` is complete but for the weights of its `layers`."""

    def __init__(self, source: Source, sites: Sequence[AttentionSite], device: str) -> None:
        self.source, self.device = source, torch.device(device)
        self.dtype = source.running_dtype(device)
        self.model: PreTrainedModel = source.unread_model(ATTENTION).requires_grad_(False)
        paths = [site.module for site in sites if site.module is not None]
        if len(set(paths)) < max(len(sites), source.config.get_text_config().num_hidden_layers):
            raise self._refusal("its layers are not a list of modules that attend")
        self.paths = paths
        self.layers = [self.model.get_submodule(path) for path in paths]
        self._names = {id(module): path for path, module in self.model.named_modules()}
        self._place_the_rest()
        for layer in self.layers:
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after, always_call=True)
        self._held: nn.Module | None = None
        self._passing = False

    def _refusal(self, reason: str) -> CompileError:
        return CompileError(
            f"{self.source.name} is too large for the memory that is free, and it cannot be read layer by layer, "
            f"because {reason}; use a machine with more memory"
        )

    # ---- weights ----

    def _place_the_rest(self) -> None:
        """Read everything but the layers; tied tensors stay tied."""
        inside = {part for layer in self.layers for part in layer.modules()}
        for layer in self.layers:
            self._drop(layer)
        read: dict[int, nn.Parameter] = {}
        for part in self.model.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.device)
            if part in inside:
                continue
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) not in read:
                    read[id(parameter)] = self._parameter(part, name, parameter)
                setattr(part, name, read[id(parameter)])

    def _parameter(self, part: nn.Module, name: str, like: Tensor) -> nn.Parameter:
        """A parameter of a module, read from the checkpoint."""
        path = self._names[id(part)]
        value = self.source.read(f"{path}.{name}" if path else name)
        dtype = self.dtype if like.dtype == torch.float64 or like.is_meta else like.dtype
        return nn.Parameter(value.to(self.device, dtype), requires_grad=False)

    def _read(self, layer: nn.Module) -> None:
        for part in layer.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, self._parameter(part, name, parameter))

    def _drop(self, layer: nn.Module) -> None:
        for part in layer.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                dtype = self.dtype if parameter.dtype == torch.float64 else parameter.dtype
                empty = torch.empty(parameter.shape, dtype=dtype, device="meta")
                setattr(part, name, nn.Parameter(empty, requires_grad=False))

    def _before(self, layer: nn.Module, arguments: Any) -> None:
        if layer is not self._held and not self._passing:
            self._read(layer)

    def _after(self, layer: nn.Module, arguments: Any, output: Any) -> None:
        if layer is not self._held and not self._passing:
            self._drop(layer)

    @contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """Within, a layer keeps its weights from call to call."""
        layer = self.layers[number]
        self._read(layer)
        self._held = layer
        try:
            yield
        finally:
            self._held = None
            self._drop(layer)

    # ---- texts ----

    @torch.no_grad()
    def begin(self, input_ids: Tensor, position_ids: Tensor) -> Text:
        """A text [1, S] before the first layer. Raises `CompileError` if the layers do not simply follow each other."""
        input_ids, position_ids = input_ids.to(self.device), position_ids.to(self.device)
        given: list[Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, others: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
            given.append(hidden)
            arguments.append((others, named))
            return hidden

        with self._running(lambda number: record):
            logits_of(self.model, input_ids, position_ids)
        if len(given) != len(self.layers) or any(hidden is not given[0] for hidden in given):
            raise self._refusal("its layers do not simply follow each other")
        return Text(input_ids, position_ids, given[0], arguments)

    def run(self, number: int, text: Text, hidden: Tensor) -> Tensor:
        """The hidden states after a layer, from those before it."""
        others, named = text.arguments[number]
        output = self.layers[number](hidden, *others, **named)
        return output if isinstance(output, Tensor) else output[0]

    def finish(self, text: Text, hidden: Tensor) -> Logits:
        """The logits of a text from the hidden states after the last layer, which autograd follows."""
        last = len(self.layers) - 1
        with self._running(lambda number: lambda given, others, named: hidden if number == last else given):
            return logits_of(self.model, text.input_ids, text.position_ids)

    @contextmanager
    def _running(self, instead: Callable[[int], Layer]) -> Iterator[None]:
        """Within, layer `number` calls `instead(number)` and nothing of its own; no weights are read."""

        def forward(number: int) -> Callable[..., Tensor]:
            def call(*arguments: Any, **named: Any) -> Tensor:
                if arguments:
                    return instead(number)(arguments[0], arguments[1:], named)
                hidden = named.pop("hidden_states")
                return instead(number)(hidden, (), named)

            return call

        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.callback(layer.__dict__.pop, "forward")
                layer.forward = forward(number)  # type: ignore[method-assign]
            self._passing = True
            stack.callback(setattr, self, "_passing", False)
            yield
