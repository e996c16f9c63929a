"""PM-KVQ's measure of what it costs the model to store K or V of one layer in a format, after its published code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.formats import Format, Losses
from pmkvq_compiler.runtime.quantize import fake_quantize


class GradientProduct:
    """Observes attention calls and, in the backward pass, adds up |delta x| * |dLoss / dx| over all x of K and of V.

    This is PM-KVQ's measure (the paper's "block-wise memory allocation") as its published code computes it. All tokens
    are quantized, in groups by token, and K is not scaled. Two things differ here: the errors are those of this
    project's codes, and we take sums instead of means, so that layers of different shapes can be compared.

    The published code lists tensors from the first layer to the last, but gradients in the order of the backward pass,
    from the last layer to the first. It then pairs the two lists, so errors of layer i are multiplied by gradients of
    layer n - 1 - i. The paper derives the measure from a first-order expansion of the loss, where each error would be
    multiplied by the gradient of its own layer; that would give other plans. The published code does not support layers
    of different shapes. Here, layers of the same shape are paired with each other.
    """

    def __init__(self, key_formats: Mapping[int, list[Format]], value_formats: Mapping[int, list[Format]]) -> None:
        self.key: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in key_formats.items()}
        self.value: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in value_formats.items()}
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def __call__(self, call: AttentionCall) -> None:
        seen = self._keys.get(call.layer)
        if seen is not None and seen.data_ptr() == call.key.data_ptr():
            return  # another layer reads the same cache; the gradients of all of them arrive together
        for x, losses, tensors in ((call.key, self.key, self._keys), (call.value, self.value, self._values)):
            tensors[call.layer] = x.detach()
            x.register_hook(partial(self._add, losses, tensors, call.layer))

    def _add(self, losses: Losses, tensors: Mapping[int, Tensor], layer: int, gradient: Tensor) -> None:
        alike = sorted(other for other, x in tensors.items() if x.shape == gradient.shape)
        paired = alike[-1 - alike.index(layer)]
        x = tensors[paired].to(gradient.device)
        for kept in losses[paired]:
            error = fake_quantize(x, kept.bits, dim=-1) - x
            losses[paired][kept] += (error * gradient).abs().sum(dtype=torch.float64).item()
