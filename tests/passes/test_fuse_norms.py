from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from transformers import PreTrainedModel

from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.canonicalize import Canonicalize
from pmkvq_compiler.passes.fuse_norms import FuseNorms
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention
from pmkvq_compiler.passes.verify import is_assertion

from ..fuzz import LONG_ONLY, chosen
from ..models import SHAPE, tiny_model
from ..programs import Float64Interpreter, located, relative_error, run_in_float64

aten = torch.ops.aten

EPS = 1e-5
WIDTH = 64


def fused(program: Program) -> list[Node]:
    return program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)


def with_random_norms(model: PreTrainedModel) -> PreTrainedModel:
    """No norm is left with weights that are all equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


@pytest.mark.parametrize(
    ("model_type", "norms_per_layer"),
    [
        ("llama", 2),
        ("qwen2", 2),
        pytest.param("mistral", 2, marks=LONG_ONLY),
        pytest.param("granite", 2, marks=LONG_ONLY),
        ("qwen3", 4),
        ("olmo2", 4),
        pytest.param("gemma2", 4, marks=LONG_ONLY),
        ("gemma3_text", 6),
    ],
)
def test_all_norms_of_a_model_become_one_op_each(model_type: str, norms_per_layer: int) -> None:
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(2))
    model, program = with_random_norms(tiny_model(model_type)), located(model_type)
    run_passes(program, [RewriteAttention(), Canonicalize()])
    before, _ = run_in_float64(program, model, input_ids)
    nodes = len(program.graph.nodes)
    assert run_passes(program, [FuseNorms()])["FuseNorms"].modified
    after, _ = run_in_float64(program, model, input_ids)
    assert relative_error(after, before) <= 1e-14
    norms = SHAPE["num_hidden_layers"] * norms_per_layer + 1
    assert len(fused(program)) == norms
    assert len(program.graph.nodes) <= nodes - 5 * norms
    assert not program.graph.find_nodes(op="call_function", target=aten.rsqrt.default)


@pytest.mark.parametrize("model_type", chosen(["mixtral", "qwen3_moe", "gpt_oss"], "gpt_oss"))
def test_all_norms_of_a_mixture_of_experts_become_one_op_each(model_type: str) -> None:
    program = located(model_type)
    run_passes(program, [RewriteAttention(), Canonicalize(), FuseNorms()])
    norms = {"mixtral": 2, "qwen3_moe": 4, "gpt_oss": 2}[model_type] * SHAPE["num_hidden_layers"] + 1
    assert len(fused(program)) == norms
    assert not program.graph.find_nodes(op="call_function", target=aten.rsqrt.default)


Function = Callable[[Tensor, Tensor], Any]


def program_of(function: Function) -> Program:
    """The program of `function(hidden [2, 5, 64], weight [64])`."""

    class Module(nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor) -> Any:
            return function(hidden, weight)

    examples = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((2, 5, WIDTH), (WIDTH,))]
    graph = torch.export.export(Module(), tuple(examples), strict=False).graph
    for node in list(graph.nodes):
        if node.op == "call_function" and is_assertion(node):
            graph.erase_node(node)
    return Program(GraphModule(nn.Module(), graph), {"hidden": "hidden", "weight": "weight"}, {})


def inverse_rms(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def llama(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.to(torch.float32)
    return weight * (x * inverse_rms(x)).to(hidden.dtype)


def operands_swapped(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return (inverse_rms(x) * x).to(hidden.dtype) * weight


def last_dim_counted_from_the_first(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + EPS)).to(hidden.dtype)


def gpt_oss(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return (weight * (x * inverse_rms(x))).to(hidden.dtype)


def gemma(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return (x * inverse_rms(x) * (1.0 + weight.float())).to(hidden.dtype)


def gemma4(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -0.5) * weight.float()).to(hidden.dtype)


def without_weight(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return (x * inverse_rms(x)).to(hidden.dtype)


def float32_read_besides(hidden: Tensor, weight: Tensor) -> Tensor:
    """What is read besides is no value in between, but the operand."""
    x = hidden.float()
    return weight * (x * inverse_rms(x)).to(hidden.dtype) + x.sin().to(hidden.dtype)


def factor_of_each_token(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return (x * inverse_rms(x)).to(hidden.dtype) * hidden[..., :1]


VARIANTS: list[Function] = [
    llama,
    operands_swapped,
    last_dim_counted_from_the_first,
    gpt_oss,
    gemma,
    gemma4,
    without_weight,
    float32_read_besides,
    factor_of_each_token,
]


def hidden_and_weight(seed: int) -> tuple[Tensor, Tensor]:
    """bfloat16 [2, 5, 64] with tokens of very different size, so that one without its norm would show, and [64]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 2, 10).reshape(2, 5, 1)
    hidden = torch.randn(2, 5, WIDTH, generator=generator) * sizes
    return hidden.bfloat16(), torch.randn(WIDTH, generator=generator).bfloat16()


