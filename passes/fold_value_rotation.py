"""Fold a rotation of V into v_proj and back out of the output projection."""

from __future__ import annotations

from collections.abc import Collection

from pmkvq_compiler.runtime.rotation import hadamard

from .base import Pass
from .program import AttentionSite, HeadRotation, Program
from .verify import Stage


class FoldValueRotation(Pass):
    """Record the weight edits that turn the channels of each head of V in the layers `rotated`, and turn them back.

    1. v_proj's rows of each head, and its bias, are multiplied by the transposed Hadamard rotation R: V becomes V R.
    2. Attention is linear in V, so its output is turned by R as well.
    3. The output projection's columns of each query head are multiplied by R, which turns that back.
    4. A layer whose v_proj or output projection LocateAttention did not find is refused.
    """

    takes = Stage.CAPTURED
    leaves = Stage.CAPTURED

    def __init__(self, rotated: Collection[int]) -> None:
        self.rotated = rotated

    def requires(self, program: Program) -> None:
        sites = {site.layer: site for site in program.sites}
        for layer in self.rotated:
            if layer not in sites:
                raise ValueError(f"layer {layer} is to be rotated, and LocateAttention found nothing of it")
            if not can_rotate(sites[layer]):
                raise ValueError(f"layer {layer} cannot be rotated: v_proj or the output projection was not found")

    def run(self, program: Program) -> bool:
        for site in program.sites:
            if site.layer in self.rotated:
                program.edits += _edits(site)
        return bool(self.rotated)


def can_rotate(site: AttentionSite) -> bool:
    """Whether V of the site comes from one projection and its outputs go to one."""
    return site.value is not None and site.output is not None


def _edits(site: AttentionSite) -> list[HeadRotation]:
    assert site.value is not None
    assert site.output is not None
    value, rotation = site.value, hadamard(site.value_head_dim)
    tensors = [value.weight] if value.bias is None else [value.weight, value.bias]
    return [
        *(HeadRotation(tensor, value.start, site.num_key_value_heads, rotation, "rows") for tensor in tensors),
        HeadRotation(site.output, 0, site.num_attention_heads, rotation, "columns"),
    ]
