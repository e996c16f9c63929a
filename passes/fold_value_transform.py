"""Fold a linear map of V into v_proj and its inverse into the output projection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Pass
from .program import AttentionSite, HeadTransform, Program
from .verify import Stage


class FoldValueTransform(Pass):
    """Record the weight edits that multiply each head of V by a matrix, and the head's outputs by its inverse.

    `matrices[layer]` is float64 [num_key_value_heads, value_head_dim, value_head_dim]. Layers without an entry do not
    change.

    1. In v_proj, the rows (and bias) of each head are multiplied by the transpose of the head's matrix M, so that V
       becomes V M.
    2. Attention is linear in V, so its output is multiplied by M as well.
    3. In the output projection, the columns of each query head are multiplied by the transposed inverse of the matrix
       of its key/value head (GQA), so that the output of the layer does not change.
    4. A layer is refused if LocateAttention did not find its v_proj or output projection, or if one of its matrices
       has no finite inverse.
    """

    takes = Stage.CAPTURED
    leaves = Stage.CAPTURED

    def __init__(self, matrices: Mapping[int, Tensor]) -> None:
        self.matrices = matrices

    def requires(self, program: Program) -> None:
        sites = {site.layer: site for site in program.sites}
        for layer, matrices in self.matrices.items():
            if layer not in sites:
                raise ValueError(f"matrices are given for layer {layer}, where LocateAttention found no attention")
            _check(sites[layer], matrices)

    def run(self, program: Program) -> bool:
        for site in program.sites:
            if site.layer in self.matrices:
                program.edits += _edits(site, self.matrices[site.layer])
        return bool(self.matrices)


def can_transform(site: AttentionSite) -> bool:
    """Whether V of the site comes from one linear layer, and the outputs of all heads go into one linear layer."""
    return site.value is not None and site.output is not None


def _check(site: AttentionSite, matrices: Tensor) -> None:
    """Raises `ValueError` if `matrices` cannot be folded at `site`."""
    expected = (site.num_key_value_heads, site.value_head_dim, site.value_head_dim)
    if not can_transform(site):
        raise ValueError(
            f"V of layer {site.layer} cannot be transformed: its v_proj or its output projection was not found"
        )
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
