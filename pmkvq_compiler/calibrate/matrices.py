"""The matrices that each head of K or V may be multiplied by: the recipe's transforms, and powers of two."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.calibration import Matrices
from pmkvq_compiler.calibrate.ranges import USUAL, Ranges, exponents, unusual
from pmkvq_compiler.calibrate.transforms import Moments
from pmkvq_compiler.formats import Transform
from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.passes.program import AttentionSite, Projection
from pmkvq_compiler.recipes import Recipe
from pmkvq_compiler.runtime.rotation import hadamard
from pmkvq_compiler.source.source import Source

logger = logging.getLogger(__name__)

NO_VALUE_PROJECTION = "v_proj or the output projection was not found in the graph"
"""The reason why V of a layer cannot be multiplied by a matrix."""


def key_matrices_of(
    sites: Sequence[AttentionSite], recipe: Recipe, scales: dict[int, Tensor], moments: Moments
) -> Matrices:
    matched = moments.key_rotations()
    matrices: Matrices = {layer: {"scale": torch.diag_embed(1 / scale)} for layer, scale in scales.items()}
    for site in sites:
        if "rotate" in recipe.key_transforms:
            rotation = hadamard(site.key_head_dim).repeat(site.num_key_value_heads, 1, 1)
            matrices.setdefault(site.layer, {})["rotate"] = rotation
        if "match" in recipe.key_transforms:
            matrices.setdefault(site.layer, {})["match"] = matched[site.layer]
    return matrices


def value_matrices_of(sites: Sequence[AttentionSite], recipe: Recipe, moments: Moments) -> Matrices:
    matched = moments.value_matrices()
    matrices: Matrices = {}
    for site in filter(can_transform, sites):
        if "rotate" in recipe.value_transforms:
            rotation = hadamard(site.value_head_dim).repeat(site.num_key_value_heads, 1, 1)
            matrices.setdefault(site.layer, {})["rotate"] = rotation
        if "match" in recipe.value_transforms:
            matrices.setdefault(site.layer, {})["match"] = matched[site.layer]
    return matrices


def key_powers(source: Source, sites: Sequence[AttentionSite], ranges: Ranges) -> dict[int, Tensor]:
    """Powers of two [Hkv, dk] of the layers that need them: K is multiplied and its queries are divided by them."""
    powers: dict[int, Tensor] = {}
    for site in sites:
        if site.reason is not None or site.key is None or site.query is None:
            _tell_unusual("K", site.layer, ranges.key[site.layer], site.reason)
            continue
        weights = partial(_rows, source, site.key), partial(_rows, source, site.query)
        found = ranges.key[site.layer]
        if site.heads_share_scales:
            found = found.amax().expand_as(found)
        powers |= _powers(site.layer, site.key_head_dim, found, *weights, source.dtype)
    return powers


def value_powers(source: Source, sites: Sequence[AttentionSite], ranges: Ranges) -> dict[int, Tensor]:
    """Powers of two [Hkv, dv] of the layers that need them: V is multiplied and its outputs are divided by them."""
    powers: dict[int, Tensor] = {}
    for site in sites:
        if site.value is None or site.output is None:
            _tell_unusual("V", site.layer, ranges.value[site.layer], NO_VALUE_PROJECTION)
            continue
        weights = partial(_rows, source, site.value), partial(source.read, site.output)
        powers |= _powers(site.layer, site.value_head_dim, ranges.value[site.layer], *weights, source.dtype)
    return powers


def _powers(
    layer: int,
    head_dim: int,
    ranges: Tensor,
    multiplied: Callable[[], Tensor],
    divided: Callable[[], Tensor],
    dtype: torch.dtype,
) -> dict[int, Tensor]:
    """The layer's powers of two [H, head_dim], or nothing if its ranges are usual. Only the former reads weights."""
    if not bool(unusual(ranges).any()):
        return {}
    return {layer: (2 ** exponents(ranges, multiplied(), divided(), dtype)).unsqueeze(1).expand(-1, head_dim)}


def _rows(source: Source, projection: Projection) -> Tensor:
    return source.read(projection.weight)[projection.start : projection.start + projection.rows] + projection.offset


def _tell_unusual(tensor: str, layer: int, ranges: Tensor, reason: str | None) -> None:
    """Warn about a layer whose ranges are unusual and whose weights cannot be scaled."""
    if not bool(unusual(ranges).any()):
        return
    logger.warning(
        "%s of layer %d spans %.0e in a typical token, which codes express coarsely below %.0e and above %.0e, and it "
        "cannot be scaled in the weights (%s): expect a loss there, or scale the model's weights",
        tensor, layer, float(ranges[unusual(ranges)][0]), *USUAL, reason,
    )  # fmt: skip


def normalized(matrices: Matrices, powers: dict[int, Tensor]) -> Matrices:
    """Matrices with their rows multiplied by the layer's powers of two. A layer that has powers also gets a matrix for
    "none"."""
    normalized = dict(matrices)
    for layer, power in powers.items():
        plain: dict[Transform, Tensor] = {
            "none": torch.eye(power.shape[1], dtype=torch.float64).repeat(len(power), 1, 1)
        }
        normalized[layer] = {
            transform: power.unsqueeze(2) * matrix for transform, matrix in {**matrices.get(layer, {}), **plain}.items()
        }
    return normalized
