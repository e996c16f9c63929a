"""Turns a canonical graph into the lines of a Python function.

A value that is read once is written where it is read, as long as the line stays short. Every other value gets a name,
after the module whose result it is (`q_proj`, `input_layernorm`) or else after its op. Only ops that use the cache have
side effects, so any other expression may move down to its reader.
"""

from __future__ import annotations

import builtins
import itertools
import keyword
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from pmkvq_compiler.emit.wrapping import wrap
from pmkvq_compiler.passes.ops import FUSED_OPS, cached_attention, uses_cache
from pmkvq_compiler.runtime import recurrence

aten = torch.ops.aten

CACHE_OPS: dict[Any, tuple[str, tuple[str, ...]]] = {
    cached_attention: ("attended", ("query", "key", "value")),
    recurrence.causal_conv1d: ("convolved", ("channels",)),
    recurrence.gated_delta_rule: ("recalled", ("query", "key", "value", "decay", "beta")),
    recurrence.selective_scan: ("scanned", ("inputs", "step", "rate", "key", "query")),
}
"""Names for the result and the operands of each op that uses the cache."""

RESERVED = frozenset(
    {
        "weights",
        "layer",
        "ops",
        "path",
        "dtype",
        "device",
        "torch",
        "math",
        "F",
        "Cache",
        "Callable",
        "Mapping",
        "TYPE_CHECKING",
        "Tensor",
        "Weights",
        "annotations",
        "bind",
        *(operation.__name__ for operation in CACHE_OPS),
        "hidden_states",
        "logits",
        "partial",
        "Ops",
        "PLAIN",
        "JOINED",
        *keyword.kwlist,
        *dir(builtins),
    }
)
"""Names that already have a meaning in a generated module."""
LAYER_FUNCTION = "decoder_layer"
"""The beginning of the names of layers' functions."""
EXPRESSION = 88
"""If an expression would be longer than this, its operands are written on separate lines."""

SUM, PRODUCT, UNARY, ATOM = range(4)


@dataclass(frozen=True)
class Expression:
    """Python text, and how tightly its outermost operator binds: `SUM` binds least, and `ATOM` needs no brackets."""

    text: str
    level: int = ATOM

    def within(self, level: int) -> str:
        """The text as an operand of an operator that binds as tightly as `level`."""
        return self.text if self.level >= level else f"({self.text})"


Render = Callable[[Any], Expression]
"""Turns an argument of a node (a node, a constant, or a list of them) into its expression."""

MODEL_DTYPE = torch.bfloat16
"""In a captured graph, bfloat16 stands for the dtype of the weights; the emitted code calls it `dtype`."""

OPERATORS: dict[Any, tuple[str, int]] = {
    aten.add.Tensor: ("+", SUM),
    aten.sub.Tensor: ("-", SUM),
    aten.mul.Tensor: ("*", PRODUCT),
    aten.div.Tensor: ("/", PRODUCT),
    aten.floor_divide.default: ("//", PRODUCT),
    aten.matmul.default: ("@", PRODUCT),
    operator.add: ("+", SUM),
    operator.sub: ("-", SUM),
    operator.mul: ("*", PRODUCT),
    operator.floordiv: ("//", PRODUCT),
    operator.mod: ("%", PRODUCT),
}
METHODS: dict[Any, str] = {
    aten.chunk.default: "chunk",
    aten.clamp.default: "clamp",
    aten.contiguous.default: "contiguous",
    aten.cumsum.default: "cumsum",
    aten.expand.default: "expand",
    aten.flatten.using_ints: "flatten",
    aten.pow.Tensor_Scalar: "pow",
    aten.repeat_interleave.self_int: "repeat_interleave",
    aten.reshape.default: "reshape",
    aten.softmax.int: "softmax",
    aten.sort.default: "sort",
    aten.split.Tensor: "split",
    aten.split_with_sizes.default: "split",
    aten.squeeze.dim: "squeeze",
    aten.topk.default: "topk",
    aten.transpose.int: "transpose",
    aten.unsqueeze.default: "unsqueeze",
    aten.view.default: "view",
}
UNPACKED = frozenset({aten.view.default, aten.reshape.default, aten.expand.default})
"""Methods that take a shape as separate arguments."""
FUNCTIONS: dict[Any, str] = {
    aten._grouped_mm.default: "ops.grouped_mm",
    aten.addmm.default: "torch.addmm",
    aten.arange.default: "torch.arange",
    aten.cat.default: "torch.cat",
    aten.cos.default: "torch.cos",
    aten.empty_like.default: "torch.empty_like",
    aten.exp.default: "torch.exp",
    aten.gelu.default: "F.gelu",
    aten.histc.default: "torch.histc",
    aten.linear.default: "F.linear",
    aten.relu.default: "F.relu",
    aten.rms_norm.default: "F.rms_norm",
    aten.rsqrt.default: "torch.rsqrt",
    aten.sigmoid.default: "torch.sigmoid",
    aten.silu.default: "F.silu",
    aten.sin.default: "torch.sin",
    aten.slice_scatter.default: "torch.slice_scatter",
    aten.softplus.default: "F.softplus",
    aten.stack.default: "torch.stack",
    aten.tanh.default: "torch.tanh",
}


