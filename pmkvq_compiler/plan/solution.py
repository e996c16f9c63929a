"""A plan, and the matrices that its formats ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pmkvq_compiler.calibrate.calibration import Calibration, Matrices
from pmkvq_compiler.formats import Format, Transform
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.runtime.plan import CachePlan, KeyAxis, LayerPlan, blocks_needed


@dataclass(frozen=True)
class Solution:
    """A plan and, for each layer, the formats of K and V that it was chosen with. They say which transforms to fold."""

    plan: CachePlan
    formats: tuple[tuple[Format | None, Format | None], ...]

    @property
    def key_transforms(self) -> dict[int, Transform]:
        """The transforms of K, in the layers that have one."""
        formats = zip(self.plan.places, self.formats, strict=True)
        return {layer: key.transform for layer, (key, _) in formats if key and key.transform != "none"}

    @property
    def value_transforms(self) -> dict[int, Transform]:
        """The transforms of V, in the layers that have one."""
        formats = zip(self.plan.places, self.formats, strict=True)
        return {layer: value.transform for layer, (_, value) in formats if value and value.transform != "none"}


@dataclass(frozen=True)
class Folds:
    """The matrices [Hkv, d, d], by layer, that K and V are multiplied by before they are stored."""

    keys: Mapping[int, Tensor]
    values: Mapping[int, Tensor]

    @classmethod
    def of(cls, solution: Solution, calibration: Calibration) -> Folds:
        """The matrices that a plan's formats ask for."""
        formats = dict(zip(solution.plan.places, solution.formats, strict=True))
        keys = {layer: key.transform for layer, (key, _) in formats.items() if key}
        values = {layer: value.transform for layer, (_, value) in formats.items() if value}
        return cls(_chosen(calibration.key_matrices, keys), _chosen(calibration.value_matrices, values))


def _chosen(matrices: Matrices, transforms: Mapping[int, Transform]) -> dict[int, Tensor]:
    """The matrices of each layer's transform; "none" has one only in layers that need a power of two."""
    return {
        layer: matrices[layer][transform]
        for layer, transform in transforms.items()
        if transform in matrices.get(layer, {}) or transform != "none"
    }


@dataclass(frozen=True)
class PlanRow:
    """A layer of the plan as the table and the report show it. `sensitivity` is the loss in nats a token that is
    predicted if only this layer is quantized."""

    layer: int
    key_bits: int
    value_bits: int
    key_axis: KeyAxis
    key_transform: Transform
    value_transform: Transform
    window: int
    arena_bytes: int
    sensitivity: float


def plan_table(solution: Solution, sites: Sequence[AttentionSite], calibration: Calibration) -> list[PlanRow]:
    """The rows of the plan's table, one for each layer."""
    return [
        PlanRow(
            layer=site.layer,
            key_bits=layer.key_bits,
            value_bits=layer.value_bits,
            key_axis=layer.key_axis,
            key_transform="none" if key is None else key.transform,
            value_transform="none" if value is None else value.transform,
            window=layer.window,
            arena_bytes=layer.arena_bytes,
            sensitivity=_loss(site.layer, layer, key, value, calibration, solution.plan.max_len),
        )
        for site, layer, (key, value) in zip(sites, solution.plan.layers, solution.formats, strict=True)
    ]


def _loss(
    layer: int, plan: LayerPlan, key: Format | None, value: Format | None, calibration: Calibration, max_len: int
) -> float:
    if key is None or value is None or not blocks_needed(plan, max_len):
        return 0.0
    return calibration.key_loss[layer][key] + calibration.value_loss[layer][value]
