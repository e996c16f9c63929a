"""How long a new process takes until an artifact has answered: seconds to load it, and of each first generation.

    python examples/benchmarks/startup.py ARTIFACT                        # the second process finds compiled kernels
    python examples/benchmarks/startup.py ARTIFACT --one-by-one           # kernels are compiled at their first launch

Each process generates 16 tokens after a prompt of 512 random ones, first for one sequence, then for `--batch`. Triton's
cache of compiled kernels is an empty folder at first. `import` is the time until the runtime is imported. A third
process loads with `verify="manifest"`: against the second, it shows what the digests of the weights cost.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from typing import Any

PROMPT, NEW = 512, 16


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The seconds that each step takes in this process, and how many kernels Triton compiled or read before it."""
    began = time.perf_counter()
    import torch

    runtime = importlib.import_module("pmkvq_compiler.runtime.load")  # the package has a function of this name
    compiled, found = 0, 0
    if arguments.device != "cpu":
        import triton

        def note(*, cache_hit: bool, **others: Any) -> None:
            nonlocal compiled, found
            compiled, found = compiled + (not cache_hit), found + cache_hit

        triton.knobs.compilation.listener = note
    if arguments.one_by_one:
        vars(runtime)["first_kernels"] = lambda *others: nullcontext()
    row: dict[str, Any] = {"import": time.perf_counter() - began}

    def took(step: str, since: float) -> None:
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        row.update({step: time.perf_counter() - since, f"{step}: compiled": compiled, f"{step}: read": found})

    began = time.perf_counter()
    model = runtime.load(arguments.artifact, arguments.device, verify=arguments.verify)
    took("load", began)
    for batch in (1, arguments.batch):
        ids = torch.randint(3, model.vocab_size, (batch, PROMPT))
        began, first = time.perf_counter(), list[float]()

        def note_time(chosen: torch.Tensor, first: list[float] = first) -> None:
            chosen.tolist()  # waits for the device
            first.append(time.perf_counter())

        model.generate(ids, NEW, eos_token_id=(), streamer=note_time)
        row[f"first token, batch {batch}"] = first[0] - began
        took(f"{NEW} tokens, batch {batch}", began)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=8, help="sequences of the second generation (%(default)s)")
    parser.add_argument("--one-by-one", action="store_true", help="do not compile kernels while the model is loaded")
    parser.add_argument("--verify", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.verify is not None:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as cache:
        for process, verify in (("first", "digests"), ("second", "digests"), ("third", "manifest")):
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--verify", verify],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "TRITON_CACHE_DIR": cache},
            )
            row = json.loads(done.stdout.splitlines()[-1])
            steps = ", ".join(f"{step} {value:.4g}" for step, value in row.items())
            print(f'{process} process, verify="{verify}": {steps}', flush=True)


if __name__ == "__main__":
    main()
