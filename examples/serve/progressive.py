"""What precision that follows the pool is worth: one load in one pool, at 8 bits, progressively, and at final bits.

    python examples/serve/progressive.py                  # chains of the project's own reasoner, right or wrong
    python examples/serve/progressive.py --shapes 7b      # the shapes of Qwen2.5-7B and random weights

All requests come at once. The pool holds `--wide` of them at 8 bits, so vLLM lets the others wait, and preempts some
that it has let in too early. At the final bits it holds more, and a progressive server has these bits only once it
needs them. Every kind runs in a process of its own, in a vLLM of its own with the same bytes of cache. They start side
by side, and then serve the load one after another, three times each.

Before times are shown, what was written is checked. Chains at 8 bits are right, all but one in fifty. With random
weights there is nothing to be right: every request gets its tokens, all probabilities are numbers, and requests that
are alone in the pool continue progressively as they do at 8 bits, up to where two tokens are as good as equal.

A row says how many tokens a second all requests got and in how many steps, how often one was preempted, the mean bits
of a number in quantized pages over time, and how often pages of running requests were lowered. Then it says what share
of the time the books of tiers took: on the host in the scheduler and in the worker, a part of which is for lowering,
and on the device. vLLM schedules a step ahead, so what the host does costs nothing as long as it waits for the device
later; how long it waits is shown. All this is of the median of three runs. The device's share is found when the load
is served once more.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import decode_speed
import torch

ROOT = Path(__file__).resolve().parents[2]
REASONER = ROOT / "examples" / "reasoner"
sys.path.insert(0, str(ROOT))  # for `examples`

from examples.reasoner.problems import ledger, most_entries, token_ids  # noqa: E402

KINDS = ("8 bits", "progressive", "final bits")
PROGRESSIVE = {"pmkvq": {"progressive": True}}
ALONE = 2
"""Requests that are also served alone, for the check."""
SAME = 0.05
"""Nats between the best token and the next, below which either may be chosen: sums are rounded in another order."""
ASLEEP = 1_000_000
"""Cycles of the device, about half a millisecond."""
LOOK = 50
"""Steps after which the metrics are looked at again."""
RUNS = 3
"""How often each kind serves the load. One run takes two seconds, in which a busy machine shows."""
SHARES = ("scheduler", "worker", "lowering", "device")
"""What is known of the time that tiers take; lowering is a part of the first two."""


def main() -> None:
    options = read_arguments(sys.argv[1:])
    if options.measure:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or Path(temporary)
        make_artifacts(options)
        rows = serve_in_turn([*sys.argv[1:], "--folder", str(options.folder)], options)
    check(rows, options)
    if rows:
        show(rows)


def read_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--shapes", choices=decode_speed.SHAPES, help="random weights of these shapes, not the reasoner"
    )
    parser.add_argument("--sequences", type=int, default=64, help="requests (default: %(default)s)")
    parser.add_argument("--wide", type=int, help="of these fit the pool at 8 bits (default: half of them)")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of a prompt of random weights, or of a prompt "
                        "and its chain (default: %(default)s)")  # fmt: skip
    parser.add_argument("--new", type=int, default=1000, help="that random weights write (default: %(default)s)")
    parser.add_argument("--budget", default="2.75bits", help="of the reasoner's artifact (default: %(default)s)")
    parser.add_argument("--bits", type=int, nargs=2, default=(2, 2), metavar=("K", "V"), help="final bits of random "
                        "weights (default: 2 2)")  # fmt: skip
    parser.add_argument("--layers", type=int, default=28, help="of random weights (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="(default: %(default)s)")
    parser.add_argument("--utilization", type=float, default=0.25, help="of the device's memory that each vLLM wants "
                        "free (default: %(default)s)")  # fmt: skip
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--window", type=int, default=64, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="for artifacts, which are used again where they are (default: one "
                        "that is deleted)")  # fmt: skip
    options = parser.parse_args(arguments)
    options.wide = options.wide or options.sequences // 2
    options.kinds = [kind for kind in options.kinds.split(",") if kind]
    if not {*options.kinds} <= {*KINDS}:
        parser.error(f"--kinds {','.join(options.kinds)} are not among {', '.join(KINDS)}")
    return options


# ---- what is served ----


def make_artifacts(options: argparse.Namespace) -> None:
    """An artifact whose final bits are 8, and one of the final bits that are asked for."""
    folder = options.folder
    missing = [name for name in ("wide", "final") if not (folder / name / "pmkvq.json").is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    if options.shapes:
        for name in missing:
            bits = (8, 8) if name == "wide" else options.bits
            decode_speed.write_artifact(folder / name, argparse.Namespace(**{**vars(options), "bits": bits}))
        return
    rng = random.Random(2)
    texts = [[*itertools.chain(*ids)] for ids, _ in chains(rng, 8, 1000)]
    calibration = folder / "texts.jsonl"
    calibration.write_text("".join(json.dumps({"input_ids": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "pmkvq_compiler.cli", str(REASONER / "model"), "--max-len", "2048"]
    command += ["--calib", str(calibration), "--calib-samples", "8", "--calib-len", "900"]
    asked = {"wide": ["--recipe", "uniform", "--bits", "8", "--budget", "70%"], "final": ["--budget", options.budget]}
    for name in missing:
        done = subprocess.run([*command, *asked[name], "-o", str(folder / name)], stdout=sys.stderr, check=False)
        if done.returncode:
            sys.exit("the reasoner was not compiled; the compiler's own words are above")


def chains(rng: random.Random, count: int, tokens: int) -> list[tuple[tuple[list[int], list[int]], str]]:
    """Random problems of the reasoner: tokens of the prompt and of the right chain, and the chain."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(REASONER / "model")
    texts = [ledger(rng, most_entries(tokens)) for _ in range(count)]
    return [(token_ids(tokenizer, *text), text[1]) for text in texts]


