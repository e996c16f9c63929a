"""The passes, in the order in which they run."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pmkvq_compiler.runtime.plan import CachePlan

from .bake_plan import BakePlan
from .base import Pass
from .canonicalize import Canonicalize
from .fold_key_scales import FoldKeyScales
from .fold_value_transform import FoldValueTransform
from .fuse_linears import FuseLinears
from .fuse_norms import FuseNorms
from .fuse_rope import FuseRope
from .outline_layers import OutlineLayers
from .rewrite_attention import RewriteAttention
from .rotate_keys import RotateKeys


def pipeline(
    key_scales: Mapping[int, Tensor],
    key_rotations: Mapping[int, Tensor],
    value_transforms: Mapping[int, Tensor],
    plan: CachePlan,
) -> list[Pass]:
    """The passes that turn a program whose attention was located into one that can be written as an artifact.

    `key_scales`, `key_rotations` and `value_transforms` are by layer; FoldKeyScales, RotateKeys and FoldValueTransform
    say what they are. LocateAttention is not in the list, because the tensors and the plan depend on what it finds.
    """
    return [
        # These record weight edits and change no node, so they run while the sites still describe the captured graph.
        FoldKeyScales(key_scales),
        FoldValueTransform(value_transforms),
        # After every pass that reads markers.
        RewriteAttention(),
        # These work on the nodes that RewriteAttention creates.
        RotateKeys(key_rotations),
        BakePlan(plan),
        # After the rewrite, so that nodes that only the markers needed are dead code by now.
        Canonicalize(),
        # After Canonicalize, which leaves one kind of cast and no reader without effect, and before OutlineLayers.
        FuseNorms(),
        FuseRope(),
        # After FuseNorms, whose norms it takes along.
        FuseLinears(),
        # Last, because it compares layers op by op: differences that have no effect must be gone.
        OutlineLayers(),
    ]
