"""Turn layers that are equal into calls of one function."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import SymInt, nn
from torch.fx import Graph, GraphModule, Node

from .bake_plan import cached_attentions, has_cache
from .base import Pass
from .ops import cached_attention, layer_place, uses_cache
from .program import WRAPPER, Program
from .verify import Stage

LAYER = "{layer}"


class OutlineLayers(Pass):
    """Move each layer's nodes into a submodule, which equal layers share.

    1. A layer consists of the nodes that its module computes. torch.export leaves the module's path on each node, such
       as `model.layers.3` around the attention of layer 3. The layers are the elements of the lists that contain
       attention; some have another op with a state instead, or none. Only the last node of a layer may be read from
       outside. Nodes that compute sizes stay outside.
    2. Two layers are equal if their ops, constants and connections are, and if the names of their tensors differ only
       in the layer's index. The index and the plan may differ: they become arguments. Layers that read a cache are
       equal only if they read the same one.
    3. The submodule takes `layer`, `plan` (None in a layer without a cache), and then the values and tensors that the
       layer reads, each once, in the order of their first use. The placeholder of a tensor keeps the tensor's name,
       with `{layer}` in place of the index, in `meta["tensor"]`.
    4. If one layer cannot be moved like this, the whole graph stays as it is.
    """

    takes = Stage.CANONICAL
    leaves = Stage.OUTLINED

    def run(self, program: Program) -> bool:
        regions = _find_regions(program)
        names: dict[Hashable, str] = {}
        submodules = []
        for region in regions:
            structure = _structure(region)
            if structure not in names:
                name = f"decoder_layer_{len(names) + 1}" if names else "decoder_layer"
                names[structure] = _add_submodule(program, region, name)
            submodules.append(names[structure])
        # Backwards, because each region refers to the result of the layer before it.
        for region, submodule in zip(reversed(regions), reversed(submodules), strict=True):
            _replace(program, region, submodule)
        return bool(regions)


@dataclass(frozen=True)
class Region:
    """The nodes of one layer in order, the last of which is its result, and the values that they read from outside, in
    the order of their first use."""

    layer: int
    nodes: list[Node]
    values: list[Node]
    tensors: dict[Node, str]
    """Placeholders of weights and constants, with their names, in which `{layer}` stands for the layer's index."""


def _find_regions(program: Program) -> list[Region]:
    """All layers in order, or none if one of them cannot be moved."""
    owners = [layer_module(attention) for attention in cached_attentions(program)]
    if len({*owners}) < len(owners):
        return []
    lists = {owner.rpartition(".")[0] for owner in owners if owner is not None}
    members: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        owner = layer_module(node) or ""
        listed = owner.rpartition(".")[0] in lists
        if uses_cache(node) and not listed:
            return []
        if _has_own_index(node) and not owner.endswith(f".{node.args[layer_place(node)]}"):
            return []
        if listed and not isinstance(node.meta["val"], SymInt):
            members.setdefault(owner, []).append(node)
    for nodes in members.values():
        inside = set(nodes)
        if any(user not in inside for node in nodes[:-1] for user in node.users):
            return []
    return [_region(owner, nodes, program) for owner, nodes in members.items()]


def _has_own_index(node: Node) -> bool:
    """Whether the node takes its layer's index. An attention that reads another layer's cache takes that layer's."""
    return uses_cache(node) and (node.target is not cached_attention or has_cache(node))


def layer_module(node: Node) -> str | None:
    """The path of the outermost module around `node` that is an element of a list; None if there is none."""
    paths = (path for path, _ in node.meta.get("nn_module_stack", {}).values())
    return next((path for path in paths if path.rpartition(".")[2].isdecimal()), None)


def _region(owner: str, nodes: list[Node], program: Program) -> Region:
    path = owner.removeprefix(WRAPPER)
    parent, _, index = path.rpartition(".")
    inside = set(nodes)
    values: dict[Node, None] = {}
    tensors: dict[Node, str] = {}
    for node in nodes:
        for operand in node.all_input_nodes:
            name = _tensor_name(operand, program)
            if name is not None:
                tensors[operand] = re.sub(rf"^{re.escape(path)}\.", f"{parent}.{LAYER}.", name)
            elif operand not in inside:
                values[operand] = None
    return Region(int(index), nodes, list(values), tensors)


def _tensor_name(node: Node, program: Program) -> str | None:
    if node.name in program.weights:
        return program.weights[node.name]
    return program.constants[node.name].name if node.name in program.constants else None


def _structure(region: Region) -> Hashable:
    """A description of a layer without its index and its plan. Two layers are equal if their descriptions are."""
    numbers: dict[Node, Hashable] = {node: number for number, node in enumerate([*region.values, *region.nodes])}
    numbers |= {node: (name, _shape_and_dtype(node)) for node, name in region.tensors.items()}

    def encode(argument: Any) -> Hashable:
        if isinstance(argument, Node):
            return "node", numbers[argument]
        if isinstance(argument, (list, tuple)):
            return tuple(encode(element) for element in argument)
        return type(argument), repr(argument)

    def encode_node(node: Node) -> Hashable:
        args, kwargs = list(node.args), dict(node.kwargs)
        if _has_own_index(node):
            del args[layer_place(node)]
            kwargs.pop("plan", None)
        return node.target, encode(args), tuple((name, encode(value)) for name, value in sorted(kwargs.items()))

    return tuple(encode_node(node) for node in region.nodes)


def _shape_and_dtype(node: Node) -> Hashable:
    return tuple(node.meta["val"].shape), node.meta["val"].dtype


def _add_submodule(program: Program, region: Region, name: str) -> str:
    """Add a submodule with copies of the region's nodes; returns its name."""
    graph = Graph()
    layer, plan = graph.placeholder("layer"), graph.placeholder("plan")
    copies: dict[Node, Node] = {}
    for node in (*region.values, *region.tensors):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node, tensor in region.tensors.items():
        copies[node].meta["tensor"] = tensor
    for node in region.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if _has_own_index(node):
            copies[node].update_arg(layer_place(node), layer)
        if node.target is cached_attention and has_cache(node):
            copies[node].update_kwarg("plan", plan)
    graph.output(copies[region.nodes[-1]])
    program.graph_module.add_submodule(name, GraphModule(nn.Module(), graph))
    return name


def _replace(program: Program, region: Region, submodule: str) -> None:
    """Replace the region's nodes by a call of `submodule`."""
    plan = next((node.kwargs.get("plan") for node in region.nodes if node.target is cached_attention), None)
    result = region.nodes[-1]
    with program.graph.inserting_after(result):
        arguments = (region.layer, plan, *region.values, *region.tensors)
        call = program.graph.call_module(submodule, arguments)
    call.meta["val"] = result.meta["val"]
    result.replace_all_uses_with(call)
    for node in reversed(region.nodes):
        program.graph.erase_node(node)
