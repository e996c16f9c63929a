"""Products with experts, computed in a way that a CUDA graph can hold."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.experts import grouped_mm, grouped_mm_on_device, has_kernel
from pmkvq_compiler.runtime.fused import PLAIN, Ops
from pmkvq_compiler.runtime.fused_kernels import FusedKernels

from ..programs import relative_error

ROWS_OF_EXPERTS = {
    "fewer rows than experts": [0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    "the first expert and the last": [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    "as many rows as experts": [1, 1, 1, 1],
    "experts without a row": [0, 7, 0, 0, 9, 0],
    "one expert has all rows": [0, 20, 0],
    "one expert": [5],
}


def drawn(counts: list[int], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Rows, matrices as the modules of transformers store them, transposed, and where the rows of each expert end."""
    torch.manual_seed(0)
    x, weights = torch.randn(sum(counts), 24), torch.randn(len(counts), 40, 24)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    return x.to(device, dtype), weights.to(device, dtype).transpose(-2, -1), ends.to(device)


def of_each_expert(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """The product in float64, one expert after the other."""
    parts = zip(x.double().split(counts), weights.double(), strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("counts", ROWS_OF_EXPERTS.values(), ids=ROWS_OF_EXPERTS)
def test_a_product_without_the_host_is_that_of_each_expert(counts: list[int], dtype: torch.dtype) -> None:
    x, weights, ends = drawn(counts, dtype)
    exact = of_each_expert(x, weights, counts)
    for product in (grouped_mm, grouped_mm_on_device):
        out = product(x, weights, ends)
        assert out.dtype == dtype
        assert relative_error(out, exact) <= {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 1e-2)


@pytest.mark.parametrize(
    ("capability", "has"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)]
)
def test_torch_multiplies_without_the_host_on_two_generations_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool
) -> None:
    """Elsewhere a graph could not hold its product in bfloat16, either."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_kernel(torch.device("cuda:0")) is has


@pytest.mark.parametrize("ops", [PLAIN, FusedKernels(ModuleType("fused"))])
def test_only_a_step_for_graphs_multiplies_without_the_host(ops: Ops) -> None:
    captured = ops.for_graphs()
    assert type(captured) is type(ops)
    assert (ops.grouped_mm, captured.grouped_mm) == (grouped_mm, grouped_mm_on_device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("counts", ROWS_OF_EXPERTS.values(), ids=ROWS_OF_EXPERTS)
def test_a_captured_product_is_that_of_each_expert(counts: list[int], dtype: torch.dtype) -> None:
    x, weights, ends = drawn(counts, dtype, "cuda")
    exact = of_each_expert(x, weights, counts)
    grouped_mm_on_device(x, weights, ends)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = grouped_mm_on_device(x, weights, ends)
    graph.replay()
    assert relative_error(out, exact) <= {torch.float32: 1e-5, torch.float16: 1e-3}.get(dtype, 1e-2)
