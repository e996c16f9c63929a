"""What it costs the model to store K or V of one layer in a format, in nats a token.

`OutputLoss` predicts how far the distribution of the model's next token moves. To second order, this divergence is a
quadratic form of the change in the attention's output, with the Fisher information as its matrix. It equals half the
mean square of `gradient . change` over labels that are drawn from the model itself.

The change is computed exactly, through the softmax. Noise in the keys raises the weights of the many tokens that matter
little, which no gradient with respect to K would show. Each query attends to the cache as it would be at that moment:
sink and window are exact, and older blocks are quantized. Without the window, layers that only look back a few tokens
would seem to matter most; with it they cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.formats import Format, Losses, Transform, by_code, stored

QUERIES = 128
"""Number of query positions, drawn from the second half of a text, at which outputs are compared."""

MAGNIFIED = 2.0
"""Errors of keys are multiplied by this factor before they are measured, and the loss is divided by its square. A query
that attends to the wrong token breaks a chain of thought. With errors of their true size, this is too rare to show up
in a few texts; larger errors reveal where it is about to happen."""


LARGEST_GROWTH = 60.0
"""The largest growth of a score, in nats, that is taken into account: its exponential still fits float32."""


class OutputLoss:
    """Observes attention calls and, in the backward pass, adds up the predicted loss of each format."""

    def __init__(
        self,
        key_formats: Mapping[int, list[Format]],
        value_formats: Mapping[int, list[Format]],
        key_matrices: Mapping[int, Mapping[Transform, Tensor]],
        value_matrices: Mapping[int, Mapping[Transform, Tensor]],
        sink: int,
        block: int,
    ) -> None:
        self.key_matrices, self.value_matrices = key_matrices, value_matrices
        self.sink, self.block = sink, block
        self.key: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in key_formats.items()}
        self.value: Losses = {layer: dict.fromkeys(formats, 0.0) for layer, formats in value_formats.items()}
        self.texts: dict[int, int] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        output = call.output()
        length = call.key.shape[-2]
        text = self.texts[call.layer] = self.texts.get(call.layer, 0) + 1
        generator = torch.Generator().manual_seed(call.layer << 32 | text)  # whatever the order of layers and texts
        positions = length // 2 + torch.randperm(length - length // 2, generator=generator)[:QUERIES]
        sampled = call.detached().at(positions.to(call.key.device))
        output.register_hook(partial(self._add, sampled, positions.to(call.key.device)))
        return output

    def measured(self, layer: int) -> dict[str, Tensor]:
        """The losses of a layer so far, for each format."""
        losses = {"key": self.key[layer], "value": self.value[layer]}
        return {name: torch.tensor([*each.values()], dtype=torch.float64) for name, each in losses.items()}

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """The inverse of `measured`."""
        for losses, name in ((self.key[layer], "key"), (self.value[layer], "value")):
            losses.update(zip(losses, tensors[name].tolist(), strict=True))

    @torch.no_grad()
    def _add(self, call: AttentionCall, positions: Tensor, gradient: Tensor) -> None:
        """Add the losses of one text. Sums are kept for each block of keys and serve all windows: a window decides how
        many blocks are quantized for a query."""
        gradient = gradient[:, :, positions]
        scores = call.scores(call.query, call.key)
        weights = call.weights(scores)
        exact = call.values_under(weights, call.value)
        blocks = max(0, call.key.shape[-2] - self.sink) // self.block
        quantized = slice(self.sink, self.sink + blocks * self.block)
        old = {kept.window: self._old_blocks(call, positions, kept.window) for kept in self.value[call.layer]}

        def add(losses: dict[Format, float], kept: Format, output: Tensor, magnified: float = 1.0) -> None:
            change = ((output - exact) * gradient).sum(dim=(1, 3), dtype=torch.float64)
            losses[kept] += change.square().mean().item() / 2 / magnified**2

        def sums(weights: Tensor, value: Tensor) -> Tensor:
            return _block_sums(weights[..., quantized], value[:, :, quantized], self.block)

        value = F.pad(call.value, (0, 1), value=1.0)  # the weighted sum of a column of ones is the sum of the weights
        outside = weights.clone()
        outside[..., quantized] = 0
        always = call.values_under(outside, value)
        always[..., -1] += (1 - weights.sum(-1)).clamp(min=0)  # the probability that sink logits take
        unchanged = always.unsqueeze(-2) + _of_all_but_first(sums(weights, value))
        for code, formats in by_code(self.key[call.layer]):
            drift = call.scores(call.query, self._magnified_key(call, code)) - scores
            growth = drift.clamp(max=LARGEST_GROWTH).exp()
            changed = _of_first(sums(weights * growth, value))
            for kept in formats:
                mixed = _at(unchanged, old[kept.window]) + _at(changed, old[kept.window])
                add(self.key[call.layer], kept, mixed[..., :-1] / mixed[..., -1:], MAGNIFIED)
        for code, formats in by_code(self.value[call.layer]):
            matrices = self.value_matrices.get(call.layer, {}).get(code.transform)
            changed = _of_first(sums(weights, stored(call.value, code, self.sink, self.block, matrices) - call.value))
            for kept in formats:
                add(self.value[call.layer], kept, exact + _at(changed, old[kept.window]))

    def _magnified_key(self, call: AttentionCall, code: Format) -> Tensor:
        """The keys with the errors of a format multiplied by `MAGNIFIED`."""
        matrices = self.key_matrices.get(call.layer, {}).get(code.transform)
        return torch.lerp(call.key, stored(call.key, code, self.sink, self.block, matrices), MAGNIFIED)

    def _old_blocks(self, call: AttentionCall, positions: Tensor, window: int) -> Tensor:
        """For each query, the number of blocks that have left the window when it attends."""
        beyond = positions + 1 - self.sink - text_window(window, call.key.shape[-2])
        whole = max(0, call.key.shape[-2] - self.sink) // self.block
        return ((beyond.clamp(min=0) + self.block - 1) // self.block).clamp(max=whole)


def text_window(window: int, length: int) -> int:
    """The window to use for a calibration text of `length` tokens: at most a quarter of the text."""
    return min(window, length // 4)


def _block_sums(weights: Tensor, value: Tensor, block: int) -> Tensor:
    """The sums [B, Hq, Q, n, d] of each block's values [B, Hkv, n * block, d] under weights [B, Hq, Q, n * block]."""
    groups = weights.unflatten(-1, (-1, block)).unflatten(1, (value.shape[1], -1))
    sums = torch.einsum("bhgqnk,bhnkd->bhgqnd", groups, value.unflatten(2, (-1, block)))
    return sums.flatten(1, 2)


def _of_first(sums: Tensor) -> Tensor:
    """From the sums of n blocks [..., n, d] to the totals of the first 0, 1, ..., n blocks [..., n + 1, d]."""
    return F.pad(sums.cumsum(-2), (0, 0, 1, 0))


def _of_all_but_first(sums: Tensor) -> Tensor:
    """From the sums of n blocks [..., n, d] to the totals of all but the first 0, 1, ..., n blocks [..., n + 1, d]."""
    return F.pad(sums.flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _at(sums: Tensor, blocks: Tensor) -> Tensor:
    """The total [B, H, Q, d] for each query's number of blocks [Q], out of totals [B, H, Q, n + 1, d]."""
    return sums[:, :, torch.arange(len(blocks), device=blocks.device), blocks]
