"""Checks of the generated kernels over pages: what they keep is what the reference keeps, to the last bit of every
code, and they attend as it does.

They run on a GPU, and anywhere in Triton's interpreter, for which Triton must be imported with TRITON_INTERPRET=1:

    TRITON_INTERPRET=1 python -m tests.paged_checks
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import torch

from pmkvq_compiler.runtime.records import STATE
from pmkvq_compiler.runtime.vllm.kernels import PagedKernels, Tables, tell
from pmkvq_compiler.runtime.vllm.layout import PagedLayer, pool_of
from pmkvq_compiler.runtime.vllm.pages import NOBODY, LayerPages, Step

from .kernel_checks import CONSERVATIVE, Case, render_module

TOLERANCE = 3e-3
"""Relative norm of the error, for fp16 inputs."""

STEPS = [[70, 5, 131], [1, 1, 1], [1, 60, 0], [40, 1, 1], *[[1, 1, 1]] * 3, [0, 90, 30], [1, 1, 1]]
"""New tokens of each sequence."""

LENGTH = max(map(sum, zip(*STEPS, strict=True)))

CASES = {
    "by channel": Case(block=64, window=64, key_bits=2, value_bits=2, heads=2, group=3),
    "by token": Case(block=64, window=70, key_bits=4, value_bits=2, key_axis="token", heads=1, group=2),
    "no sink, 8 bits": Case(block=32, window=64, key_bits=8, value_bits=8, sink=0, heads=1, group=5),
    "soft cap and sinks": Case(block=32, window=32, key_bits=4, value_bits=4, softcap=3.0, has_sinks=True),
    "sliding": Case(block=32, window=32, key_bits=4, value_bits=4, sink=0, sliding_window=80, group=1),
    "nine queries a head": Case(block=32, window=32, key_bits=8, value_bits=4, heads=1, group=9),
}
EXACT = {
    "never quantized": Case(block=32, window=32, sink=0),
    "never quantized, sliding": Case(block=32, window=32, sink=0, sliding_window=50),
}


def run(case: Case, device: torch.device, exact: bool = False, seed: int = 0) -> list[float]:
    """The relative error of every step's outputs; what is kept is compared byte by byte."""
    made = torch.Generator().manual_seed(seed)
    case = dataclasses.replace(case, max_len=LENGTH, direct=True, steps=((slice(0, 1),),))
    plan, sequences = case.plan(), len(STEPS[0])
    if exact:
        plan = dataclasses.replace(plan, stages=())
    layer = PagedLayer(plan, plan.num_key_value_heads, case.dtype.itemsize)
    pool = pool_of([layer], LENGTH)
    kinds = {group.kind: group for group in pool.groups}
    needed = [sequences * -(-LENGTH // group.block) for group in pool.groups]
    handed = (torch.randperm(sum(needed), generator=made) + 1).to(torch.int32).split(needed)
    tables = {group.kind: ids.view(sequences, -1).to(device) for group, ids in zip(pool.groups, handed, strict=True)}
    pages, rows = tables["pages"], tables.get("rows", tables["pages"])
    row_block = kinds["rows"].block if "rows" in kinds else 0
    # NaN in every format: a number that is read without having been written shows
    memory = torch.full((1 + sum(needed), pool.block_bytes), 0xFF, dtype=torch.uint8, device=device)
    twin = memory.cpu()
    kernels = PagedKernels.of(
        render_module(case), CONSERVATIVE, layer, memory, case.dtype, 0, 0, row_block, max_len=LENGTH
    )
    placed = () if exact else (twin, 0, row_block)
    reference = LayerPages.of(layer, case.dtype, twin, 0, *placed)
    state = torch.zeros(len(STATE), sequences + 2, dtype=torch.int32, device=device)
    heads, offset = plan.num_key_value_heads, 2 * torch.randn(plan.key_head_dim, generator=made)
    sinks = torch.randn(heads * case.group, generator=made).to(case.dtype) if case.has_sinks else None
    lengths, errors = torch.zeros(sequences, dtype=torch.int32), []
    for counts in STEPS:
        total = sum(counts)
        q = torch.randn(total, heads * case.group, plan.key_head_dim, generator=made).to(case.dtype)
        k = (torch.randn(total, heads, plan.key_head_dim, generator=made) + offset).to(case.dtype)
        v = torch.randn(total, heads, plan.value_head_dim, generator=made).to(case.dtype)
        starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        lengths += starts[1:] - starts[:-1]
        tell(state, starts.to(device), lengths.to(device))
        first = next((n for n, count in enumerate(counts) if count != 1), sequences)  # those of one token come first
        parts = [
            Tables(state[:, own], pages[own], rows[own], own.stop - own.start, max(counts[own]))
            for own in (slice(0, first), slice(first, sequences))
            if own.start < own.stop
        ]
        out = torch.empty(total, heads * case.group, plan.value_head_dim, dtype=case.dtype, device=device)
        on_device = (one.to(device) for one in (q, k, v))
        kernels.attend(*on_device, parts, 0.2, None if sinks is None else sinks.to(device), out)
        out = out.cpu().double()
        steps = []
        for number, count in enumerate(counts):
            own = slice(int(starts[number]), int(starts[number]) + count)
            past = int(lengths[number]) - count
            one = Step(k[own].transpose(0, 1), v[own].transpose(0, 1), past, pages[number].cpu(), rows[number].cpu())
            if count:
                steps.append((own, one))
        for _, step in steps:
            reference.write_tokens(step)
        for _, step in steps:
            reference.write_blocks(step)
        assert torch.equal(memory.cpu(), twin), "codes, parameters and rows"
        for own, step in steps:
            expected = reference.attend(q[own].transpose(0, 1), step, 0.2, case.softcap, sinks).transpose(0, 1).double()
            errors.append(float((out[own] - expected).norm() / expected.norm()))
    assert not bool((memory[NOBODY] != 0xFF).any()), "nobody's block stays as it was"
    return errors


def main(names: list[str]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known: dict[str, Any] = {**CASES, **EXACT}
    for name in names or known:
        errors = run(known[name], device, exact=name in EXACT)
        print(f"{name:<28} {max(errors):.1e}")
        assert max(errors) <= TOLERANCE, name


if __name__ == "__main__":
    main(sys.argv[1:])
