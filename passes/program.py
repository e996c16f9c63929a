"""The program that the passes work on: a graph without weights, and the edits that its weights will get."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from pmkvq_compiler.runtime.plan import CachePlan, StatePlan

WRAPPER = "model."
"""The capture keeps the model in an attribute of this name, so module paths in a graph begin with it. Tensor names do
not."""


@dataclass(frozen=True)
class Projection:
    """The rows `start : start + rows` of a linear layer's weight (and bias) that compute q, k or v.

    Where a norm lies between that layer and RoPE, they are the norm's weights, one for each channel: of all heads, or
    of one head if the heads share them. Some norms store their weights minus an `offset`.
    """

    weight: str
    bias: str | None
    start: int
    rows: int
    offset: float = 0.0


@dataclass(frozen=True)
class Latent:
    """Latent attention, whose cache holds latents of `rank` numbers.

    `weight` is [num_heads * (key_dim + value_dim), rank]. It expands a latent to every head's key, without the channels
    that RoPE turns, and value.
    """

    weight: str
    num_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the graph: layer index, name of its marker, shapes, and the projections of q, k and v.

    `output` names the weight that takes the concatenated outputs of all heads; it is None if there is no such weight.
    `module` is the path of the layer's module in the model, or None if the model's layers are not a list.
    `reason` is None if the key scales can be folded. Otherwise it says why not, and projections may be None.
    If `chunked`, a query sees the tokens before it in its own chunk of `sliding_window` tokens.
    `latent` is given where keys and values are a latent vector and what RoPE turns, shared by all heads.
    `reads` is the layer whose keys and values it attends to, or None if it computes its own and has a cache.
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
    reads: int | None = None
    chunked: bool = False
    latent: Latent | None = None

    @property
    def heads_share_scales(self) -> bool:
        """Whether all heads must be scaled alike, because they share the weights of a norm."""
        heads = {self.query: self.num_attention_heads, self.key: self.num_key_value_heads}
        return any(one is not None and one.rows < count * self.key_head_dim for one, count in heads.items())


def attention_layers(sites: Sequence[AttentionSite]) -> tuple[int, ...]:
    """The layers of `sites` as a `CachePlan` names them: none if they are the first ones."""
    layers = tuple(site.layer for site in sites)
    return () if layers == tuple(range(len(layers))) else layers


@dataclass(frozen=True)
class RowScale:
    """An edit: multiply rows `start : start + len(scale)` of `tensor` (a weight or bias) by `scale`, in float64.

    The tensor stores the numbers to be multiplied minus `offset`.
    """

    tensor: str
    start: int
    scale: Tensor
    offset: float = 0.0

    def apply(self, value: Tensor) -> Tensor:
        """The edited tensor, in the dtype of `value`."""
        edited = value.to(torch.float64)
        rows = slice(self.start, self.start + self.scale.shape[0])
        scale = self.scale.to(edited.device).reshape(-1, *[1] * (edited.dim() - 1))
        edited[rows] = (edited[rows] + self.offset) * scale - self.offset
        return edited.to(value.dtype)


@dataclass(frozen=True)
class HeadTransform:
    """An edit: multiply each head of a projection by a matrix, in float64.

    `matrices` are [heads, d, d]. With `side` "rows", each group of d rows of a weight or bias, from `start` on, becomes
    `matrix.T @ rows`: the output of the layer is multiplied by the matrix. With "columns", each group of d columns
    becomes `columns @ matrix`, for an input that has been multiplied by the matrix's transposed inverse.
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
    """A tensor that is computed from the configuration, such as RoPE frequencies, and the name of its buffer."""

    name: str
    value: Tensor


@dataclass
class Program:
    """The data structure that passes read and rewrite.

    `graph_module` returns the logits. It has one placeholder for each input (`input_ids`, `position_ids`, and after
    RewriteAttention also `cache`), for each weight and for each constant. `weights` maps the name of a placeholder to
    the tensor's name in the checkpoint, and `constants` maps it to the constant. `states` are those of the ops, besides
    attention, that carry something from token to token. `plan` is set by BakePlan, which also
    puts each layer's part on the node of its attention. `history` names the passes that have run, in order.
    """

    graph_module: GraphModule
    weights: dict[str, str]
    constants: dict[str, Constant]
    states: tuple[StatePlan, ...] = ()
    sites: list[AttentionSite] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    plan: CachePlan | None = None
    history: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    def copy(self) -> Program:
        """A program that passes may rewrite while this one stays as it is."""
        return replace(
            self,
            graph_module=copy.deepcopy(self.graph_module),
            weights=dict(self.weights),
            constants=dict(self.constants),
            sites=[*self.sites],
            edits=[*self.edits],
            history=[*self.history],
        )

    @property
    def cached_sites(self) -> list[AttentionSite]:
        """The sites that have a cache. The others read one of theirs."""
        return [site for site in self.sites if site.reads is None]
