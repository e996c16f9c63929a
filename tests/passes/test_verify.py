from __future__ import annotations

import pytest
import torch

from pmkvq_compiler.passes.base import Pass, PassError, PostconditionError, PreconditionError, run_passes
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.verify import Stage, VerificationError, verify

from ..programs import captured

aten = torch.ops.aten


def first(program: Program, target: object) -> torch.fx.Node:
    return program.graph.find_nodes(op="call_function", target=target)[0]


def test_a_captured_program_is_sound() -> None:
    verify(captured("llama"), Stage.CAPTURED)


@pytest.mark.parametrize(
    ("stage", "node"),
    [
        (Stage.REWRITTEN, "attention (pmkvq.attention.default)"),
        (Stage.CANONICAL, "aten._assert_tensor_metadata.default"),
    ],
)
def test_each_stage_has_its_ops(stage: Stage, node: str) -> None:
    program = captured("llama")
    if stage == Stage.CANONICAL:
        for marker in program.graph.find_nodes(op="call_function", target=torch.ops.pmkvq.attention.default):
            marker.replace_all_uses_with(marker.args[0])
            program.graph.erase_node(marker)
    with pytest.raises(VerificationError) as caught:
        verify(program, stage)
    assert node in str(caught.value)


def test_lost_metadata_is_found() -> None:
    program = captured("llama")
    del first(program, aten.linear.default).meta["val"]
    with pytest.raises(VerificationError, match=r"linear \(aten.linear.default\) has lost its shape and dtype"):
        verify(program, Stage.CAPTURED)


def test_placeholder_that_nothing_names_is_found() -> None:
    program = captured("llama")
    program.weights.pop("model_norm_weight")
    with pytest.raises(VerificationError, match="model_norm_weight is neither an input nor a weight"):
        verify(program, Stage.CAPTURED)


def test_op_of_another_library_is_found() -> None:
    program = captured("llama")
    node = first(program, aten.silu.default)
    node.target = torch.nn.functional.silu
    with pytest.raises(VerificationError, match="silu"):
        verify(program, Stage.CAPTURED)


class Breaking(Pass):
    """1. Take the metadata of one node."""

    takes = leaves = Stage.CAPTURED

    def run(self, program: Program) -> bool:
        del first(program, aten.silu.default).meta["val"]
        return True


class Failing(Pass):
    """1. Divide by zero."""

    takes = leaves = Stage.CAPTURED

    def run(self, program: Program) -> bool:
        return bool(1 // 0)


def test_errors_name_the_pass_and_keep_the_cause() -> None:
    with pytest.raises(PostconditionError, match="Breaking left an invalid program: silu") as broken:
        run_passes(captured("llama"), [Breaking()])
    assert isinstance(broken.value.__cause__, VerificationError)
    with pytest.raises(PassError, match="Failing failed: ZeroDivisionError") as failed:
        run_passes(captured("llama"), [Failing()])
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


def test_a_pass_does_not_start_on_a_broken_program() -> None:
    program = captured("llama")
    del first(program, aten.linear.default).meta["val"]
    with pytest.raises(PreconditionError, match="Failing cannot start"):
        run_passes(program, [Failing()])