def load(options: argparse.Namespace) -> list[tuple[list[int], int, list[int]]]:
    """For each request the tokens of its prompt, how many it asks for, and the right ones, if there are any."""
    rng = random.Random(7)
    if options.shapes:
        words = decode_speed.SHAPES[options.shapes]["vocab_size"]
        prompts = [[rng.randrange(10, words) for _ in range(options.tokens)] for _ in range(options.sequences)]
        return [(prompt, options.new, []) for prompt in prompts]
    return [(prompt, len(chain) + 4, chain) for (prompt, chain), _ in chains(rng, options.sequences, options.tokens)]


# ---- the processes ----


def serve_in_turn(arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """What `measure` finds of every kind. All start side by side; when all are ready, they serve in turn."""
    environment = {**decode_speed.SETTINGS, **os.environ}
    started = {
        kind: subprocess.Popen(
            [sys.executable, __file__, *arguments, "--measure", kind],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind in options.kinds
    }
    try:
        for kind, process in started.items():
            _read_until("READY", kind, process)
        rows = {}
        for kind, process in started.items():
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            rows[kind] = json.loads(_read_until("ROW ", kind, process))
        return rows
    finally:
        for process in started.values():
            process.kill()


def _read_until(mark: str, kind: str, process: subprocess.Popen[str]) -> str:
    """The rest of the line that begins with a mark; others are vLLM's own words."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(mark):
            return line.removeprefix(mark)
        sys.stderr.write(line)
    sys.exit(f"{kind}: vLLM ended with exit code {process.wait()}; its own words are above")


def measure(options: argparse.Namespace) -> None:
    """Start vLLM with one kind, say so, and serve the load once told to."""
    kind, requests = options.measure, load(options)
    longest = max(len(prompt) + new for prompt, new, _ in requests)
    llm = start(options, kind, longest)
    alone = [serve_alone(llm, *request[:2]) for request in requests[:ALONE]]
    serve(llm, [(prompt, 2, []) for prompt, *_ in requests])  # whatever is compiled when it is first used
    clocks = watch(kind)
    print("READY", flush=True)
    sys.stdin.readline()
    row = sorted((serve_timed(llm, requests, clocks) for _ in range(RUNS)), key=lambda run: run["seconds"])[RUNS // 2]
    if kind == "progressive" and torch.cuda.is_available():
        row["device"] = seconds_on_device(llm, requests) / row["seconds"]
    texts = row.pop("texts")
    right = sum(text[: len(chain)] == chain for text, (*_, chain) in zip(texts, requests, strict=True))
    row["right"] = "" if options.shapes else right
    row["whole"] = all(len(text) == new for text, (_, new, _) in zip(texts, requests, strict=True))
    print("ROW", json.dumps({**row, "alone": alone}), flush=True)


def start(options: argparse.Namespace, kind: str, longest: int) -> Any:
    from vllm import LLM

    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    captured = sorted({1, 2, 4, *range(8, options.sequences + 8, 8)})
    return LLM(
        model=str(options.folder / ("wide" if kind == "8 bits" else "final")),
        load_format="dummy" if options.shapes else "auto",
        skip_tokenizer_init=True,
        trust_remote_code=True,  # for kernels of an artifact that this script has made
        dtype=options.dtype,
        max_model_len=longest,
        max_num_seqs=options.sequences,
        max_num_batched_tokens=max(2048, longest),
        gpu_memory_utilization=options.utilization,
        kv_cache_memory_bytes=pool_bytes(options, longest),
        enable_prefix_caching=False,
        enforce_eager=options.eager,
        disable_log_stats=False,
        additional_config=PROGRESSIVE if kind == "progressive" else {},
        seed=0,
        **({} if options.eager else {"compilation_config": {**graphs, "cudagraph_capture_sizes": captured}}),
    )


def pool_bytes(options: argparse.Namespace, longest: int) -> int:
    """Bytes in which `--wide` requests fit at 8 bits while they decode, and one more is read."""
    from pmkvq_compiler import runtime
    from pmkvq_compiler.runtime.vllm.layout import paged_layers, pool_of

    plan = runtime.open_artifact(options.folder / "wide").manifest.plan
    layers = paged_layers(plan, getattr(torch, options.dtype).itemsize)
    return pool_of(layers, plan.max_len).bytes_needed(options.wide, longest, 0)


# ---- the load ----


def serve(llm: Any, requests: list[tuple[list[int], int, list[int]]]) -> dict[str, Any]:
    """Serve requests that come at once: texts, seconds, steps, and what the metrics say."""
    core, before = llm.llm_engine, metrics(llm)
    for number, (prompt, new, _) in enumerate(requests):
        core.add_request(str(number), {"prompt_token_ids": prompt}, sampling(new))
    texts: dict[int, list[int]] = {}
    bits, steps, begun = [], 0, time.perf_counter()
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                texts[int(output.request_id)] = list(output.outputs[0].token_ids)
        steps += 1
        if steps % LOOK == 0:
            bits.append(metrics(llm).get("vllm:pmkvq_bits", 0.0))
    seconds, after = time.perf_counter() - begun, metrics(llm)
    counted = {
        name: after.get(name, 0.0) - before.get(name, 0.0) for name in ("vllm:num_preemptions", "vllm:pmkvq_lowered")
    }
    return {
        "texts": [texts[number] for number in range(len(requests))],
        "seconds": seconds,
        "tokens": sum(map(len, texts.values())),
        "steps": steps,
        "preemptions": int(counted["vllm:num_preemptions"]),
        "lowered": int(counted["vllm:pmkvq_lowered"]),
        "bits": [round(one, 2) for one in bits if one],
    }


def serve_alone(llm: Any, prompt: list[int], new: int) -> list[tuple[int, float, float]]:
    """Of each token that continues a prompt alone: it, its log-probability, and by how much it beat the next one."""
    [done] = llm.generate([{"prompt_token_ids": prompt}], sampling(min(new, 100), logprobs=2), use_tqdm=False)
    found = []
    for token, choices in zip(done.outputs[0].token_ids, done.outputs[0].logprobs, strict=True):
        best, second = sorted((choice.logprob for choice in choices.values()), reverse=True)[:2]
        found.append((token, best, best - second))
    return found


def sampling(new: int, **more: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=new,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        **more,
    )


def serve_timed(llm: Any, requests: list[tuple[list[int], int, list[int]]], clocks: dict[str, Clock]) -> dict[str, Any]:
    """`serve`, and what share of its time each clock has counted."""
    for clock in clocks.values():
        clock.seconds = 0.0
    row = serve(llm, requests)
    return row | {name: clock.seconds / row["seconds"] for name, clock in clocks.items()}


def metrics(llm: Any) -> dict[str, float]:
    """vLLM's counters and gauges without further labels, by name."""
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if hasattr(metric, "value") and "tier" not in metric.labels
    }


class Clock:
    """The seconds that functions take on the host."""

    def __init__(self) -> None:
        self.seconds, self.running = 0.0, False

    def watch(self, owner: Any, name: str) -> None:
        """Time a method or a function of a module from now on; what it calls of them is a part of it."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return function(*args, **kwargs)
            self.running, begun = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begun
                self.running = False

        setattr(owner, name, timed)


def watch(kind: str) -> dict[str, Clock]:
    """Clocks of how long the host waits for the device from now on, and of what tiers cost it."""
    from vllm.v1.executor.uniproc_executor import AsyncOutputFuture

    clocks = {"waits": Clock()}
    clocks["waits"].watch(AsyncOutputFuture, "result")
    if kind == "progressive":
        from pmkvq_compiler.runtime.vllm import worker
        from pmkvq_compiler.runtime.vllm.backend import Store
        from pmkvq_compiler.runtime.vllm.scheduler import LendingPool, ProgressiveScheduler

        clocks |= {"scheduler": Clock(), "worker": Clock(), "lowering": Clock()}
        clocks["scheduler"].watch(ProgressiveScheduler, "_lend")
        clocks["scheduler"].watch(LendingPool, "_fall")
        clocks["worker"].watch(worker, "_note")
        clocks["lowering"].watch(LendingPool, "_fall")
        clocks["lowering"].watch(Store, "lower")
    return clocks


def seconds_on_device(llm: Any, requests: list[tuple[list[int], int, list[int]]]) -> float:
    """What tiers cost the device while the load is served once more. Before each change the device sleeps, so that the
    host is done with it when the device begins: otherwise it would be the host that is timed."""
    from pmkvq_compiler.runtime.vllm import worker

    note, pairs = worker._note, []

    def timed(*args: Any) -> None:
        torch.cuda._sleep(ASLEEP)
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        pairs[-1][0].record()
        note(*args)
        pairs[-1][1].record()

    worker._note = timed
    serve(llm, requests)
    torch.cuda.synchronize()
    return sum(first.elapsed_time(last) for first, last in pairs) / 1000


# ---- what is found ----


def check(rows: dict[str, Any], options: argparse.Namespace) -> None:
    """Raises `SystemExit` where what was written cannot be right."""
    for kind, row in rows.items():
        if not row["whole"]:
            sys.exit(f"{kind}: a request did not get all tokens that it asked for")
        if not all(-1e4 < best <= 0 and least >= 0 for text in row["alone"] for _, best, least in text):
            sys.exit(f"{kind}: a log-probability is no number")
    if not options.shapes and "8 bits" in rows and rows["8 bits"]["right"] < 0.98 * options.sequences:
        sys.exit(f"8 bits: {rows['8 bits']['right']} of {options.sequences} chains are right, which is too few")
    if {"8 bits", "progressive"} <= {*rows}:
        for one, other in zip(rows["8 bits"]["alone"], rows["progressive"]["alone"], strict=True):
            differing = next(((a, b) for a, b in zip(one, other, strict=True) if a[0] != b[0]), None)
            if differing is not None and differing[0][2] >= SAME:
                sys.exit(f"progressive: alone, token {differing[1][0]} follows where at 8 bits it is {differing[0][0]}")


def show(rows: dict[str, Any]) -> None:
    print(
        "| cache | tokens/s | steps | preemptions | mean bits | lowered | right | waits for the device | tiers' share |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for kind, row in rows.items():
        bits = sum(row["bits"]) / len(row["bits"]) if row["bits"] else 0.0
        parts = [f"{name} {row[name]:.2%}" for name in SHARES if name in row]
        print(
            f"| {kind} | {row['tokens'] / row['seconds']:,.0f} | {row['steps']:,} | {row['preemptions']} | "
            f"{f'{bits:.2f}' if bits else ''} | {row['lowered'] or ''} | {row['right']} | {row['waits']:.0%} | "
            f"{', '.join(parts)} |"
        )
    for kind, row in rows.items():
        if row["bits"]:
            print(f"{kind}: bits every {LOOK} steps: {' '.join(f'{one:g}' for one in row['bits'])}")
    if {"8 bits", "progressive"} <= {*rows}:
        first, second = (rows[kind]["tokens"] / rows[kind]["seconds"] for kind in ("progressive", "8 bits"))
        print(f"progressive serves {first / second:.2f} times the tokens a second of 8 bits")


if __name__ == "__main__":
    main()
