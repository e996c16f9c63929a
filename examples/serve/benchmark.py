"""Tokens a second of one vLLM with three caches: the model's own dtype, fp8, and an artifact's packed pages.

    python examples/serve/benchmark.py out/demo --source HuggingFaceTB/SmolLM2-135M-Instruct

Every kind gets the same prompts, the same bytes of cache and the same settings, in a process of its own. Prompts are
random tokens, all different, and lie in the prefix cache before the clock starts, so that decoding alone is timed: the
time of `--new` tokens less that of one. What is decoded is checked first: as many tokens as were asked for, and for
each prompt the ones that it gives alone, up to where two tokens are as good as equal. Times of what fails the check are
not shown.

Writes DIR/serve.csv, serve.md and serve.svg: tokens a second against the sequences that decode together.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pmkvq_compiler.budget import read_budget

KINDS = {"plain": "auto", "fp8": "fp8", "artifact": "auto"}
"""`--kv-cache-dtype` of each kind."""

SAME = 0.05
"""Nats between the best token and the next, below which either may be chosen: sums are rounded in another order."""


def main(arguments: list[str] | None = None) -> None:
    options = read_arguments(arguments)
    rows = []
    for kind in options.kinds:
        asked = json.dumps([kind, {name: str(value) for name, value in vars(options).items()}])
        command = [sys.executable, __file__, "--measure", asked]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
        if done.returncode or not found:
            print(f"{kind}: vLLM ended with exit code {done.returncode}; its own words are above", file=sys.stderr)
        rows += found
    if not rows:
        raise SystemExit("nothing was measured")
    write(rows, options.output)


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", help="folder or hub id of the artifact")
    parser.add_argument("--source", required=True, help="folder or hub id of the model that it was compiled of")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--batches", default="1,8,32", help="sequences at once (default: %(default)s)")
    parser.add_argument("--memory", default="4GiB", help="bytes of the cache (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="the model's dtype in vLLM (default: %(default)s)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of plain, fp8 and artifact (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/serve"))
    options = parser.parse_args(arguments)
    options.kinds = options.kinds.split(",")
    if not {*options.kinds} <= {*KINDS}:
        parser.error(f"--kinds {','.join(options.kinds)} are not among {', '.join(KINDS)}")
    return options


def measure(kind: str, options: dict[str, str]) -> None:
    """Print a row for every batch size; what does not fit at once is left out."""
    from vllm import LLM, SamplingParams

    tokens, new, batches = int(options["tokens"]), int(options["new"]), sorted(map(int, options["batches"].split(",")))
    llm = LLM(
        model=options["artifact"] if kind == "artifact" else options["source"],
        kv_cache_dtype=KINDS[kind],
        kv_cache_memory_bytes=read_budget(options["memory"]).bytes(0),
        dtype=options["dtype"],
        tensor_parallel_size=int(options["tensor_parallel_size"]),
        max_model_len=tokens + new,
        max_num_seqs=batches[-1],
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        seed=0,
    )
    cache = llm.llm_engine.vllm_config.cache_config
    rng, vocabulary = random.Random(int(options["seed"])), llm.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": [rng.randrange(vocabulary) for _ in range(tokens)]} for _ in range(batches[-1])]

    def generated(count: int, some: list[Any]) -> tuple[float, list[Any]]:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=2)
        began = time.perf_counter()
        done = llm.generate(some, sampling, use_tqdm=False)
        return time.perf_counter() - began, [one.outputs[0] for one in done]

    alone = [generated(new, [prompt])[1][0] for prompt in prompts[:2]]
    for batch in batches:
        if batch > cache.kv_cache_max_concurrency:
            print(f"{kind}: {batch} sequences do not fit at once", file=sys.stderr)
            continue
        some = prompts[:batch]
        generated(new, some)  # fills the prefix cache, and compiles what is compiled when it is first used
        first, (whole, texts) = generated(1, some)[0], generated(new, some)
        if not all(len(text.token_ids) == new for text in texts) or not all(map(agree, texts, alone)):
            print(f"{kind}: {batch} sequences give other tokens together than alone", file=sys.stderr)
            continue
        seconds = (whole - first) / (new - 1)
        row = {"kind": kind, "sequences": batch, "tokens": tokens, "step_ms": 1000 * seconds}
        row |= {"tokens_per_second": batch / seconds, "cache_tokens": cache.kv_cache_size_tokens}
        print("ROW", json.dumps(row), flush=True)


def agree(one: Any, other: Any) -> bool:
    """Whether two texts are the same, or part where two tokens were as good as equal."""
    for a, b, choices in zip(one.token_ids, other.token_ids, other.logprobs, strict=True):
        if a != b:
            best, second = sorted((choice.logprob for choice in choices.values()), reverse=True)[:2]
            return best - second < SAME
    return True


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "serve.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    lines = ["| cache | sequences | ms a step | tokens/s | tokens of cache |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row['kind']} | {row['sequences']} | {row['step_ms']:.2f} | {row['tokens_per_second']:,.0f} | "
        f"{row['cache_tokens']:,} |"
        for row in rows
    ]
    (folder / "serve.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        axes.plot([row["sequences"] for row in own], [row["tokens_per_second"] for row in own], "o-", label=kind)
    axes.set(xlabel="sequences at once", ylabel="tokens a second", xscale="log", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "serve.svg")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*json.loads(sys.argv[2]))
    else:
        main()
