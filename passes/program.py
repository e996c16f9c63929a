"""The program that the passes work on: a graph without weights, and the edits its weights must get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from pmkvq_compiler.runtime.plan import CachePlan

WRAPPER = "model."
"""Capture holds the model in an attribute of this name: module paths in a graph begin with it, tensor names do not."""


@dataclass(frozen=True)
class Projection:
    """The rows `start : start + rows` of a linear layer's weight (and bias): where q, k or v come from."""

    weight: str
    bias: str | None
    start: int
    rows: int


@dataclass(frozen=True)
class AttentionSite:
    """One attention, read off the graph: layer index, marker node, shapes, and where q, k and v come from.

    `output` is the weight that takes the heads' outputs side by side, where it alone takes them. `module` is the path
    of the layer's module in the model, where the layers are a list.
    `reason` is None where the key scales can be folded, else a sentence why not; then the projections may be None.
    RoPE pairs channel i with `i + head_dim / 2`: the two must share a scale.
    """

    layer: int
    node: str
    num_attention_heads: int
    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int
    scale: float
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool
    query: Projection | None
    key: Projection | None
    value: Projection | None
    reason: str | None
    output: str | None = None
    module: str | None = None


@dataclass(frozen=True)
class RowScale:
    """Weight edit: multiply rows `start : start + len(scale)` of `tensor` (a weight or bias) by `scale`, in float64."""

    tensor: str
    start: int
    scale: Tensor

    def apply(self, value: Tensor) -> Tensor:
        """The edited tensor, in the dtype of `value`."""
        edited = value.to(torch.float64)
        rows = slice(self.start, self.start + self.scale.shape[0])
        edited[rows] *= self.scale.to(edited.device).reshape(-1, *[1] * (edited.dim() - 1))
        return edited.to(value.dtype)


@dataclass(frozen=True)
class HeadTransform:
    """Weight edit: multiply each head of a projection by a matrix of its own, in float64.

    `matrices` are [heads, d, d]. With `side` "rows", the groups of d rows from `start` on (and so of a bias) become
    `matrix.T @ rows`: what the layer puts out is multiplied by the matrix. With "columns" the groups of d columns
    become `columns @ matrix`: the layer takes what the transposed inverse of the matrix was applied to.
    """

    tensor: str
    start: int
    matrices: Tensor
    side: Literal["rows", "columns"]

    def apply(self, value: Tensor) -> Tensor:
        """The edited tensor, in the dtype of `value`."""
        edited, matrices = value.to(torch.float64), self.matrices.to(value.device)
        heads, dim, _ = matrices.shape
        part = slice(self.start, self.start + heads * dim)
        if self.side == "rows":
            groups = edited[part].reshape(heads, dim, -1)
            edited[part] = (matrices.transpose(1, 2) @ groups).reshape(edited[part].shape)
        else:
            groups = edited[:, part].unflatten(1, (heads, dim)).transpose(0, 1)
            edited[:, part] = (groups @ matrices).transpose(0, 1).flatten(1)
        return edited.to(value.dtype)


Edit = RowScale | HeadTransform


@dataclass(frozen=True)
class Constant:
    """A tensor that is computed from the configuration (RoPE frequencies and the like), and its buffer's name."""

    name: str
    value: Tensor


@dataclass
class Program:
    """What passes read and rewrite.

    `graph_module` has one placeholder for each input (`input_ids`, `position_ids`, from RewriteAttention on also
    `cache`), for each weight and for each constant, and returns the logits. `weights` maps a placeholder's name to the
    tensor's name in the checkpoint, `constants` a placeholder's name to the constant. `plan` is what BakePlan was
    given; each layer's part is also on the node of its attention. `history` names the passes that have run, in order.
    """

    graph_module: GraphModule
    weights: dict[str, str]
    constants: dict[str, Constant]
    sites: list[AttentionSite] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    plan: CachePlan | None = None
    history: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph
