"""The passes in their order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pmkvq_compiler.runtime.plan import CachePlan

from .bake_plan import BakePlan
from .base import Pass
from .canonicalize import Canonicalize
from .fold_key_scales import FoldKeyScales
from .fold_value_transform import FoldValueTransform
from .fuse_norms import FuseNorms
from .outline_layers import OutlineLayers
from .rewrite_attention import RewriteAttention
from .rotate_keys import RotateKeys


def pipeline(
    key_scales: Mapping[int, Tensor],
    key_rotations: Mapping[int, Tensor],
    value_transforms: Mapping[int, Tensor],
    plan: CachePlan,
) -> list[Pass]:
    """From a located program to one that can be emitted. The tensors, by layer, are those of FoldKeyScales, RotateKeys
    and FoldValueTransform.

    LocateAttention is not among them: tensors and plan are made from the sites that it finds.
    """
    return [
        # While the sites still describe the graph as captured; they record edits and touch no node.
        FoldKeyScales(key_scales),
        FoldValueTransform(value_transforms),
        # After all that reads markers.
        RewriteAttention(),
        # On the nodes that RewriteAttention makes.
        RotateKeys(key_rotations),
        BakePlan(plan),
        # After the rewrite, so that what only the markers needed is dead by now.
        Canonicalize(),
        # On casts that are all of one kind, among readers that all have an effect; before layers become submodules.
        FuseNorms(),
        # Last, for layers are compared op by op: what tells equal ones apart without effect must be gone.
        OutlineLayers(),
    ]
