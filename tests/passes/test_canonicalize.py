from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from pmkvq_compiler.passes.base import PostconditionError, run_passes
from pmkvq_compiler.passes.canonicalize import Canonicalize
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention

from ..models import SHAPE, tiny_model
from ..programs import located, relative_error, run_in_float64

aten = torch.ops.aten


def rewritten(model_type: str) -> Program:
    program = located(model_type)
    run_passes(program, [RewriteAttention()])
    return program


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gpt_neox", "stablelm"])
def test_results_are_equal(model_type: str) -> None:
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(2))
    model, program = tiny_model(model_type), rewritten(model_type)
    before, _ = run_in_float64(program, model, input_ids)
    nodes = len(program.graph.nodes)
    run_passes(program, [Canonicalize()])
    after, _ = run_in_float64(program, model, input_ids)
    assert relative_error(after, before) <= 1e-14
    assert len(program.graph.nodes) < nodes


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_second_run_changes_nothing(model_type: str) -> None:
    program = rewritten(model_type)
    assert run_passes(program, [Canonicalize()])["Canonicalize"].modified
    again = Canonicalize()
    again.takes = Canonicalize.leaves
    before = str(program.graph)
    assert not again(program).modified
    assert str(program.graph) == before


def test_nothing_without_effect_is_left() -> None:
    program = rewritten("gpt_neox")
    run_passes(program, [Canonicalize()])
    gone = {"aten._assert_tensor_metadata.default", "aten.dropout.default", "aten.to.device", "aten.contiguous.default"}
    assert gone.isdisjoint(targets(program))
    for node in program.graph.find_nodes(op="call_function", target=aten.to.dtype):
        assert node.args[0].meta["val"].dtype != node.meta["val"].dtype


def test_sizes_come_from_input_ids() -> None:
    program = rewritten("llama")
    run_passes(program, [Canonicalize()])
    sizes = program.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    assert [(node.args[0].name, node.args[1]) for node in sizes] == [("input_ids", 0), ("input_ids", 1)]


def program_of(build: list[tuple[object, tuple[object, ...]]], shape: tuple[int, ...] = (4, 3)) -> Program:
    """A program over `input_ids` whose ops take the results of earlier ones by number."""
    graph = Graph()
    input_ids = graph.placeholder("input_ids")
    input_ids.meta["val"] = torch.empty(shape, device="meta")
    nodes: list[Node] = [input_ids]
    for target, arguments in build:
        args = tuple(nodes[argument[0]] if isinstance(argument, list) else argument for argument in arguments)
        node = graph.call_function(target, args)  # type: ignore[arg-type]
        values = [argument.meta["val"] if isinstance(argument, Node) else argument for argument in args]
        node.meta["val"] = target(*values)  # type: ignore[operator]
        nodes.append(node)
    graph.output(nodes[-1])
    return Program(GraphModule(nn.Module(), graph), {}, {})


def run_both(program: Program) -> tuple[Tensor, Tensor]:
    def run() -> Tensor:
        program.graph_module.recompile()
        return program.graph_module(torch.arange(12.0).reshape(4, 3))

    before = run()
    run_passes(program, [Canonicalize()])
    return before, run()


def test_op_in_place_becomes_functional() -> None:
    program = program_of([(aten.mul.Tensor, ([0], 2.0)), (aten.add_.Tensor, ([1], 1.0)), (aten.mul.Tensor, ([1], 3.0))])
    before, after = run_both(program)
    assert torch.equal(before, after)
    assert "aten.add.Tensor" in targets(program)


def test_op_in_place_keeps_the_value_that_was_read_before() -> None:
    program = program_of(
        [
            (aten.mul.Tensor, ([0], 2.0)),
            (aten.sum.default, ([1],)),
            (aten.div_.Tensor, ([1], 4.0)),
            (aten.add.Tensor, ([2], [3])),
        ]
    )
    before, after = run_both(program)
    assert torch.equal(before, after)


