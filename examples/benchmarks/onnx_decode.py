"""Decoding speed in onnxruntime: an artifact's packed cache against a plain float cache of the same model.

    pmkvq-compile demo --budget 22MiB --max-len 4096 --onnx -o out/demo
    pmkvq-compile demo --recipe none --max-len 4096 --onnx -o out/plain
    python examples/benchmarks/onnx_decode.py out/demo out/plain --context 2048

The two take turns of 64 steps, so that changes in the machine's speed affect both. The table shows medians over turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "onnx"))
from onnx_generate import OnnxDecoder

CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder that pmkvq-compile --onnx wrote")
    parser.add_argument("plain", type=Path, help="the same model's folder, compiled with --recipe none --onnx")
    parser.add_argument("--context", type=int, default=2048, help="tokens in the cache before the first timed step")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded in each turn")
    parser.add_argument("--turns", type=int, default=5, help="turns of each artifact")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    folders = {"plain float cache": arguments.plain, "packed cache": arguments.artifact}
    decoders = {name: OnnxDecoder(path / "model.onnx", threads=arguments.threads) for name, path in folders.items()}
    vocab_size = decoders["packed cache"].session.get_outputs()[0].shape[-1]
    context = np.random.default_rng(0).integers(vocab_size, size=(1, arguments.context))
    for decoder in decoders.values():
        for start in range(0, arguments.context, CHUNK):
            decoder(context[:, start : start + CHUNK])
    held = {name: decoder.cache_bytes for name, decoder in decoders.items()}
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for turn in range(arguments.turns + 1):
        for name, decoder in decoders.items():
            taken = timed(decoder, arguments.steps)
            if turn:  # the first is warm-up
                times[name].append(taken)
    print_table(times, held, arguments)


def timed(decoder: OnnxDecoder, steps: int) -> float:
    """Seconds of so many greedy steps."""
    token, start = np.zeros((1, 1), dtype=np.int64), time.perf_counter()
    for _ in range(steps):
        token = decoder(token)[:, -1:].argmax(-1)
    return time.perf_counter() - start


def print_table(times: dict[str, list[float]], held: dict[str, int], arguments: argparse.Namespace) -> None:
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    baseline = next(iter(medians.values()))
    print(
        f"| {arguments.steps} steps from {arguments.context} tokens, {arguments.threads} threads "
        f"| cache, bytes | seconds | ratio |"
    )
    print("| --- | ---: | ---: | ---: |")
    for name, median in medians.items():
        print(f"| {name} | {held[name]:,} | {median:.2f} | {median / baseline:.2f} |")


if __name__ == "__main__":
    main()
