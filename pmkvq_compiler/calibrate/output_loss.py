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
from dataclasses import dataclass, field
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


@dataclass
class _Readers:
    """The attentions that read one cache, in one text.

    They may be on several devices; the tensors here are on the CPU. They are compared at the same query `positions`
    [Q]. `waiting` of them have not got their gradients yet; `key` and `value` hold what each format does to the loss
    through the others [1, Q]. The same noise reaches the loss through all of them, so these changes are summed before
    they are squared.
    """

    positions: Tensor
    waiting: int = 0
    key: dict[Format, Tensor] = field(default_factory=dict)
    value: dict[Format, Tensor] = field(default_factory=dict)


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
        self._readers: dict[int, _Readers] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        output = call.output()
        if call.layer not in self._readers:
            self._readers[call.layer] = _Readers(self._drawn(call))
        readers = self._readers[call.layer]
        readers.waiting += 1
        output.register_hook(partial(self._add, call.detached().at(readers.positions), readers))
        return output

    def _drawn(self, call: AttentionCall) -> Tensor:
        """Positions of queries in the second half of a text; the same ones in whatever order layers and texts come."""
        length = call.key.shape[-2]
        text = self.texts[call.layer] = self.texts.get(call.layer, 0) + 1
        generator = torch.Generator().manual_seed(call.layer << 32 | text)
        return length // 2 + torch.randperm(length - length // 2, generator=generator)[:QUERIES]

    def measured(self, layer: int) -> dict[str, Tensor]:
        """The losses of a layer so far, for each format."""
        losses = {"key": self.key[layer], "value": self.value[layer]}
        return {name: torch.tensor([*each.values()], dtype=torch.float64) for name, each in losses.items()}

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """The inverse of `measured`."""
        for losses, name in ((self.key[layer], "key"), (self.value[layer], "value")):
            losses.update(zip(losses, tensors[name].tolist(), strict=True))

    @torch.no_grad()
    def _add(self, call: AttentionCall, readers: _Readers, gradient: Tensor) -> None:
        """Add the changes of one attention to those of the others that read the same cache; after the last one, add the
        losses of the text."""
        self._add_changes(call, readers, gradient[:, :, readers.positions])
        readers.waiting -= 1
        if readers.waiting == 0:
            del self._readers[call.layer]
            for losses, changes in ((self.key, readers.key), (self.value, readers.value)):
                for kept, change in changes.items():
                    losses[call.layer][kept] += change.square().mean().item() / 2

    def _add_changes(self, call: AttentionCall, readers: _Readers, gradient: Tensor) -> None:
        """Sums are kept for each block of keys and serve all windows: a window decides how many blocks are quantized
        for a query."""
        positions = readers.positions
        scores = call.scores(call.query, call.key)
        weights = call.weights(scores)
        exact = call.values_under(weights, call.value)
        blocks = max(0, call.key.shape[-2] - self.sink) // self.block
        quantized = slice(self.sink, self.sink + blocks * self.block)
        old = {kept.window: self._old_blocks(call, positions, kept.window) for kept in self.value[call.layer]}

        def add(changes: dict[Format, Tensor], kept: Format, output: Tensor, magnified: float = 1.0) -> None:
            change = ((output - exact) * gradient).sum(dim=(1, 3), dtype=torch.float64).cpu() / magnified
            changes[kept] = changes[kept] + change if kept in changes else change

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
                add(readers.key, kept, mixed[..., :-1] / mixed[..., -1:], MAGNIFIED)
        for code, formats in by_code(self.value[call.layer]):
            matrices = self.value_matrices.get(call.layer, {}).get(code.transform)
            changed = _of_first(sums(weights, stored(call.value, code, self.sink, self.block, matrices) - call.value))
            for kept in formats:
                add(readers.value, kept, exact + _at(changed, old[kept.window]))

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
