"""The verifier that runs between passes: the graph must be well formed and have only ops that its stage allows."""

from __future__ import annotations

import enum
import operator

from torch._ops import OpOverload
from torch.fx import Graph, Node

from .ops import FUSED_OPS, MARKER, STATE_OPS, uses_cache
from .program import Program


class Stage(enum.IntEnum):
    """How far a program has come."""

    CAPTURED = 0
    """As torch.export left it, with a marker for each attention."""
    REWRITTEN = 1
    """The markers have been replaced by attention over a cache."""
    CANONICAL = 2
    """In addition, there are no assertions, no in-place ops and no ops without effect."""
    OUTLINED = 3
    """In addition, layers that are equal are calls of one submodule."""


class VerificationError(ValueError):
    """The graph is not valid at its stage; the message names the node."""


INPUTS = ("input_ids", "position_ids", "cache")
PYTHON_FUNCTIONS = frozenset(
    {operator.getitem, operator.add, operator.sub, operator.mul, operator.neg, operator.floordiv, operator.mod}
)
"""Python functions that a graph may call, to take tuples apart and to compute sizes."""


def verify(program: Program, stage: Stage) -> None:
    """Raises `VerificationError` if `program` is not valid at `stage`."""
    try:
        program.graph.lint()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise VerificationError(f"the graph is not well formed: {error}") from error
    known = {*INPUTS, *program.weights, *program.constants}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in known:
            raise VerificationError(f"placeholder {node.name} is neither an input nor a weight nor a constant")
    _verify_nodes(program.graph, stage)
    for node in program.graph.find_nodes(op="call_module") if stage >= Stage.OUTLINED else ():
        _verify_nodes(program.graph_module.get_submodule(node.target).graph, stage)


def _verify_nodes(graph: Graph, stage: Stage) -> None:
    for node in graph.nodes:
        if node.op in ("call_function", "call_module"):
            if not _allowed(node, stage):
                raise VerificationError(
                    f"{node.name} ({node.target}) is not allowed once a graph is {stage.name.lower()}"
                )
            if node.meta.get("val") is None and not is_assertion(node):
                raise VerificationError(f"{node.name} ({node.target}) has lost its shape and dtype")
        elif node.op not in ("placeholder", "output"):
            raise VerificationError(f"{node.name} is a {node.op}, which no stage allows")


def _allowed(node: Node, stage: Stage) -> bool:
    if node.op == "call_module":
        return stage >= Stage.OUTLINED
    if node.target is MARKER or node.target in STATE_OPS:
        return stage < Stage.REWRITTEN
    if uses_cache(node):
        return stage >= Stage.REWRITTEN
    if node.target in FUSED_OPS:
        return stage >= Stage.CANONICAL
    if not isinstance(node.target, OpOverload):
        return node.target in PYTHON_FUNCTIONS
    if node.target.namespace != "aten":
        return False
    return stage < Stage.CANONICAL or not (is_assertion(node) or node.target._schema.is_mutable)


def is_assertion(node: Node) -> bool:
    """Whether the node only checks something, which means that it is an aten op without a result."""
    return isinstance(node.target, OpOverload) and not node.target._schema.returns
