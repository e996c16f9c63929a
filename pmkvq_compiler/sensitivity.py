"""What it costs the model to keep K or V of one layer in a format: two measures.

`OutputLoss` predicts, in nats a token, how far the model's output distribution moves. A second-order expansion of the
divergence is the output's change squared under the Fisher information, which is the mean square of `gradient . change`
over labels drawn from the model itself. The change is that of the attention's output, computed in full: keys enter it
through the softmax, where noise lifts the many tokens that matter little, and no gradient with respect to K sees
that. Queries see exactly what the cache would give them: sink and window exact, older blocks quantized. Without the
window, layers that only look back a few tokens seem to matter most; with it they cost next to nothing.

`GradientProduct` is PM-KVQ's measure, sum |delta x| * |dLoss / dx| over K or V.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from .formats import Format, stored
from .recording import AttentionCall

QUERIES = 128
"""Query positions of a text at which outputs are compared, drawn from its second half."""

Losses = dict[int, dict[Format, float]]
"""By layer and format, the sum over texts of a measure."""


class OutputLoss:
    """Observes attention calls and, while gradients come back, adds up the predicted loss of each format."""

    def __init__(
        self,
        key_formats: Mapping[int, list[Format]],
        value_formats: Mapping[int, list[Format]],
        scales: Mapping[int, Tensor],
        sink: int,
        block: int,
    ) -> None:
        self.scales, self.sink, self.block = scales, sink, block
        self.key: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in key_formats.items()}
        self.value: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in value_formats.items()}
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, call: AttentionCall) -> Tensor:
        output = call.output()
        length = call.key.shape[-2]
        positions = length // 2 + torch.randperm(length - length // 2, generator=self.generator)[:QUERIES]
        sampled = call.detached().at(positions.to(call.key.device))
        output.register_hook(partial(self._add, sampled, positions.to(call.key.device)))
        return output

    @torch.no_grad()
    def _add(self, call: AttentionCall, positions: Tensor, gradient: Tensor) -> None:
        gradient = gradient[:, :, positions]
        exact_scores = call.scores(call.query, call.key)
        exact_weights = call.weights(exact_scores)
        exact = call.values_under(exact_weights, call.value)

        def loss(output: Tensor) -> float:
            change = ((output - exact) * gradient).sum(dim=(1, 3), dtype=torch.float64)
            return change.square().mean().item() / 2

        olds = {kept.window: self._old(call, positions, kept.window) for kept in self.value[call.layer]}
        for kept, scores in self._key_scores(call):
            weights = call.weights(torch.where(olds[kept.window], scores, exact_scores))
            self.key[call.layer][kept] += loss(call.values_under(weights, call.value))
        for kept in self.value[call.layer]:
            error = stored(call.value, kept, self.sink, self.block) - call.value
            self.value[call.layer][kept] += loss(exact + call.values_under(exact_weights * olds[kept.window], error))

    def _key_scores(self, call: AttentionCall) -> Iterator[tuple[Format, Tensor]]:
        """Each format of K and the scores over keys kept in it; formats that differ in the window share them."""

        def codes(kept: Format) -> Format:
            return replace(kept, window=0)

        for code, formats in groupby(sorted(self.key[call.layer], key=repr), key=codes):
            keys = stored(call.key, code, self.sink, self.block, self.scales.get(call.layer))
            scores = call.scores(call.query, keys)
            yield from ((kept, scores) for kept in formats)

    def _old(self, call: AttentionCall, positions: Tensor, window: int) -> Tensor:
        """Mask [queries, keys] of what has left the window when a query comes; a short text gets a short window."""
        length = call.key.shape[-2]
        beyond = positions + 1 - self.sink - min(window, length // 4)
        blocks = (beyond.clamp(min=0) + self.block - 1) // self.block
        tokens = torch.arange(length, device=positions.device)
        return (tokens >= self.sink) & (tokens < self.sink + blocks.unsqueeze(-1) * self.block)


class GradientProduct:
    """Observes attention calls and, while gradients come back, adds up sum |delta x| * |dLoss / dx| over K and V.

    That is PM-KVQ's measure with the sum in place of the mean, so that layers of different shapes can be compared.
    """

    def __init__(
        self,
        key_formats: Mapping[int, list[Format]],
        value_formats: Mapping[int, list[Format]],
        scales: Mapping[int, Tensor],
        sink: int,
        block: int,
    ) -> None:
        self.scales, self.sink, self.block = scales, sink, block
        self.key: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in key_formats.items()}
        self.value: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in value_formats.items()}

    def __call__(self, call: AttentionCall) -> None:
        call.key.register_hook(partial(self._add, self.key[call.layer], call.key.detach(), self.scales.get(call.layer)))
        call.value.register_hook(partial(self._add, self.value[call.layer], call.value.detach(), None))

    def _add(self, losses: dict[Format, float], x: Tensor, scale: Tensor | None, gradient: Tensor) -> None:
        for kept in losses:
            error = stored(x, kept, self.sink, self.block, scale) - x
            losses[kept] += (error * gradient).abs().sum(dtype=torch.float64).item()
