"""Checks of the kernels of fused ops against the same ops in plain PyTorch, in float64.

They run on a GPU, and anywhere in Triton's interpreter, for which Triton must be imported with TRITON_INTERPRET=1:

    TRITON_INTERPRET=1 python -m tests.fused_checks
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.divergence import relative_norm
from pmkvq_compiler.runtime import fused
from pmkvq_compiler.runtime.fused_kernels import FUSED, FusedKernels
from pmkvq_compiler.runtime.load import import_generated
from pmkvq_compiler.runtime.weights import side_by_side
from pmkvq_compiler.templates import render

TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
AS_GOOD = 1.5
"""Times the error of the same op in plain PyTorch, in the same dtype and by the same product, that several tokens may
have: PyTorch multiplies them, and rounds norms, partial sums and products."""

INTERPRETED_BFLOAT16 = 2e-2
"""The interpreter cuts numbers to bf16 where the device rounds them."""

SIZES = ((64, (48, 16, 16)), (96, (18,)), (2100, (12, 7)))
"""Columns of weights, and rows of each: not all are multiples of what a program reads at once."""

FEW = ((64, (6, 4, 2)), (2100, (3, 2)))
"""The same for the interpreter, which takes its time."""


def fused_kernels() -> ModuleType:
    """The kernels of fused ops, rendered into a file, which Triton needs."""
    path = Path(tempfile.mkdtemp()) / f"{FUSED}.py"
    path.write_text(render(f"kernels/{FUSED}.py.j2"), encoding="utf-8")
    return import_generated(path)


class Checks:
    """Draws tensors on a device in a dtype, and compares ops."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.ops = FusedKernels(fused_kernels())
        self.generator = torch.Generator(device).manual_seed(0)
        self.tolerance = TOLERANCES[dtype]
        if dtype == torch.bfloat16 and device.type == "cpu":
            self.tolerance = INTERPRETED_BFLOAT16

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device, generator=self.generator)

    def close(self, what: str, found: Tensor, expected: Tensor, plain: Tensor | None = None) -> None:
        """`plain` is what plain PyTorch computes, for calls of several tokens."""
        assert found.shape == expected.shape, what
        assert found.dtype == self.dtype, what
        error, allowed = relative_norm(found, expected), self.tolerance
        if plain is not None:
            allowed = max(allowed, AS_GOOD * relative_norm(plain, expected))
        assert error <= allowed, f"{what}: {error:.1e}, and {allowed:.1e} is allowed"

    def normed(self, x: Tensor, norm: Tensor) -> Tensor:
        """The norm that an op multiplies: computed in float64, and rounded as it would be stored."""
        return F.rms_norm(x.double(), [x.shape[-1]], norm.double(), 1e-5).to(self.dtype).double()

    def linears(self, columns: int, rows: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        """With and without biases and a norm, one behind the other in memory or not."""
        named = {str(at): self.draw(count, columns) for at, count in enumerate(rows)}
        biases, norm, x = [self.draw(count) for count in rows], self.draw(columns), self.draw(*tokens, columns)
        places = side_by_side(named, [[*named]], self.device)
        apart, together = [*named.values()], [places[name].copy_(named[name]) for name in places] or [*named.values()]
        for weights in (apart, together):
            for bias in (None, biases):
                for scale in (None, norm):
                    found = self.ops.linears(x, weights, bias, scale, 1e-5)
                    normed = x.double() if scale is None else self.normed(x, scale)
                    expected = fused.linears(normed, doubles(weights), None if bias is None else doubles(bias))
                    plain = fused.merged_linears(x, weights, bias, scale, 1e-5)
                    for one, other, third in zip(found, expected, plain, strict=True):
                        self.close(f"linears {columns} {rows} {tokens}", one, other, third if several(tokens) else None)
        assert len(rows) == 1 or fused.joined(apart) is None

    def gates(self, columns: int, rows: int, tokens: tuple[int, ...]) -> None:
        """The gate of several tokens is that of products as they are stored, which `linears` checks."""
        drawn = {name: self.draw(rows, columns) / 8 for name in ("gate", "up")}
        places = side_by_side(drawn, [[*drawn]], self.device)
        weights = [places[name].copy_(drawn[name]) for name in places] or [*drawn.values()]
        biases, norm, x = [self.draw(rows) for _ in range(2)], self.draw(columns), self.draw(*tokens, columns)
        for activation in fused.ACTIVATIONS:
            for bias in (None, biases):
                found = self.ops.gated_linear(x, weights, bias, activation, norm, 1e-5)
                wide = None if bias is None else doubles(bias)
                gate, up = fused.linears(self.normed(x, norm), doubles(weights), wide)
                if several(tokens):
                    gate, up = doubles(self.ops.linears(x, weights, bias, norm, 1e-5))
                expected = fused.ACTIVATIONS[activation](gate) * up
                self.close(f"gated_linear {columns} {rows} {tokens} {activation}", found, expected)

    def sums(self, columns: int, rows: int, tokens: tuple[int, ...]) -> None:
        weight, bias, residual, x = (
            self.draw(*shape) for shape in ((rows, columns), (rows,), (*tokens, rows), (*tokens, columns))
        )
        for given in (None, bias):
            expected = fused.linear_add(*doubles([residual, x, weight]), None if given is None else given.double())
            plain = fused.linear_add(residual, x, weight, given) if several(tokens) else None
            self.close(f"linear_add {tokens}", self.ops.linear_add(residual, x, weight, given), expected, plain)

    def turns(self, batch: int, tokens: int, heads: tuple[int, ...], channels: int) -> None:
        """Heads lie as a product of weights side by side leaves them."""
        product = self.draw(batch, tokens, sum(heads) * channels)
        parts = product.split([count * channels for count in heads], -1)
        turned = [part.unflatten(-1, (-1, channels)).transpose(1, 2) for part in parts]
        for tables in (batch, 1):
            cos, sin = (self.draw(tables, tokens, channels).unsqueeze(1) for _ in range(2))
            for found, expected in zip(
                self.ops.rope(turned, cos, sin), fused.rope(doubles(turned), cos.double(), sin.double()), strict=True
            ):
                self.close(f"rope {batch} {tokens} {heads} {channels}", found, expected)


def several(tokens: tuple[int, ...]) -> bool:
    return math.prod(tokens) > 1


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def check_all(device: torch.device, dtype: torch.dtype, sizes: Sequence[tuple[int, tuple[int, ...]]] = SIZES) -> None:
    checks = Checks(device, dtype)
    for columns, rows in sizes:
        for tokens in ((1, 1), (1,), (2, 3)):
            checks.linears(columns, rows, tokens)
            checks.gates(columns, rows[0], tokens)
            checks.sums(columns, rows[0], tokens)
    for batch, tokens, heads, channels in ((1, 1, (4, 2), 16), (2, 3, (7, 1), 80), (3, 1, (5,), 64)):
        checks.turns(batch, tokens, heads, channels)


if __name__ == "__main__":
    from .kernel_checks import repair_interpreter

    repair_interpreter()
    check_all(torch.device("cpu"), torch.float32, FEW)
    check_all(torch.device("cpu"), torch.bfloat16, FEW[:1])
