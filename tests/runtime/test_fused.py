"""The kernels of fused ops: in Triton's interpreter, compiled for a device that is not here, and on one that is."""

from __future__ import annotations

import copy
import re

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pmkvq_compiler.runtime.fused_kernels import FusedKernels, launch_of

from ..fused_checks import check_all, fused_kernels
from ..interpreted import run_interpreted


def test_fused_ops_in_the_interpreter_equal_float64() -> None:
    run_interpreted("tests.fused_checks")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_ops_on_the_device_equal_float64(dtype: torch.dtype) -> None:
    check_all(torch.device("cuda"), dtype)


@pytest.mark.parametrize(("columns", "gated"), [(3584, False), (3584, True), (18944, False)])
def test_the_kernel_of_one_token_loads_many_words_at_once(columns: int, gated: bool) -> None:
    """Weights are loaded 16 bytes at a time, and registers suffice."""
    kernel, launch = fused_kernels().linear, launch_of(columns, gated)
    sizes = {"N0": 4096, "N1": 4096 if gated else 512, "N2": 0 if gated else 512}
    flags = {"NORM": columns < 4096, "BIAS": not gated, "ADD": columns > 4096}
    constants = {"K": columns, **sizes, **flags, "ACTIVATION": "silu" if gated else "none", **launch}
    warps = constants.pop("num_warps")
    names = list(kernel.arg_names)
    types = dict.fromkeys(names, "*bf16") | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if types[name] == "*bf16"}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in constants.items()}, aligned)
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]
    rows, lanes = launch["ROWS"] * (2 if gated else 1), 32 * warps
    loads = re.findall(r"ld\.global\.L1::evict_first\S*?(\.v4)?\.b(\d+)", text)
    assert set(loads) == {(".v4", "32")}
    assert len(loads) >= rows * launch["STEP"] // (8 * lanes)
    assert ".local" not in text, "nothing is spilled"


def test_kernels_are_shared_by_copies_of_a_model() -> None:
    kernels = FusedKernels(fused_kernels())
    assert copy.deepcopy(kernels) is kernels
