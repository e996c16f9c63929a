"""Codes of pages that lie in several blocks, in plain PyTorch.

Fields of blocks are `Records` with one more dimension: `key_codes` [H, n, tier, block, bytes] and `value_codes` [H, n,
tier, value_head_dim, bytes], as they lie where codes have their final bits; parameters are in the first block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..layer_cache import Records
from ..quantize import pack, unpack
from ..reference import key_scores, value_sums

Kind = Literal["key", "value"]
KINDS: tuple[Kind, ...] = ("key", "value")


@dataclass(frozen=True)
class Chunk:
    """Some pages, by tier: which of them these are, and their records, in which a page of several blocks has as many
    records of values."""

    pages: int
    tiers: Sequence[tuple[Tensor, Records]]

    def key_scores(self, queries: Tensor) -> Tensor:
        """`key_scores` of all pages, in their order."""
        parts = [(own, key_scores(queries, records)) for own, records in self.tiers]
        if len(parts) == 1:
            return parts[0][1]
        block = self.tiers[0][1].key_codes.shape[2]
        scores = queries.new_empty(*queries.shape[:2], self.pages, block)
        for own, part in parts:
            scores[:, :, own] = part.unflatten(-1, (-1, block))
        return scores.flatten(2)

    def value_sums(self, weights: Tensor) -> Tensor:
        """`value_sums` of all pages."""
        if len(self.tiers) == 1:
            return value_sums(weights, self.tiers[0][1])
        by_page = weights.unflatten(-1, (self.pages, -1))
        return torch.stack([value_sums(by_page[:, :, own].flatten(2), records) for own, records in self.tiers]).sum(0)


def write_codes(records: Records, codes: Tensor, bits: int, kind: Kind) -> None:
    """Pack codes of keys or values [H, n, block, d] into blocks [H, n, tier]: a part of the tokens in each."""
    place = records.key_codes if kind == "key" else records.value_codes
    parts = codes.unflatten(2, (place.shape[2], -1))
    packed = pack(parts if kind == "key" else parts.transpose(-1, -2), bits).view(torch.uint8)
    place.copy_(packed.flatten(3).view_as(place))


def read_codes(records: Records, bits: int, kind: Kind) -> Tensor:
    """The inverse of `write_codes`."""
    place = records.key_codes if kind == "key" else records.value_codes
    tier, block = place.shape[2], records.value_parameters.shape[-1]
    if kind == "value":
        return unpack(place.view(torch.int16), bits).transpose(-1, -2).flatten(2, 3)
    lines = place.flatten(3).unflatten(-1, (block // tier, -1))
    return unpack(lines.view(torch.int16), bits).flatten(2, 3)


def records_of(blocks: Records, key_bits: int, value_bits: int) -> Records:
    """Pages of codes of these widths in blocks [H, n, tier] as n records of keys and n * tier shorter ones of
    values."""
    block, tier = blocks.value_parameters.shape[-1], blocks.value_codes.shape[2]
    return Records(
        key_bits,
        value_bits,
        blocks.key_by_channel,
        blocks.key_parameters[:, :, 0],
        blocks.value_parameters[:, :, 0].unflatten(-1, (tier, -1)).flatten(1, 2),
        blocks.key_codes.flatten(2).unflatten(-1, (block, -1)),
        blocks.value_codes.flatten(1, 2),
    )
