"""Writes `model.py` of an artifact: a function for each kind of layer, one that calls them, and one for the logits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, Node

from pmkvq_compiler.emit.expressions import MODEL_DTYPE, Body, Expression
from pmkvq_compiler.emit.wrapping import LINE, wrap
from pmkvq_compiler.passes.ops import MERGED_OPS, STATE_OPS
from pmkvq_compiler.passes.outline_layers import LAYER, layer_module
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.templates import render

aten = torch.ops.aten

HEAD_OPS = frozenset({aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.to.dtype})
"""Elementwise ops that may follow the last linear layer and still be part of the head."""

HIDDEN = "hidden"
FIRST_VALUE = 2
"""The index of the first value among the arguments of an outlined layer, after `layer` and `plan`."""


@dataclass(frozen=True)
class Function:
    """A function to be printed. All of these functions return a tensor."""

    name: str
    parameters: list[str]
    summary: str
    lines: list[str]

    @property
    def signature(self) -> str:
        line = f"def {self.name}({', '.join(self.parameters)}) -> Tensor:"
        if len(line) <= LINE:
            return line
        return "\n".join([f"def {self.name}(", *(f"    {parameter}," for parameter in self.parameters), ") -> Tensor:"])


def model_source(program: Program) -> str:
    """The text of `model.py` for a program that has been through all passes."""
    result, head = _split_head(program.graph)
    kinds: dict[str, list[Node]] = {}
    for call in program.graph.find_nodes(op="call_module"):
        kinds.setdefault(call.target, []).append(call)
    model, names = _model_function(program, result, head)
    layers = [_layer_function(program, kind, calls, names[kind]) for kind, calls in kinds.items()]
    functions = [*layers, model, _head_function(program, result, head)]
    text = "\n".join(line for function in functions for line in function.lines)
    return render(
        "model.py.j2",
        functions=functions,
        vocab_size=vocab_size(program),
        joined=_joined(program),
        uses_math="math." in text,
        uses_torch="torch." in text,
        state_ops=[name for name in sorted(one.__name__ for one in STATE_OPS.values()) if f"{name}(" in text],
    )


def vocab_size(program: Program) -> int:
    """The number of tokens that have a logit."""
    (output,) = program.graph.find_nodes(op="output")
    (logits,) = output.args
    return int(logits.meta["val"].shape[-1])


def _split_head(graph: Graph) -> tuple[Node, list[Node]]:
    """The last hidden state, and the nodes that turn it into logits: a linear layer and elementwise ops after it.

    If a model ends in another way, the list is empty and the hidden state is the logits.
    """
    (output,) = graph.find_nodes(op="output")
    (result,) = output.args
    node, head = result, []
    while node.target in HEAD_OPS and len(node.all_input_nodes) == 1:
        head.append(node)
        (node,) = node.all_input_nodes
    if node.target is not aten.linear.default:
        return result, []
    return node.args[0], [*head, node][::-1]


def _model_function(program: Program, result: Node, head: list[Node]) -> tuple[Function, dict[str, list[str]]]:
    """The function from tokens to `result` and, for each kind of layer, the names of the values that it takes."""
    graph, calls = program.graph, program.graph.find_nodes(op="call_module")
    expressions = {node: Expression(node.name) for node in graph.find_nodes(op="placeholder")}
    expressions |= _named_tensors(program)
    nodes = [node for node in graph.nodes if node.op.startswith("call_") and node not in head]
    body = Body(expressions, nodes, _trunk(program, calls))
    runs = {run[0]: run for run in _runs(calls)}
    names: dict[str, list[str]] = {}
    previous = None
    for node in nodes:
        if node.op == "call_function":
            body.add(node)
        elif node in runs:
            names.setdefault(node.target, _write_run(body, runs[node], previous))
            previous = runs[node][-1]
    parameters = ["weights: Weights", "input_ids: Tensor", "position_ids: Tensor", "cache: Cache", "ops: Ops = PLAIN"]
    summary = "Last hidden states [B, S, hidden_size] of the tokens `input_ids` [B, S] at `position_ids` [B, S]."
    return Function("hidden_states", parameters, summary, _finish(body, result, expressions)), names


def _layer_function(program: Program, kind: str, calls: list[Node], names: list[str]) -> Function:
    """The function of one kind of layer; `names` are the names of the values that it takes."""
    graph = program.graph_module.get_submodule(kind).graph
    placeholders = graph.find_nodes(op="placeholder")
    layer, values = placeholders[0], placeholders[FIRST_VALUE : FIRST_VALUE + len(names)]
    tensors = placeholders[FIRST_VALUE + len(names) :]
    expressions = {layer: Expression("layer")}
    expressions |= {value: Expression(name) for value, name in zip(values, names, strict=True)}
    expressions |= {tensor: Expression(f"weights[{_quoted(tensor.meta['tensor'])}]") for tensor in tensors}
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    body = Body(expressions, nodes, layer_module(nodes[0]) or "")
    for node in nodes:
        body.add(node)
    (output,) = graph.find_nodes(op="output")
    lines = _finish(body, output.args[0], expressions)
    prefix = next((name for name in (tensor.meta["tensor"] for tensor in tensors) if LAYER in name), None)
    if prefix is not None:
        lines.insert(0, f'path = f"{prefix.partition(LAYER)[0]}{LAYER}."')
    types = ("Tensor" if isinstance(value.meta.get("val"), Tensor) else "int" for value in values)
    parameters = ["weights: Weights", "layer: int", "ops: Ops"]
    parameters += [f"{name}: {'Cache' if name == 'cache' else type_}" for name, type_ in zip(names, types, strict=True)]
    return Function(kind, parameters, f"Hidden states after {span([call.args[0] for call in calls])}.", lines)


def _head_function(program: Program, result: Node, head: list[Node]) -> Function:
    """The function from the last hidden states to logits."""
    expressions = {result: Expression(HIDDEN)} | _named_tensors(program)
    body = Body(expressions, head, "")
    for node in head:
        body.add(node)
    summary = "Logits [..., vocab_size] of last hidden states [..., hidden_size]."
    lines = _finish(body, head[-1] if head else result, expressions)
    return Function("logits", ["weights: Weights", f"{HIDDEN}: Tensor"], summary, lines)


def _joined(program: Program) -> list[list[str]]:
    """The names of weights, and of biases, that one product reads where they lie side by side, each group once."""
    kinds = {call.target for call in program.graph.find_nodes(op="call_module")}
    graphs = [program.graph_module.get_submodule(kind).graph for kind in sorted(kinds)]
    found: dict[tuple[str, ...], None] = {}
    for node in (node for graph in (program.graph, *graphs) for node in graph.nodes if node.target in MERGED_OPS):
        for tensors in node.args[1:3]:
            if tensors is not None and len(tensors) > 1 and None not in tensors:
                found[tuple(one.meta.get("tensor") or program.weights[one.name] for one in tensors)] = None
    return [list(names) for names in found]


def _named_tensors(program: Program) -> dict[Node, Expression]:
    names = program.weights | {placeholder: constant.name for placeholder, constant in program.constants.items()}
    placeholders = program.graph.find_nodes(op="placeholder")
    return {node: Expression(f"weights[{_quoted(names[node.name])}]") for node in placeholders if node.name in names}


def _quoted(name: str) -> str:
    """The key of a tensor as Python. In a layer it is `path + "..."`; its tensors all have names that begin so."""
    _, layer, rest = name.partition(f"{LAYER}.")
    return f'path + "{rest}"' if layer else f'"{name}"'


def _trunk(program: Program, calls: Sequence[Node]) -> str:
    """The path of the module that contains the list of layers."""
    if not calls:
        return ""
    graph = program.graph_module.get_submodule(calls[0].target).graph
    path = next(module for node in graph.nodes if (module := layer_module(node)) is not None)
    return path.rpartition(".")[0].rpartition(".")[0]


def _runs(calls: Sequence[Node]) -> list[list[Node]]:
    """Split the calls of layers into runs that can be loops: each call takes the result of the one before."""
    runs: list[list[Node]] = []
    for call in calls:
        if runs and _continues(runs[-1][-1], call):
            runs[-1].append(call)
        else:
            runs.append([call])
    return runs


def _continues(before: Node, call: Node) -> bool:
    """Whether `call` is the same call as `before` for the next layer, on the result of `before`."""
    same_function = before.target == call.target and before.args[0] + 1 == call.args[0]
    if not same_function or before not in call.args or list(before.users) != [call]:
        return False
    place = call.args.index(before)
    values = _values(call)
    return all(before.args[other] is call.args[other] for other in values if other != place)


def _values(call: Node) -> range:
    """The indices of the values among the arguments of a call; tensors come after them."""
    graph = call.graph.owning_module.get_submodule(call.target).graph
    count = sum("tensor" not in node.meta for node in graph.find_nodes(op="placeholder"))
    return range(FIRST_VALUE, count)


def _write_run(body: Body, run: list[Node], previous: Node | None) -> list[str]:
    """Write the calls of a run that comes after the call `previous`; returns the names that the layer's function gives
    to its values."""
    first, places = run[0], _values(run[0])
    place = run[1].args.index(first) if len(run) > 1 else FIRST_VALUE
    alone = previous is not None and list(previous.users) == [first]
    hidden = body.expressions[previous].text if alone and previous is not None else body.unique(HIDDEN)
    before = body.state(first.args[place], hidden)
    values = [body.state(first.args[other]) for other in places]
    names = [HIDDEN if other == place else value for other, value in zip(places, values, strict=True)]
    if len(run) == 1:
        body.lines += wrap(
            f"{hidden} = ", f"{first.target}({', '.join(['weights', str(first.args[0]), 'ops', *values])})"
        )
    else:
        if before != hidden:
            body.lines.append(f"{hidden} = {before}")
        values[place - FIRST_VALUE] = hidden
        call = f"{first.target}({', '.join(['weights', 'layer', 'ops', *values])})"
        start = f"{first.args[0]}, " if first.args[0] else ""
        body.lines += ["", f"for layer in range({start}{run[-1].args[0] + 1}):"]
        body.lines += [f"    {line}" for line in wrap(f"{hidden} = ", call, indent=8)]
    body.expressions[run[-1]] = Expression(hidden)
    return names


def _finish(body: Body, result: Node, expressions: dict[Node, Expression]) -> list[str]:
    """The statements of a function that returns `result`, preceded by definitions of `dtype` and `device` if it uses
    them."""
    lines = [*body.lines, *wrap("return ", body.render(result).text)]
    text = "\n".join(lines)
    header = []
    tensors = [node for node in expressions if isinstance(node.meta.get("val"), Tensor)]
    if re.search(r"\bdtype\b(?!=)", text):
        header.append(f"dtype = {_first(tensors, expressions, MODEL_DTYPE)}.dtype")
    if re.search(r"\bdevice\b(?!=)", text):
        header.append(f"device = {_first(tensors, expressions)}.device")
    if header and lines[0].startswith("#"):
        header.append("")
    return [*header, *lines]


def _first(tensors: list[Node], expressions: dict[Node, Expression], dtype: torch.dtype | None = None) -> str:
    """The expression of the first tensor, or of the first one of `dtype`."""
    return next(expressions[node].text for node in tensors if dtype in (None, node.meta["val"].dtype))


def span(layers: list[int]) -> str:
    """A list of layers in words, such as "layers 0 to 4, 6 to 10"."""
    parts = []
    for _, group in itertools.groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0]):
        run = [layer for _, layer in group]
        parts.append(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]))
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(parts)}"
