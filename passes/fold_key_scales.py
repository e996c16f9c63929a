"""Fold the reparameterization scales of K into the projections of q and k."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import Pass
from .program import AttentionSite, Program, Projection, RowScale
from .verify import Stage


class FoldKeyScales(Pass):
    """Record the weight edits that divide K by `scales` and multiply Q by them, so that q . k does not change.

    `scales[layer]` is float64 [num_key_value_heads, key_head_dim]. Layers without an entry do not change.

    1. The rows of k_proj and its bias are multiplied by 1 / s.
    2. The rows of q_proj and its bias are multiplied by s. Query head h uses the scales of key head h // group (GQA).
    3. Where a norm lies between these layers and RoPE, its weights are multiplied instead. If the heads share them, the
       scales must be the same for all heads.
    4. RoPE mixes channels i and i + key_head_dim / 2. Scaling commutes with RoPE only if the two share a scale, so
       other scales are refused.
    5. A layer is refused if its site gives a reason not to fold, or if its scales are not finite and positive.
    """

    takes = Stage.CAPTURED
    leaves = Stage.CAPTURED

    def __init__(self, scales: Mapping[int, Tensor]) -> None:
        self.scales = scales

    def requires(self, program: Program) -> None:
        sites = {site.layer: site for site in program.sites}
        for layer, scale in self.scales.items():
            if layer not in sites:
                raise ValueError(f"scales are given for layer {layer}, where LocateAttention found no attention")
            _check(sites[layer], scale)

    def run(self, program: Program) -> bool:
        for site in program.sites:
            if site.layer in self.scales:
                program.edits += _edits(site, self.scales[site.layer].to(torch.float64))
        return bool(self.scales)


def _check(site: AttentionSite, scale: Tensor) -> None:
    """Raises `ValueError` if `scale` cannot be folded at `site`."""
    expected = (site.num_key_value_heads, site.key_head_dim)
    if site.reason is not None:
        raise ValueError(f"layer {site.layer} cannot be folded: {site.reason}")
    if tuple(scale.shape) != expected:
        raise ValueError(f"the scales of layer {site.layer} have shape {list(scale.shape)} instead of {list(expected)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"the scales of layer {site.layer} are not all finite and positive")
    if site.heads_share_scales and not torch.equal(scale, scale[:1].expand_as(scale)):
        raise ValueError(f"the scales of layer {site.layer} differ between heads, which share the weights of a norm")
    first, second = scale.chunk(2, dim=-1)
    if not torch.equal(first, second):
        raise ValueError(
            f"the scales of layer {site.layer} differ within a RoPE pair (channels i and i + head_dim / 2)"
        )


def _edits(site: AttentionSite, scale: Tensor) -> list[RowScale]:
    assert site.key is not None
    assert site.query is not None
    group = site.num_attention_heads // site.num_key_value_heads
    return [
        *_scale_rows(site.key, (1 / scale).flatten()),
        *_scale_rows(site.query, scale.repeat_interleave(group, dim=0).flatten()),
    ]


def _scale_rows(projection: Projection, scale: Tensor) -> list[RowScale]:
    tensors = [projection.weight] if projection.bias is None else [projection.weight, projection.bias]
    return [RowScale(tensor, projection.start, scale[: projection.rows], projection.offset) for tensor in tensors]
