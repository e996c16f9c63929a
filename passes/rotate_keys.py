"""Rotate Q and K after RoPE, at run time, because no matrix can be folded through RoPE."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from .bake_plan import cached_attentions, has_cache
from .base import Pass
from .outline_layers import layer_module
from .program import WRAPPER, Constant, Program
from .verify import Stage


class RotateKeys(Pass):
    """Give cached attentions the operand `key_rotation`: they rotate Q and K by it and store the rotated K.

    `rotations[layer]` is orthogonal, [num_key_value_heads, key_head_dim, key_head_dim], so q . k does not change.
    Layers without an entry do not change.

    1. Each rotation becomes a float32 constant, named as if it belonged to the layer's module. All layers that read a
       layer's cache take the same constant.
    2. Its placeholder comes after the other placeholders, and becomes an operand of the attention's node.
    3. A matrix that is not orthogonal or has another shape is refused.
    """

    takes = Stage.REWRITTEN
    leaves = Stage.REWRITTEN

    def __init__(self, rotations: Mapping[int, Tensor]) -> None:
        self.rotations = rotations

    def requires(self, program: Program) -> None:
        for site in program.cached_sites:
            if site.layer in self.rotations:
                expected = (site.num_key_value_heads, site.key_head_dim, site.key_head_dim)
                _check(site.layer, self.rotations[site.layer].to(torch.float64), expected)

    def run(self, program: Program) -> bool:
        constants: dict[int, Node] = {}
        for node in cached_attentions(program):
            layer = node.args[4]
            if layer in self.rotations:
                if layer not in constants:
                    constants[layer] = _constant(program, node, self.rotations[layer].to(torch.float32))
                node.update_kwarg("key_rotation", constants[layer])
        return bool(self.rotations)


def rotated_layers(program: Program) -> list[int]:
    """The layers whose keys are rotated, whether they are outlined or not."""
    found = {node.args[4] for node in cached_attentions(program) if _rotates_keys(node)}
    for call in program.graph.find_nodes(op="call_module"):
        if any(map(_rotates_keys, program.graph_module.get_submodule(call.target).graph.nodes)):
            found.add(call.args[0])
    return sorted(found)


def _rotates_keys(node: Node) -> bool:
    return node.kwargs.get("key_rotation") is not None and has_cache(node)


def _check(layer: int, rotation: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(rotation.shape) != expected:
        raise ValueError(
            f"the key rotation of layer {layer} has shape {list(rotation.shape)} instead of {list(expected)}"
        )
    deviation = rotation @ rotation.transpose(1, 2) - torch.eye(expected[-1], dtype=torch.float64)
    if not float(deviation.abs().max()) < 1e-6:
        raise ValueError(f"the key rotation of layer {layer} is not orthogonal")


def _constant(program: Program, attention: Node, rotation: Tensor) -> Node:
    """Add a constant to the program, named as a buffer of the attention's layer; returns its placeholder."""
    owner = layer_module(attention)
    name = f"{owner.removeprefix(WRAPPER)}.key_rotation" if owner else f"key_rotation.{attention.args[4]}"
    last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
    with program.graph.inserting_after(last):
        placeholder = program.graph.placeholder(name.replace(".", "_"))
    placeholder.meta["val"] = attention.meta["val"].new_empty(rotation.shape, dtype=rotation.dtype)
    program.constants[placeholder.name] = Constant(name, rotation)
    return placeholder