def render_call(node: Node, render: Render) -> Expression:
    """The expression of one op: the usual Python for it if this module knows it, else a call of `torch.ops`."""
    target, args, kwargs = node.target, list(node.args), dict(node.kwargs)
    if target in SPECIAL:
        special = SPECIAL[target](node, render)
        if special is not None:
            return special
    if target in OPERATORS and not kwargs:
        symbol, level = OPERATORS[target]
        left, right = render(args[0]).within(level), render(args[1]).within(level + 1)
        return Expression(f"{left} {symbol} {right}", level)
    if target in METHODS:
        if target in UNPACKED:
            args[1:] = args[1]
        return Expression(f"{render(args[0]).within(ATOM)}.{METHODS[target]}({_arguments(args[1:], kwargs, render)})")
    name = FUNCTIONS.get(target, f"torch.ops.{target}")
    return Expression(f"{name}({_arguments(args, kwargs, render)})")


def _arguments(args: Iterable[Any], kwargs: Mapping[str, Any], render: Render) -> str:
    named = (f"{name}={render(value).text}" for name, value in kwargs.items() if name not in ("layout", "pin_memory"))
    return ", ".join([*(render(argument).text for argument in args), *named])


def _cast(node: Node, render: Render) -> Expression:
    operand, dtype = render(node.args[0]).within(ATOM), node.args[1]
    return Expression(f"{operand}.float()" if dtype == torch.float32 else f"{operand}.to({render(dtype).text})")


def _negation(node: Node, render: Render) -> Expression:
    return Expression(f"-{render(node.args[0]).within(UNARY)}", UNARY)


def _embedding(node: Node, render: Render) -> Expression:
    return Expression(f"F.embedding({_arguments(node.args[1::-1], {}, render)})")


def _layer_norm(node: Node, render: Render) -> Expression:
    return Expression(f"F.layer_norm({_arguments(node.args[:5], {}, render)})")


def _reduction(name: str) -> Callable[[Node, Render], Expression | None]:
    def render_reduction(node: Node, render: Render) -> Expression | None:
        operand, dims, *keepdim = node.args
        if len(dims) != 1 or node.kwargs:
            return None
        kept = ", keepdim=True" if keepdim and keepdim[0] else ""
        return Expression(f"{render(operand).within(ATOM)}.{name}({dims[0]}{kept})")

    return render_reduction


def _slice(node: Node, render: Render) -> Expression:
    defaults = (0, 0, sys.maxsize, 1)
    operand, dim, start, end, step = list(node.args) + list(defaults[len(node.args) - 1 :])
    first = "" if start in (0, None) else render(start).text
    last = "" if end in (sys.maxsize, None) else render(end).text
    return _subscript(operand, dim, f"{first}:{last}" + ("" if step == 1 else f":{render(step).text}"), render)


def _select(node: Node, render: Render) -> Expression:
    operand, dim, index = node.args
    return _subscript(operand, dim, render(index).text, render)


def _subscript(operand: Node, dim: int, index: str, render: Render) -> Expression:
    rank = operand.meta["val"].dim()
    dim %= rank
    before = "..., " if dim == rank - 1 and dim > 0 else ":, " * dim
    return Expression(f"{render(operand).within(ATOM)}[{before}{index}]")


def _index(node: Node, render: Render) -> Expression | None:
    operand, indices = node.args
    if len(indices) != 1 or indices[0] is None:
        return None
    return Expression(f"{render(operand).within(ATOM)}[{render(indices[0]).text}]")


def _getitem(node: Node, render: Render) -> Expression:
    return Expression(f"{render(node.args[0]).within(ATOM)}[{render(node.args[1]).text}]")


def _size(node: Node, render: Render) -> Expression:
    return Expression(f"{render(node.args[0]).within(ATOM)}.shape[{node.args[1]}]")


def _cache_op(node: Node, render: Render) -> Expression:
    """`plan` is left out, because the cache has it."""
    kwargs = {name: value for name, value in node.kwargs.items() if name != "plan" and value is not None}
    return Expression(f"{node.target.__name__}({_arguments(node.args, kwargs, render)})")


def _fused_op(node: Node, render: Render) -> Expression:
    return Expression(f"ops.{node.target.__name__}({_arguments(node.args, {}, render)})")


SPECIAL: dict[Any, Callable[[Node, Render], Expression | None]] = {
    **dict.fromkeys(CACHE_OPS, _cache_op),
    **dict.fromkeys(FUSED_OPS, _fused_op),
    aten.embedding.default: _embedding,
    aten.index.Tensor: _index,
    aten.layer_norm.default: _layer_norm,
    aten.mean.dim: _reduction("mean"),
    **dict.fromkeys((aten.neg.default, operator.neg), _negation),
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.sum.dim_IntList: _reduction("sum"),
    aten.sym_size.int: _size,
    aten.to.dtype: _cast,
    operator.getitem: _getitem,
}


