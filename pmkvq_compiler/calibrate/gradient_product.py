"""PM-KVQ's measure of what it costs the model to keep K or V of one layer in a format, after its published code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.formats import Format, Losses
from pmkvq_compiler.runtime.quantize import fake_quantize


class GradientProduct:
    """Observes attention calls and, while gradients come back, adds up sum |delta x| * |dLoss / dx| over K and V.

    That is PM-KVQ's measure (its "block-wise memory allocation") as its published code computes it: every token is
    quantized, by token, and K without scales; with the errors of this project's codes, and with the sum in place of
    the mean, so that layers of different shapes can be compared. That code lists tensors from the first layer to
    the last and gradients as they come back, from the last to the first, and pairs the two lists: errors of layer i
    meet gradients of layer n - 1 - i. As a first-order expansion of the loss, which the paper derives it from,
    errors would meet gradients of their own layer; plans are then others. Where layers differ in shape, which the
    published code does not support, those of a shape are paired among themselves.
    """

    def __init__(self, key_formats: Mapping[int, list[Format]], value_formats: Mapping[int, list[Format]]) -> None:
        self.key: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in key_formats.items()}
        self.value: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in value_formats.items()}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        for x, losses, tensors in ((call.key, self.key, self._keys), (call.value, self.value, self._values)):
            tensors[call.layer] = x.detach()
            x.register_hook(partial(self._add, losses, tensors, call.layer))

    def _add(self, losses: Losses, tensors: Mapping[int, Tensor], layer: int, gradient: Tensor) -> None:
        alike = sorted(other for other, x in tensors.items() if x.shape == gradient.shape)
        paired = alike[-1 - alike.index(layer)]
        x = tensors[paired]
        for kept in losses[paired]:
            error = fake_quantize(x, kept.bits, dim=-1) - x
            losses[paired][kept] += (error * gradient).abs().sum(dtype=torch.float64).item()
