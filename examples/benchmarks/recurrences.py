"""Linear recurrences by flash-linear-attention against plain PyTorch, on a CUDA device where it is installed.

    python examples/benchmarks/recurrences.py
    python examples/benchmarks/recurrences.py --tokens 4096 --dtype float32

One layer's recurrence over a prompt, and one decode step of it in a CUDA graph. What both compute is compared with
float64 first (`gate.py`); what is wrong gets no time, and the exit code is 1. `first call` is what the first prompt
waits for: the library's import, and Triton, which compiles and tunes its kernels and keeps them on the disk.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import gate
import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.runtime import recurrence
from pmkvq_compiler.runtime.backend import NewTokens
from pmkvq_compiler.runtime.plan import StatePlan
from pmkvq_compiler.runtime.reference import REFERENCE, Reference
from pmkvq_compiler.runtime.states import StateStore

DEVICE = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
REPEATED = {True: 20, False: 100}
"""How often prompts and steps are timed."""


@dataclass(frozen=True)
class Shape:
    """One layer. `kind` is "head" or "channel" for the gated delta rule, by what decays by itself, or "scan"."""

    kind: str
    key_heads: int
    heads: int
    keys: int
    values: int

    @property
    def state(self) -> tuple[int, int, int]:
        return self.heads, self.keys, self.values


SHAPES = {
    "Qwen3-Next-80B-A3B, gated delta rule": Shape("head", 16, 32, 128, 128),
    "Kimi-Linear-48B-A3B, delta rule by channel": Shape("channel", 32, 32, 128, 128),
    "Nemotron-3-Nano-30B-A3B, Mamba-2": Shape("scan", 8, 64, 128, 64),
}


class Library(Reference):
    """Stands for attention by kernels, beside which the library is used."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt (%(default)s)")
    parser.add_argument("--only", default="", help="the layers whose names begin so")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="(%(default)s)")
    arguments = parser.parse_args()
    dtype, wrong = getattr(torch, arguments.dtype), 0
    print(
        "| layer | what | PyTorch, ms | by | ms | ratio | first call, s |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name, shape in SHAPES.items():
        if not name.startswith(arguments.only):
            continue
        given = operands(shape, arguments.tokens, dtype)
        try:
            first = compare(name, shape, given)
        except gate.WrongKernelError as error:
            print(error, flush=True)
            wrong += 1
            continue
        by = recurrence.computed_by(shape.state, dtype, DEVICE, [Library()])
        for what, some in (("prompt", given), ("step", [x[:, :1] if x.dim() > 2 else x for x in given])):
            plain, ours = (milliseconds(call_of(shape, some, one), what) for one in (REFERENCE, Library()))
            waited = f"{first:.0f}" if what == "prompt" else ""
            print(f"| {name} | {what} | {plain:.3f} | {by} | {ours:.3f} | {plain / ours:.1f} | {waited} |", flush=True)
    if wrong:
        sys.exit(f"{wrong} recurrences are wrong and were not timed")


def operands(shape: Shape, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Random operands of a prompt, with decays as models have them: most heads forget little."""
    torch.manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(1, tokens, *sizes, device=DEVICE)

    rate = -torch.rand(shape.heads, device=DEVICE) * 4
    if shape.kind == "scan":
        keys, queries = (normal(shape.key_heads, shape.keys) / shape.keys**0.25 for _ in range(2))
        steps = F.softplus(normal(shape.heads) - 4)
        return [normal(shape.heads, shape.values).to(dtype), steps, rate, keys.to(dtype), queries.to(dtype)]
    own = (shape.heads, shape.keys) if shape.kind == "channel" else (shape.heads,)
    decay = (rate.unsqueeze(-1) if shape.kind == "channel" else rate) * F.softplus(normal(*own) - 2)
    queries, keys = (normal(shape.key_heads, shape.keys).to(dtype) for _ in range(2))
    return [queries, keys, normal(shape.heads, shape.values).to(dtype), decay, normal(shape.heads).sigmoid().to(dtype)]


def call_of(shape: Shape, given: list[Tensor], attention: Reference) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that goes on with the same tokens, and returns their results and the state."""
    exact = torch.promote_types(given[0].dtype, torch.float32)
    store = StateStore([StatePlan(0, 0, shape.state, float32=True)], 1, exact, DEVICE)
    tokens = NewTokens([slice(0, given[0].shape[1])], None)
    cache = SimpleNamespace(states=store, new_tokens=tokens, attention=[attention])
    scan, scale = shape.kind == "scan", shape.keys**-0.5

    def call() -> tuple[Tensor, Tensor]:
        if scan:
            out = recurrence.selective_scan(*given, cache, 0, 0)
        else:
            out = recurrence.gated_delta_rule(*given, scale, True, cache, 0, 0)
        return out, store.read(0, 0)

    return call


@torch.inference_mode()
def compare(name: str, shape: Shape, given: list[Tensor]) -> float:
    """Compare a prompt, and a token after it, with float64. Returns the seconds of the first call. Raises
    `WrongKernelError`."""
    start = time.perf_counter()
    call_of(shape, given, Library())()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    texts = [given, [x[:, -1:] if x.dim() > 2 else x for x in given]]
    for one in (Library(), REFERENCE):
        for text in texts:
            expected = call_of(shape, [x.double() for x in text], REFERENCE)()
            for what, found, right in zip(("result", "state"), call_of(shape, text, one)(), expected, strict=True):
                by = "the reference" if one is REFERENCE else "the library"
                gate.check(f"{name}: {what} by {by}", found, right, TOLERANCE[given[0].dtype])
    return first


@torch.inference_mode()
def milliseconds(call: Callable[[], object], what: str) -> float:
    """The median of calls; steps are replayed as a CUDA graph, as decoding does."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    if what == "step":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    times = []
    for _ in range(REPEATED[what == "prompt"]):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    main()
