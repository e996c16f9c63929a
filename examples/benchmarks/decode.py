"""Decoding speed of an artifact against transformers with its default cache: same weights, dtype, threads and context.

    python examples/benchmarks/decode.py out/demo --model demo --context 2048

The two take turns, so that changes in the machine's speed affect both. The table shows medians over all steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from pmkvq_compiler import runtime
from pmkvq_compiler.source.source import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", help="folder that pmkvq-compile wrote")
    parser.add_argument("--model", required=True, help="the model that it was compiled from")
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache before the first timed step")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in each turn")
    parser.add_argument("--turns", type=int, default=8, help="turns of each contender")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    compiled = runtime.load(arguments.artifact)
    source = open_source(arguments.model).load_model("sdpa", dtype=compiled.dtype)
    context = torch.randint(compiled.vocab_size, (1, arguments.context))
    decoders = {
        "transformers, default cache": transformers_decoder(source, context),
        "artifact, progressive cache": artifact_decoder(compiled, context),
    }
    times: dict[str, list[float]] = {name: [] for name in decoders}
    with torch.inference_mode():
        for turn in range(arguments.turns + 1):
            for name, step in decoders.items():
                taken = timed(step, arguments.steps)
                if turn:  # the first is warm-up
                    times[name] += taken
    print_table(times, arguments.context)


def transformers_decoder(model: torch.nn.Module, context: Tensor) -> Callable[[Tensor], Tensor]:
    cache = DynamicCache()
    with torch.inference_mode():
        model(context, past_key_values=cache, logits_to_keep=1)
    return lambda token: model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]


def artifact_decoder(model: runtime.CompiledModel, context: Tensor) -> Callable[[Tensor], Tensor]:
    cache = model.new_cache()
    for chunk in context.split(512, dim=1):
        last = torch.tensor([0]), torch.tensor([chunk.shape[1] - 1])
        model(chunk, cache, only=last)
    widths = ", ".join(f"K {key} V {value}" for key, value in sorted(set(cache.bits), reverse=True))
    print(f"artifact at {context.shape[1]} tokens: {cache.bytes_used:,} bytes, widths {widths}")
    return lambda token: model(token, cache)[:, -1]


def timed(step: Callable[[Tensor], Tensor], count: int) -> list[float]:
    """Seconds of each of `count` greedy steps."""
    token, taken = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(count):
        start = time.perf_counter()
        token = step(token).argmax(-1, keepdim=True)
        taken.append(time.perf_counter() - start)
    return taken


def print_table(times: dict[str, list[float]], context: int) -> None:
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    baseline = next(iter(medians.values()))
    print(
        f"| decoding from {context} tokens, {torch.get_num_threads()} threads | ms a token | tokens a second | ratio |"
    )
    print("| --- | ---: | ---: | ---: |")
    for name, median in medians.items():
        print(f"| {name} | {median * 1e3:.1f} | {1 / median:.1f} | {baseline / median:.2f} |")


if __name__ == "__main__":
    main()