@pytest.mark.parametrize("function", VARIANTS)
def test_fused_norm_computes_the_same(function: Function) -> None:
    """In float64 to rounding; in bfloat16 at least as exactly."""
    program, inputs = program_of(function), hidden_and_weight(seed=5)
    exact = [value.double() for value in inputs]

    def run() -> tuple[Tensor, Tensor]:
        return Float64Interpreter(program).run(*exact)[0], Interpreter(program.graph_module).run(*inputs)[0]

    reference, rounded = run()
    nodes = len(program.graph.nodes)
    run_passes(program, [FuseNorms()])
    assert len(fused(program)) == 1
    assert len(program.graph.nodes) < nodes
    out, fused_rounded = run()
    assert relative_error(out, reference) <= 1e-15
    assert fused_rounded.dtype == rounded.dtype == torch.bfloat16
    assert relative_error(fused_rounded, reference) <= relative_error(rounded, reference) <= 5e-3


def test_kernel_gets_operand_and_weight_in_one_dtype() -> None:
    """CUDA has a kernel for that case only."""
    for function in VARIANTS:
        program = program_of(function)
        run_passes(program, [FuseNorms()])
        (norm,) = fused(program)
        operand, shape, weight, eps = norm.args
        assert weight is None or weight.meta["val"].dtype == operand.meta["val"].dtype, function.__name__
        assert norm.meta["val"].dtype == operand.meta["val"].dtype, function.__name__
        assert (shape, eps) == ([WIDTH], EPS)


def test_norm_of_a_norm_is_fused_too() -> None:
    program, inputs = program_of(lambda hidden, weight: llama(llama(hidden, weight), weight)), hidden_and_weight(6)
    reference = Float64Interpreter(program).run(*(value.double() for value in inputs))[0]
    run_passes(program, [FuseNorms()])
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [aten.rms_norm.default] * 2
    assert relative_error(Float64Interpreter(program).run(*(v.double() for v in inputs))[0], reference) <= 1e-15


def layer_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    centred = x - x.mean(-1, keepdim=True)
    return weight * (centred * inverse_rms(centred)).to(hidden.dtype)


def over_another_dim(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)).to(hidden.dtype)


def over_two_dims(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean((-1, -2), keepdim=True) + EPS)).to(hidden.dtype)


def without_kept_dim(hidden: Tensor, weight: Tensor) -> Tensor:
    """Broadcast, each token's number meets another axis."""
    x = hidden.float().reshape(-1, WIDTH)[:, :10]
    return (x * torch.rsqrt(x.pow(2).mean(-1) + EPS)).to(hidden.dtype)


def sum_of_squares(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)).to(hidden.dtype)


def mean_of_cubes(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + EPS)).to(hidden.dtype)


def square_instead_of_root(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return weight * (x * torch.pow(x.pow(2).mean(-1, keepdim=True) + EPS, -2)).to(hidden.dtype)


def rms_of_something_else(hidden: Tensor, weight: Tensor) -> Tensor:
    x = hidden.float()
    return weight * (x * inverse_rms(x + 1)).to(hidden.dtype)


def weight_before_the_rms(hidden: Tensor, weight: Tensor) -> Tensor:
    x = weight.float() * hidden.float()
    return (x * inverse_rms(x)).to(hidden.dtype)


def in_the_models_dtype(hidden: Tensor, weight: Tensor) -> Tensor:
    return weight * (hidden * inverse_rms(hidden))


def root_read_besides(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.float()
    root = inverse_rms(x)
    return weight * (x * root).to(hidden.dtype), root


def mean_read_besides(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.float()
    mean = x.pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(mean + EPS)).to(hidden.dtype), mean


def normalized_read_besides(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.float()
    normalized = x * inverse_rms(x)
    return weight * normalized.to(hidden.dtype), normalized


def weighted_float32_read_besides(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden.float()
    weighted = weight * (x * inverse_rms(x))
    return weighted.to(hidden.dtype), weighted


@pytest.mark.parametrize(
    "function",
    [
        layer_norm,
        over_another_dim,
        over_two_dims,
        without_kept_dim,
        sum_of_squares,
        mean_of_cubes,
        square_instead_of_root,
        rms_of_something_else,
        weight_before_the_rms,
        in_the_models_dtype,
        root_read_besides,
        mean_read_besides,
        normalized_read_besides,
        weighted_float32_read_besides,
    ],
)
def test_look_alike_is_left_alone(function: Function) -> None:
    program = program_of(function)
    before = str(program.graph)
    assert not run_passes(program, [FuseNorms()])["FuseNorms"].modified
    assert str(program.graph) == before


def test_layer_norms_of_cohere_are_left_alone() -> None:
    program = located("cohere")
    run_passes(program, [RewriteAttention(), Canonicalize()])
    before = str(program.graph)
    assert not run_passes(program, [FuseNorms()])["FuseNorms"].modified
    assert str(program.graph) == before


def test_weight_for_each_token_is_no_part_of_the_norm() -> None:
    program = program_of(factor_of_each_token)
    run_passes(program, [FuseNorms()])
    (norm,) = fused(program)
    assert norm.args[2] is None
    assert [user.target for user in norm.users] == [aten.mul.Tensor]
