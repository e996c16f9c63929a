"""MiKV, simulated: tokens that attention looks at keep wide codes, and all others get narrow ones.

After "No Token Left Behind" (arXiv 2402.18096). Each KV head keeps a share of its tokens at `high` bits: half of them
the most recent, half those that got the most attention so far. A token that loses its place is quantized to `low` bits
and stays so. Codes are those of `papers_format`, with one group for a token and head. The paper's balancer divides the
channels of K by what multiplies those of Q; here it sees the whole text in advance, which can only help.

`rivals.py` scores it. The whole text runs at once: queries come in tiles, and tokens change their place between tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from papers_format import PARAMETER_BITS, fake_quantize
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall

TILE = 32
SCORE_BITS = 16
"""What the sum of a token's attention takes, for each KV head."""


@dataclass
class MiKV:
    """An observer for `attention_hook.observed`, for one text without padding and models whose layers see all of it.

    `share` is the share of tokens that stay at `high` bits. `bits` has the bits of all numbers of each layer at the
    end, and `numbers` how many numbers these are.
    """

    share: float
    high: int = 8
    low: int = 2
    bits: dict[int, float] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)

    @property
    def true_bits(self) -> float:
        return sum(self.bits.values()) / sum(self.numbers.values())

    def __call__(self, call: AttentionCall) -> Tensor:
        balance = balancer(call)
        keys = {bits: fake_quantize(call.key / balance, bits, -1) * balance for bits in (self.high, self.low)}
        values = {bits: fake_quantize(call.value, bits, -1) for bits in (self.high, self.low)}
        heads, length = call.key.shape[1], call.key.shape[2]
        attention = call.key.new_zeros(heads, length)  # that each token got so far
        wide = torch.ones(heads, length, dtype=torch.bool, device=call.key.device)
        out = []
        for start in range(0, length, TILE):
            stop = min(start + TILE, length)
            wide[:, :start] &= kept(attention[:, :start], wide[:, :start], round(self.share * start))
            chosen = wide[None, :, :stop, None]
            key, value = (
                torch.where(chosen, x[self.high][:, :, :stop], x[self.low][:, :, :stop]) for x in (keys, values)
            )
            positions = torch.arange(stop, device=key.device)
            visible = positions <= positions[start:].unsqueeze(-1)
            weights = call.weights(call.scores(call.query[:, :, start:stop], key), visible)
            attention[:, :stop] += weights[0].unflatten(0, (heads, -1)).sum((1, 2))
            out.append(call.values_under(weights, value))
        wide &= kept(attention, wide, round(self.share * length))
        self._count(call, int(wide.sum()))
        return torch.cat(out, dim=2)

    def _count(self, call: AttentionCall, wide: int) -> None:
        (_, heads, length, key_dim), value_dim = call.key.shape, call.value.shape[-1]
        codes = (key_dim + value_dim) * (wide * self.high + (heads * length - wide) * self.low)
        self.bits[call.layer] = codes + heads * length * (2 * PARAMETER_BITS + SCORE_BITS)
        self.numbers[call.layer] = heads * length * (key_dim + value_dim)


def balancer(call: AttentionCall) -> Tensor:
    """What each channel of K is divided by before it is quantized [1, Hkv, 1, dk]: the square root of the ratio of its
    largest number to that of the queries' channel."""
    heads = call.key.shape[1]
    largest_key = call.key.abs().amax(2, keepdim=True).clamp(min=1e-6)
    largest_query = call.query.unflatten(1, (heads, -1)).abs().amax((2, 3)).unsqueeze(2).clamp(min=1e-6)
    return (largest_key / largest_query).sqrt()


def kept(attention: Tensor, wide: Tensor, count: int) -> Tensor:
    """Which tokens (bool [heads, tokens]) keep their place if `count` may: the last `count // 2`, and of the others
    that are still `wide` those with the most `attention`."""
    tokens = wide.shape[1]
    recent = torch.arange(tokens, device=wide.device) >= tokens - count // 2
    rank = attention.masked_fill(~wide, -1.0).masked_fill(recent, torch.inf)
    places = rank.topk(min(count, tokens), dim=-1).indices
    return torch.zeros_like(wide).scatter_(1, places, True)
