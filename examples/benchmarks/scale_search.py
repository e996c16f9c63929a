"""The search for key scales: all candidates in one walk over the texts, against one walk for each candidate.

    python examples/benchmarks/scale_search.py --model demo

Both use the same figure of merit, the squared error of the attention's output, at the same queries of the same texts
(PM-KVQ evaluates its 20 exponents one after another, each by a run of the layer), and so must choose the same ones.
Prints the median seconds of each over the repetitions, and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, AttentionCall, observed, run
from pmkvq_compiler.calibrate.key_scales import GRID, ScaleSearch
from pmkvq_compiler.calibrate.texts import read_samples
from pmkvq_compiler.calibrate.walk import stretched_positions
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.problem import resolve
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.source.source import open_source

BITS, SINK, BLOCK = 2, 1, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="hub id, folder, .gguf file or `demo`")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="tokens a sample (%(default)s)")
    parser.add_argument("--effective-len", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()

    source = open_source(arguments.model, "auto")
    options = CompileOptions(
        arguments.model,
        Path(),
        budget="100%",
        calib_samples=arguments.samples,
        calib_len=arguments.length,
        recipe="pm-kvq",
    )
    program = capture(source.config)
    run_passes(program, [LocateAttention()])
    samples = read_samples(source, resolve(options, program.sites, arguments.effective_len, source.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = source.load_model(ATTENTION, device).requires_grad_(False)

    def walk(observe: Callable[[AttentionCall], None]) -> None:
        _walk(model, samples, arguments.effective_len, observe)

    maxima: dict[int, Tensor] = {}
    walk(lambda call: maxima.update({call.layer: call.key.abs().amax(dim=(0, 2)).float()}))
    at_once, one_by_one = [], []
    for _ in range(arguments.repetitions):
        start = time.perf_counter()
        ours = all_at_once(walk, maxima)
        at_once.append(time.perf_counter() - start)
        start = time.perf_counter()
        theirs = one_after_another(walk, maxima)
        one_by_one.append(time.perf_counter() - start)
    slow, fast = statistics.median(one_by_one), statistics.median(at_once)
    same = sum(ours[layer] == theirs[layer] for layer in maxima)
    print(f"{len(samples)} texts of {arguments.length:,} tokens, {len(maxima)} layers, {GRID + 1} candidates")
    print(f"one after another {slow:.1f} s, at once {fast:.1f} s, ratio {slow / fast:.1f}")
    print(f"the same exponent in {same} of {len(maxima)} layers")


def all_at_once(walk: Callable[[ScaleSearch], None], maxima: dict[int, Tensor]) -> dict[int, float]:
    """The exponent of each layer, as the compiler finds it."""
    search = ScaleSearch(maxima, BITS, SINK, BLOCK)
    walk(search)
    return search.best()[0]


def one_after_another(walk: Callable[[ScaleSearch], None], maxima: dict[int, Tensor]) -> dict[int, float]:
    """The same by a walk for each candidate."""
    errors = []
    for index in range(GRID + 1):
        search = ScaleSearch(maxima, BITS, SINK, BLOCK)
        search.candidates = {layer: scales[index : index + 1] for layer, scales in search.candidates.items()}
        search.errors = {layer: error[:1] for layer, error in search.errors.items()}
        walk(search)
        errors.append(search.errors)
    return {layer: int(torch.cat([error[layer] for error in errors]).argmin()) / GRID for layer in maxima}


@torch.no_grad()
def _walk(
    model: PreTrainedModel, samples: list[Tensor], effective_len: int, observe: Callable[[AttentionCall], None]
) -> None:
    with observed(observe):
        for sample in samples:
            positions = stretched_positions(len(sample), effective_len).to(model.device)
            run(model, sample.unsqueeze(0).to(model.device), positions)


if __name__ == "__main__":
    main()