def test_op_in_place_after_a_cast_becomes_functional() -> None:
    """A cast to another dtype made a copy, so it may read the value before the change."""
    program = program_of(
        [
            (aten.mul.Tensor, ([0], 2.0)),
            (aten.to.dtype, ([1], torch.float64)),
            (aten.clamp_.default, ([1], None, 3.0)),
            (aten.add.Tensor, ([2], [3])),
        ]
    )
    before, after = run_both(program)
    assert torch.equal(before, after)
    assert "aten.clamp.default" in targets(program)


def test_copy_into_a_slice_becomes_a_scatter() -> None:
    program = program_of(
        [
            (aten.mul.Tensor, ([0], 2.0)),
            (aten.slice.Tensor, ([0], 0, 2, 4)),
            (aten.slice.Tensor, ([1], 0, 0, 2)),
            (aten.copy_.default, ([3], [2])),
            (aten.neg.default, ([1],)),
        ]
    )
    before, after = run_both(program)
    assert torch.equal(before, after)
    assert "aten.slice_scatter.default" in targets(program)


def test_op_in_place_on_a_view_becomes_functional_if_nothing_else_reads_the_memory() -> None:
    program = program_of(
        [
            (aten.mul.Tensor, ([0], 2.0)),
            (aten.transpose.int, ([1], 0, 1)),
            (aten.add_.Tensor, ([2], 1.0)),
            (aten.neg.default, ([2],)),
        ]
    )
    before, after = run_both(program)
    assert torch.equal(before, after)
    assert "aten.add.Tensor" in targets(program)


def test_op_in_place_on_a_view_is_refused_if_another_view_is_read_afterwards() -> None:
    program = program_of(
        [
            (aten.mul.Tensor, ([0], 2.0)),
            (aten.select.int, ([1], 0, 0)),
            (aten.transpose.int, ([1], 0, 1)),
            (aten.add_.Tensor, ([3], 1.0)),
            (aten.neg.default, ([2],)),
        ]
    )
    with pytest.raises(PostconditionError, match=r"aten.add_.Tensor\) is not allowed once a graph is canonical"):
        run_passes(program, [Canonicalize()])


AUGMENTED = [
    (aten.mul.Tensor, ([0], 2.0)),
    (aten.select.int, ([1], 0, 3)),
    (aten.clone.default, ([2],)),
    (aten.slice.Tensor, ([1], 0, 1, 3)),
    (aten.add_.Tensor, ([4], [3])),
    (aten.slice.Tensor, ([1], 0, 1, 3)),
    (aten.copy_.default, ([6], [5])),
]
"""`x[1:3] += x[3]`, as Python traces it."""


def test_an_augmented_assignment_to_a_slice_becomes_a_scatter() -> None:
    program = program_of([*AUGMENTED, (aten.neg.default, ([1],))])
    before, after = run_both(program)
    assert torch.equal(before, after)
    assert "aten.slice_scatter.default" in targets(program)


@pytest.mark.parametrize(
    "last",
    [
        (aten.add.Tensor, ([1], [2])),  # reads a view of the memory that was made before the change
        (aten.sub.Tensor, ([4], [4])),
    ],
)
def test_an_augmented_assignment_is_refused_if_a_view_from_before_is_read_afterwards(last: tuple[object, ...]) -> None:
    program = program_of([*AUGMENTED, last], shape=(4, 3))  # type: ignore[list-item]
    with pytest.raises(PostconditionError, match="is not allowed once a graph is canonical"):
        run_passes(program, [Canonicalize()])


def test_op_in_place_on_a_view_is_refused() -> None:
    program = program_of(
        [
            (aten.mul.Tensor, ([0], 2.0)),
            (aten.slice.Tensor, ([1], 0, 0, 2)),
            (aten.zero_.default, ([2],)),
            (aten.neg.default, ([1],)),
        ]
    )
    with pytest.raises(PostconditionError, match=r"aten.zero_.default\) is not allowed once a graph is canonical"):
        run_passes(program, [Canonicalize()])


def test_concatenation_with_nothing_is_the_operand() -> None:
    """Phi 3 leaves the channels behind those that positions turn, of which there are none."""
    program = located("phi3")
    run_passes(program, [RewriteAttention(), Canonicalize()])
    joined = program.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert all(part.meta["val"].shape[-1] > 0 for node in joined for part in node.args[0])
