"""Simulates the progressive cache on a whole text at once, by running the source model under teacher forcing.

Every query attends to the cache as it would be when the runtime reaches that token. The prompt comes in the runtime's
chunks, and the keys and values of a chunk are exact for its own queries. Then tokens come one by one. Blocks that have
left the window by then are quantized, at the widths that the layer has reached by then. A greedy generation is
reproduced exactly if and only if every argmax of such a run is right. So one run replaces thousands of decoding steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.formats import Format, stored
from pmkvq_compiler.plan.solution import Folds
from pmkvq_compiler.runtime.generate import PREFILL_CHUNK
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, blocks_needed, flushed_blocks, head_bytes, pool_blocks


def progressive(
    plan: CachePlan, folds: Folds, prompt_lengths: Sequence[int], magnified: float = 1.0
) -> Callable[[AttentionCall], Tensor]:
    """The attention over a cache with this `plan`, as a function for `attention_hook.observed`.

    Row b of a call's batch is a text that begins with a prompt of `prompt_lengths[b]` tokens, without padding.
    Quantization errors are multiplied by `magnified`.
    """
    prompts, places = torch.tensor(prompt_lengths), plan.places

    def attention(call: AttentionCall) -> Tensor:
        layer = plan.layers[places[call.layer]]
        if not layer.quantized:
            return call.output()
        return _Layer(call, layer, plan, folds, magnified).attend(prompts.to(call.key.device))

    return attention


class _Layer:
    """One attention call under one layer's plan. It keeps the quantized keys and values of each stage that it needs."""

    def __init__(self, call: AttentionCall, layer: LayerPlan, plan: CachePlan, folds: Folds, magnified: float) -> None:
        self.call, self.layer, self.magnified = call, layer, magnified
        self.key_matrices = folds.keys.get(call.layer)
        self.value_matrices = folds.values.get(call.layer)
        itemsize = getattr(torch, plan.dtype).itemsize
        size = head_bytes(layer, plan.max_len, plan.batch_size, itemsize)
        self.capacities = [pool_blocks(layer, size, itemsize, stage) for stage in layer.stages]
        self.ring = blocks_needed(layer, plan.max_len)
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, prompts: Tensor) -> Tensor:
        query, length = self.call.query, self.call.key.shape[2]
        out = query.new_empty(*query.shape[:3], self.layer.value_head_dim)
        shortest, longest = int(prompts.min()), int(prompts.max())
        for start in range(0, min(longest, length), PREFILL_CHUNK):
            stop = min(start + PREFILL_CHUNK, longest, length)
            out[:, :, start:stop] = self._tile(start, stop, cached=start)
        start = shortest
        while start < length:
            flushed = flushed_blocks(self.layer, start + 1)
            stop = min(length, self.layer.sink + self.layer.window + flushed * self.layer.block)
            decoded = self._tile(start, stop, cached=start + 1)
            own = torch.arange(start, stop, device=out.device) >= prompts.unsqueeze(-1)
            out[:, :, start:stop] = torch.where(own[:, None, :, None], decoded, out[:, :, start:stop])
            start = stop
        return out

    def _tile(self, start: int, stop: int, cached: int) -> Tensor:
        """Attention of queries `start : stop`, each over its past, with the blocks quantized that have left the window
        of a cache of `cached` tokens."""
        layer, call = self.layer, self.call
        flushed = flushed_blocks(layer, cached)
        quantized = slice(layer.sink, layer.sink + flushed * layer.block)
        keys, values = call.key[:, :, :stop], call.value[:, :, :stop]
        if flushed:
            live = min(flushed, self.ring)
            stage = next(number for number, capacity in enumerate(self.capacities) if live <= capacity)
            stored_keys, stored_values = self._stage(stage)
            keys, values = keys.clone(), values.clone()
            keys[:, :, quantized], values[:, :, quantized] = (
                stored_keys[:, :, quantized],
                stored_values[:, :, quantized],
            )
        positions = torch.arange(stop, device=keys.device)
        queries = positions[start:].unsqueeze(-1)
        visible = positions <= queries
        if layer.sliding_window is not None:
            visible &= positions >= layer.first_seen(queries)
        scores = call.scores(call.query[:, :, start:stop], keys)
        return call.values_under(call.weights(scores, visible), values)

    def _stage(self, stage: int) -> tuple[Tensor, Tensor]:
        """All keys and values [B, Hkv, S, d] as they are read back at a stage, with their errors magnified."""
        if stage not in self.stored:
            layer, (key_bits, value_bits) = self.layer, self.layer.stages[stage]
            key = Format(key_bits, layer.key_axis, "none", layer.window)
            value = Format(value_bits, "token", "none", layer.window)
            keys = stored(self.call.key, key, layer.sink, layer.block, self.key_matrices)
            values = stored(self.call.value, value, layer.sink, layer.block, self.value_matrices)
            self.stored[stage] = (
                torch.lerp(self.call.key, keys, self.magnified),
                torch.lerp(self.call.value, values, self.magnified),
            )
        return self.stored[stage]
