"""The passes in their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from pmkvq_compiler.runtime.plan import CachePlan

from .bake_plan import BakePlan
from .base import Pass
from .canonicalize import Canonicalize
from .fold_key_scales import FoldKeyScales
from .fold_value_rotation import FoldValueRotation
from .outline_layers import OutlineLayers
from .rewrite_attention import RewriteAttention


def pipeline(scales: Mapping[int, Tensor], rotated: Collection[int], plan: CachePlan) -> list[Pass]:
    """From a located program to one that can be emitted: `scales` are those of FoldKeyScales, `rotated` the layers of
    FoldValueRotation.

    LocateAttention is not among them: scales and plan are made from the sites that it finds.
    """
    return [
        # While the sites still describe the graph as captured; they record edits and touch no node.
        FoldKeyScales(scales),
        FoldValueRotation(rotated),
        # After all that reads markers.
        RewriteAttention(),
        # On the nodes that RewriteAttention makes.
        BakePlan(plan),
        # After the rewrite, so that what only the markers needed is dead by now.
        Canonicalize(),
        # Last, for layers are compared op by op: what tells equal ones apart without effect must be gone.
        OutlineLayers(),
    ]
