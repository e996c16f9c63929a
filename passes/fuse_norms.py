"""Turn every RMS normalization into one op."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .base import Pass
from .ops import only_reader
from .program import Program
from .verify import Stage

aten = torch.ops.aten

ROOTS = frozenset({aten.rsqrt.default, aten.pow.Tensor_Scalar})
"""The ops that compute 1 / sqrt. Gemma 4 raises to the power -0.5 instead of calling `rsqrt`."""


class FuseNorms(Pass):
    """Replace an RMS normalization that is written out op by op by `rms_norm`, which a CUDA device runs as one kernel.

    Below, x is `h.to(float32)` with h [..., d] in the model's dtype, and n is `x * rsqrt(mean(x ** 2, -1) + eps)`.

    1. `weight * n.to(h.dtype)` (Llama and most others) and `(weight * n).to(h.dtype)` (GptOss, OLMo 2), with a weight
       [d] in the model's dtype, become `rms_norm(h, [d], weight, eps)`. It computes in float32 and rounds once, where
       the first form rounds twice.
    2. `n * factor` with a float32 factor [d] (Gemma's `1 + weight`) becomes `rms_norm(x, [d], factor, eps)`. The casts
       around it stay: the kernel needs both operands in one dtype, and the model's dtype would round the factor.
    3. `n.to(h.dtype)` without a weight (Gemma 4's values) becomes `rms_norm(h, [d], None, eps)`.
    4. Everything else stays as it is: norms over another dimension, norms that subtract the mean, and norms with an
       intermediate value that another op reads.
    """

    takes = Stage.CANONICAL
    leaves = Stage.CANONICAL

    def run(self, program: Program) -> bool:
        found = [_fuse(node) for node in list(program.graph.nodes)]
        program.graph.eliminate_dead_code()
        return any(found)


@dataclass(frozen=True)
class Norm:
    """`result` is `rms_norm(operand, [d], weight, eps)`."""

    result: Node
    operand: Node
    weight: Node | None
    eps: float


def _fuse(node: Node) -> bool:
    norm = _match(node)
    if norm is None:
        return False
    width = norm.operand.meta["val"].shape[-1]
    with node.graph.inserting_before(norm.result):
        fused = node.graph.call_function(aten.rms_norm.default, (norm.operand, [width], norm.weight, norm.eps))
    fused.meta = dict(norm.result.meta)
    norm.result.replace_all_uses_with(fused)
    return True


def _match(node: Node) -> Norm | None:
    """The normalization in which `node` computes n, or None."""
    if node.target is not aten.mul.Tensor:
        return None
    for x, root in itertools.permutations(node.args):
        eps = _match_root(root, x)
        if eps is not None and x.target is aten.to.dtype and _dtype(x) == torch.float32:
            return _match_weight(node, x, eps)
    return None


def _match_root(node: Any, x: Any) -> float | None:
    """eps if `node` is `rsqrt(mean(x ** 2, -1) + eps)` and no other op reads a value in between; else None."""
    chain = []
    for targets in (ROOTS, {aten.add.Tensor}, {aten.mean.dim}, {aten.pow.Tensor_Scalar}):
        if not isinstance(node, Node) or node.target not in targets or node.kwargs or len(node.users) > 1:
            return None
        chain.append(node)
        node = node.args[0]
    root, total, mean, power = chain
    exponents = (*root.args[1:], power.args[1])
    over_last = mean.args[1:] in (([-1], True), ([mean.meta["val"].dim() - 1], True))
    matched = node is x and exponents in ((2,), (-0.5, 2)) and over_last and isinstance(total.args[1], float)
    return total.args[1] if matched else None


def _match_weight(n: Node, x: Node, eps: float) -> Norm | None:
    """The normalization that ends with `n` or with the ops that follow it, by rules 1 to 3."""
    h, reader = x.args[0], only_reader(n)
    if _is_cast(reader, _dtype(h)):
        weighted = only_reader(reader)
        weight = _weight(weighted, reader)
        if weight is not None and _dtype(weight) == _dtype(h):
            return Norm(weighted, h, weight, eps)
        return Norm(reader, h, None, eps)
    weight = _weight(reader, n)
    if weight is None:
        return None
    stored, rounded = weight.args[0] if weight.target is aten.to.dtype else weight, only_reader(reader)
    if _dtype(stored) == _dtype(h) and _is_cast(rounded, _dtype(h)):
        return Norm(rounded, h, stored, eps)
    return Norm(reader, x, weight, eps) if _dtype(weight) == _dtype(x) else None


def _weight(product: Node | None, operand: Node) -> Node | None:
    """The other factor, if `product` multiplies `operand` by one number for each channel; else None."""
    if product is None or product.target is not aten.mul.Tensor:
        return None
    other = product.args[1] if product.args[0] is operand else product.args[0]
    fits = isinstance(other, Node) and other.meta["val"].shape == operand.meta["val"].shape[-1:]
    return other if fits else None


def _is_cast(node: Node | None, dtype: torch.dtype) -> bool:
    return node is not None and node.target is aten.to.dtype and node.args[1] == dtype


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