class Body:
    """The statements of one function, written node by node.

    `expressions` has the arguments and weights of the function, `nodes` are what it computes, and `module` is the path
    of the module that it implements.
    """

    def __init__(self, expressions: Mapping[Node, Expression], nodes: Iterable[Node], module: str) -> None:
        self.lines: list[str] = []
        self.module = module
        self.expressions = dict(expressions)
        self.waiting: set[Node] = set()
        self.names = {*RESERVED, *(expression.text for expression in expressions.values())}
        self.results = Counter(module_of(node) for node in nodes if _is_result(node))
        self.heading = ""

    def render(self, argument: Any) -> Expression:
        """The expression of an argument of a node."""
        if isinstance(argument, Node):
            return self.expressions[argument]
        if isinstance(argument, (list, tuple)):
            return Expression(f"[{', '.join(self.render(element).text for element in argument)}]")
        if isinstance(argument, torch.dtype):
            return Expression("dtype" if argument == MODEL_DTYPE else str(argument))
        if isinstance(argument, torch.device):
            return Expression("device")
        if isinstance(argument, float) and argument in (float("inf"), float("-inf")):
            return Expression("math.inf") if argument > 0 else Expression("-math.inf", UNARY)
        if isinstance(argument, str):
            return Expression(f'"{argument}"')
        negative = isinstance(argument, (int, float)) and argument < 0
        return Expression(repr(argument), UNARY if negative else ATOM)

    def add(self, node: Node) -> None:
        """Write a node, or keep its expression for the one place that reads it."""
        waiting = [one for one in node.all_input_nodes if one in self.waiting]
        operands = sorted(waiting, key=lambda one: -len(self.expressions[one].text))
        expression = render_call(node, self.render)
        while len(expression.text) > EXPRESSION and operands:
            self.state(operands.pop(0))
            expression = render_call(node, self.render)
        self.expressions[node] = expression
        self.waiting.add(node)
        attends = uses_cache(node) or any(one.target is cached_attention for one in node.users)
        if attends or _reads(node) != 1:
            self.state(node)

    def state(self, node: Node, name: str | None = None) -> str:
        """Give the value of a waiting node a name; returns the name."""
        if node not in self.waiting:
            return self.expressions[node].text
        name = name or self.unique(self._hint(node))
        self._head(node)
        self.lines += wrap(f"{name} = ", self.expressions[node].text)
        self.expressions[node] = Expression(name)
        self.waiting.remove(node)
        return name

    def _hint(self, node: Node) -> str:
        """A name that a reader would expect for the value of `node`."""
        for user in node.users:
            _, operands = CACHE_OPS.get(user.target, ("", ()))
            if node in user.args[: len(operands)]:
                return operands[user.args.index(node)]
        if uses_cache(node):
            return CACHE_OPS[node.target][0]
        if node.target is aten.sym_size.int:
            return ("batch", "sequence")[node.args[1]]
        if isinstance(node.meta["val"], torch.SymInt):
            return "size"
        own = relative_module(node, self.module)
        if own and _is_result(node) and self.results[module_of(node)] == 1:
            return own
        if node.target is aten.to.dtype and node.args[0].op == "call_function":
            return self._hint(node.args[0])
        if isinstance(node.target, OpOverload):
            return node.target._schema.name.removeprefix("aten::").strip("_")
        return node.target.__name__

    def unique(self, hint: str) -> str:
        """A name that is not taken yet, made from `hint`, which is a word or the path of a module."""
        hint = identifier(hint)
        candidates = itertools.chain([hint], (f"{hint}_{number}" for number in itertools.count(1)))
        name = next(candidate for candidate in candidates if candidate not in self.names)
        self.names.add(name)
        return name

    def _head(self, node: Node) -> None:
        """Write a comment if another part of the module begins here."""
        heading = relative_module(node, self.module).partition(".")[0]
        if not isinstance(node.meta["val"], torch.SymInt) and heading and heading != self.heading:
            self.lines += ["", f"# {heading}"] if self.lines else [f"# {heading}"]
            self.heading = heading


def identifier(hint: str) -> str:
    """The end of a dotted path as a Python name: `self_attn.q_norm` gives `q_norm`, `norms.0` gives `norms_0`."""
    found = re.search(r"[^\W\d]\w*(\W+\d+)*\W*$", hint)
    name = re.sub(r"\W+", "_", found[0]).rstrip("_") if found else ""
    return name if name.isidentifier() and not name.startswith(LAYER_FUNCTION) else f"value_{name}".rstrip("_")


def module_of(node: Node) -> str:
    """The path of the innermost module that computes `node`; empty if there is none."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def relative_module(node: Node, module: str) -> str:
    path = module_of(node)
    return path.removeprefix(f"{module}.") if path.startswith(f"{module}.") else ""


def _reads(node: Node) -> int:
    """How often the value of `node` is read."""
    count = 0

    def add(operand: Node) -> Node:
        nonlocal count
        count += operand is node
        return operand

    for user in node.users:
        map_arg((user.args, user.kwargs), add)
    return count


def _is_result(node: Node) -> bool:
    """Whether `node` is computed by a module and read outside of it."""
    module = module_of(node)
    return bool(module) and not any(f"{module_of(user)}.".startswith(f"{module}.") for user in node.users)
