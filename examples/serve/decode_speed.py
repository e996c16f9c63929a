"""Tokens a second of one vLLM at long context, with three caches: packed pages, bfloat16, and fp8.

    python examples/serve/decode_speed.py --batches 1,8,32

The model has the shapes of Qwen2.5-7B and random weights, so nothing is downloaded or calibrated: what is timed depends
on shapes alone. The plan is the same for every layer. Prompts are `--tokens` long; they begin in `--prefixes` ways,
which lie in the prefix cache when the clock starts, and are dealt out in turn, so that neighbours in a batch share
nothing in the second-level cache. Every kind runs in a process of its own. A row is the median over `--rounds` of (the
time of `--new` tokens less that of two). The largest batch is as many prompts as fit the cache without sharing.

Before the clock starts each batch is checked: prompts that are equal have equal continuations, and every probability
is a number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
KINDS = {"packed": "auto", "bf16": "auto", "fp8": "fp8"}
"""`--kv-cache-dtype` of each kind."""

PACKAGE = "qwen_shapes"
SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
    },
    "tiny": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "vocab_size": 512,
    },
}
"""Those of Qwen2.5-7B, and some to try this script with."""


def main() -> None:
    options = read_arguments(sys.argv[1:])
    if options.measure:
        (options.folder / "found.json").write_text(json.dumps(measure(options)))
        return
    found = {}
    for kind, one in timed(sys.argv[1:]):
        found[kind] = one
        show(kind, one)
    compare(found)


def timed(arguments: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The kinds that the command line `arguments` ask for, and what `measure` finds of each."""
    options = read_arguments(arguments)
    kinds = options.kinds.split(",")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "bf16", options)
        if "packed" in kinds:
            write_artifact(Path(folder) / "packed", options)
        for kind in kinds:
            command = [sys.executable, __file__, *arguments, "--measure", kind, "--folder", folder]
            done = subprocess.run(command, env={**SETTINGS, **os.environ}, stdout=sys.stderr, check=False)
            if done.returncode:
                sys.exit(f"{kind}: vLLM ended with exit code {done.returncode}; its own words are above")
            yield kind, json.loads((Path(folder) / "found.json").read_text())


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", default="1,8,32", help="sequences at once (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32001, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=66, help="tokens that are decoded (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="times that a batch is timed (default: %(default)s)")
    parser.add_argument("--prefixes", type=int, default=8, help="ways in which prompts begin (default: %(default)s)")
    parser.add_argument("--shapes", default="7b", choices=SHAPES, help="of the model (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=28, help="layers of the model (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs=2, default=(2, 2), metavar=("K", "V"), help="(default: 2 2)")
    parser.add_argument("--window", type=int, default=64, help="tokens kept as they are (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of packed, bf16 and fp8 (default: all)")
    parser.add_argument("--largest", type=int, default=512, help="sequences at once at most (default: %(default)s)")
    parser.add_argument("--utilization", type=float, default=0.9, help="of the device's memory (default: %(default)s)")
    parser.add_argument(
        "--memory", type=int, help="bytes of the cache, rather than what is left of the device's memory"
    )
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs and torch.compile")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def write_model(folder: Path, options: argparse.Namespace) -> Any:
    """The model's configuration, which is all that vLLM needs for random weights."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        **SHAPES[options.shapes],
        num_hidden_layers=options.layers,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    return config


def write_artifact(folder: Path, options: argparse.Namespace) -> None:
    """What vLLM needs of an artifact: configuration, manifest, plan and kernels."""
    from pmkvq_compiler.emit.artifact import save_tensors, write_manifest
    from pmkvq_compiler.emit.kernel_source import kernel_files
    from pmkvq_compiler.passes.base import run_passes
    from pmkvq_compiler.passes.locate_attention import LocateAttention
    from pmkvq_compiler.source.capture import capture

    config = write_model(folder, options)
    program = capture(config)
    run_passes(program, [LocateAttention()])
    plan = made_plan(options)
    package = folder / PACKAGE
    (package / "kernels").mkdir(parents=True)
    for name, text in kernel_files(program.sites, plan.layers).items():
        (package / "kernels" / name).write_text(text)
    tensors = {"model.safetensors": folder / "model.safetensors"}
    tensors[f"{PACKAGE}/constants.safetensors"] = package / "constants.safetensors"
    for name, path in tensors.items():
        save_tensors({f"{Path(name).stem}.nothing": torch.zeros(1)}, path)
    content = {
        "package": PACKAGE,
        "weights": ["model.safetensors"],
        "vocab_size": config.vocab_size,
        "plan": plan.to_json(),
        "key_rotations": [],
        "tensors": {name: {f"{Path(name).stem}.nothing": "F32 [1]"} for name in tensors},
        "options": {},
        "fingerprints": {},
    }
    write_manifest(folder, content, [path for path in folder.rglob("*") if path.is_file()])


def made_plan(options: argparse.Namespace) -> Any:
    """Keys by channel, blocks of 64 tokens, no tokens of the beginning kept but four."""
    from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, sequence_bytes

    bits, shapes = tuple(options.bits), SHAPES[options.shapes]
    channels = shapes["hidden_size"] // shapes["num_attention_heads"]
    layer = LayerPlan(
        num_key_value_heads=shapes["num_key_value_heads"],
        key_head_dim=channels,
        value_head_dim=channels,
        key_bits=bits[0],
        value_bits=bits[1],
        key_axis="channel",
        sink=4,
        window=options.window,
        block=64,
        sliding_window=None,
        stages=(bits,),
        arena_bytes=0,
    )
    length = options.tokens + options.new
    layer = dataclasses.replace(layer, arena_bytes=sequence_bytes(layer, length, 2))
    return CachePlan("uniform", options.layers * layer.arena_bytes, length, 1, "bfloat16", (layer,) * options.layers)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Capacity of the cache in tokens, and milliseconds a step for every batch size that fits."""
    from vllm import LLM

    asked = sorted(map(int, options.batches.split(",")))
    length = options.tokens + options.new
    captured = {*asked, *range(64, options.largest + 1, 64)}
    steps: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": sorted(captured)}}
    begun = time.monotonic()
    llm = LLM(
        model=str(options.folder / ("packed" if options.measure == "packed" else "bf16")),
        kv_cache_dtype=KINDS[options.measure],
        load_format="dummy",
        skip_tokenizer_init=True,
        trust_remote_code=True,  # for kernels of an artifact that no compile has made
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=options.largest,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=options.utilization,
        kv_cache_memory_bytes=options.memory,
        enable_prefix_caching=True,
        enforce_eager=options.eager,
        seed=0,
        **({} if options.eager else steps),
    )
    started = time.monotonic() - begun
    cache = llm.llm_engine.vllm_config.cache_config
    tokens = cache.kv_cache_size_tokens
    largest = min(options.largest, tokens // length)
    batches = sorted({batch for batch in asked if batch <= largest} | {largest})
    prompts = made_prompts(options, largest)
    begun = time.monotonic()
    generate(llm, prompts[: options.prefixes], 1)  # into the prefix cache
    prefill = time.monotonic() - begun
    rows = {}
    for batch in batches:
        rows[batch] = time_batch(llm, prompts[:batch], options)
        print(f"{options.measure}, batch {batch}: {rows[batch]:.2f} ms", file=sys.stderr, flush=True)
    return {"tokens": tokens, "rows": rows, "started": started, "prefill": prefill}


def made_prompts(options: argparse.Namespace, count: int) -> list[list[int]]:
    """The prefixes in turn."""
    made = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[options.shapes]["vocab_size"]
    prefixes = torch.randint(10, vocabulary, (options.prefixes, options.tokens), generator=made).tolist()
    return [prefixes[number % options.prefixes] for number in range(count)]


def time_batch(llm: Any, prompts: list[list[int]], options: argparse.Namespace) -> float:
    """Milliseconds a step."""
    check(generate(llm, prompts, 4, logprobs=1), options.prefixes)
    times = []
    for _ in range(options.rounds):
        taken = {}
        for new in (2, options.new):
            begun = time.perf_counter()
            generate(llm, prompts, new)  # tokens are on the host when it returns
            taken[new] = time.perf_counter() - begun
        times.append(1000 * (taken[options.new] - taken[2]) / (options.new - 2))
    return statistics.median(times)


def generate(llm: Any, prompts: list[list[int]], new: int, logprobs: int | None = None) -> list[Any]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=logprobs)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [one.outputs[0] for one in done]


def check(outputs: list[Any], prefixes: int) -> None:
    """Raises `SystemExit` where outputs cannot be right."""
    for number, output in enumerate(outputs):
        first = outputs[number % prefixes]
        probabilities = [one.logprob for step in output.logprobs for one in step.values()]
        if len(output.token_ids) != 4 or not all(-1e4 < one <= 0 for one in probabilities):
            raise SystemExit(f"sequence {number} has tokens {output.token_ids} of log-probabilities {probabilities}")
        differ = abs(probabilities[0] - next(iter(first.logprobs[0].values())).logprob)
        if output.token_ids[0] != first.token_ids[0] and differ > 0.05:
            raise SystemExit(f"equal prompts {number % prefixes} and {number} are continued in different ways")


def show(kind: str, found: dict[str, Any]) -> None:
    print(f"{kind}: {found['tokens']:,} tokens of cache; started in {found['started']:.0f} s, prompts took "
          f"{found['prefill']:.1f} s")  # fmt: skip
    for batch, step in found["rows"].items():
        print(f"  batch {batch:>4}: {step:7.2f} ms a step, {1000 * int(batch) / step:7.0f} tokens/s", flush=True)


def compare(found: dict[str, Any]) -> None:
    """What packed pages are to the other kinds."""
    if "packed" not in found:
        return
    packed = found["packed"]["rows"]
    best = {kind: max(1000 * int(batch) / step for batch, step in one["rows"].items()) for kind, one in found.items()}
    for kind, one in found.items():
        if kind != "packed":
            steps = [
                f"batch {batch} {packed[batch] / step:.3f}" for batch, step in one["rows"].items() if batch in packed
            ]
            print(
                f"packed to {kind}: {best['packed'] / best[kind]:.2f} times the tokens/s; "
                f"a step takes {', '.join(steps)} times as long"
            )


if __name__ == "__main__":
    main()
