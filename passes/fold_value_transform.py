"""Fold a linear map of V into v_proj and its inverse into the output projection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Pass
from .program import AttentionSite, HeadTransform, Program
from .verify import Stage


class FoldValueTransform(Pass):
    """Record the weight edits that multiply each head of V by a matrix, and its outputs by the inverse.

    `matrices[layer]` is float64 [num_key_value_heads, value_head_dim, value_head_dim]. Layers without an entry are left
    alone.

    1. v_proj's rows of each head, and its bias, are multiplied by the head's transposed matrix M: V becomes V M.
    2. Attention is linear in V, so its output is multiplied by M as well.
    3. The output projection's columns of each query head are multiplied by the transposed inverse of M, that of its
       key-value head (GQA): what the layer puts out stays what it was.
    4. A layer whose v_proj or output projection LocateAttention did not find is refused, as is a matrix without a
       finite inverse.
    """

    takes = Stage.CAPTURED
    leaves = Stage.CAPTURED

    def __init__(self, matrices: Mapping[int, Tensor]) -> None:
        self.matrices = matrices

    def requires(self, program: Program) -> None:
        sites = {site.layer: site for site in program.sites}
        for layer, matrices in self.matrices.items():
            if layer not in sites:
                raise ValueError(f"V of layer {layer} is to be transformed, and LocateAttention found nothing of it")
            _check(sites[layer], matrices)

    def run(self, program: Program) -> bool:
        for site in program.sites:
            if site.layer in self.matrices:
                program.edits += _edits(site, self.matrices[site.layer])
        return bool(self.matrices)


def can_transform(site: AttentionSite) -> bool:
    """Whether V of the site comes from one projection and its outputs go to one."""
    return site.value is not None and site.output is not None


def _check(site: AttentionSite, matrices: Tensor) -> None:
    """Raises `ValueError` where `matrices` cannot be folded at `site`."""
    expected = (site.num_key_value_heads, site.value_head_dim, site.value_head_dim)
    if not can_transform(site):
        raise ValueError(f"V of layer {site.layer} cannot be transformed: v_proj or the output projection is not found")
    if tuple(matrices.shape) != expected:
        raise ValueError(
            f"the matrices of layer {site.layer} have shape {list(matrices.shape)} instead of {list(expected)}"
        )
    inverse, singular = torch.linalg.inv_ex(matrices)
    if bool(singular.any()) or not bool(torch.isfinite(inverse).all()):
        raise ValueError(f"the matrices of layer {site.layer} do not all have a finite inverse")


def _edits(site: AttentionSite, matrices: Tensor) -> list[HeadTransform]:
    assert site.value is not None
    assert site.output is not None
    value = site.value
    group = site.num_attention_heads // site.num_key_value_heads
    tensors = [value.weight] if value.bias is None else [value.weight, value.bias]
    inverses = torch.linalg.inv(matrices).transpose(1, 2).repeat_interleave(group, dim=0)
    return [
        *(HeadTransform(tensor, value.start, matrices, "rows") for tensor in tensors),
        HeadTransform(site.output, 0, inverses, "columns"),
    ]
