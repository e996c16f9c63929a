"""The artifact where it is to run: environments that hold what it needs, and neither the compiler nor anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pmkvq_compiler import runtime
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions

from .conftest import silent
from .environments import environment, install
from .folders import TEXT, model_folder
from .test_huggingface import CHAT_TEMPLATE

PACKAGE = "tiny_qwen"
PROMPT = TEXT[:270]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployment")
    source = model_folder(folder / "tiny-qwen", "qwen2")
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "calib.txt").write_text(TEXT)
    options: dict[str, Any] = {"calib": str(folder / "calib.txt"), "calib_samples": 2, "calib_len": 128, "block": 32}
    output = folder / "artifact"
    compile_model(CompileOptions(str(source), output, budget="50%", max_len=300, window=32, **options), silent)
    return output


@pytest.fixture(scope="module")
def bare(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the artifact's wheel and what that asks for."""
    pytest.importorskip("hatchling", reason="builds the artifact's wheel")
    folder = tmp_path_factory.mktemp("bare")
    before = sorted(artifact.rglob("*"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, artifact]
    subprocess.run(build, check=True, capture_output=True)
    assert sorted(artifact.rglob("*")) == before, "a build leaves the artifact as it was"
    python = environment(folder / "venv", "torch", "safetensors", "tokenizers")
    (wheel,) = folder.glob("*.whl")
    install(python, wheel)
    return python


def run(python: Path, *arguments: str, stdin: str = "", **variables: str) -> str:
    """What a command prints that succeeds."""
    done = ask(python, *arguments, stdin=stdin, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(python: Path, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """A command, run with no way to import anything from here."""
    return subprocess.run(
        [python, "-W", "ignore", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=python.parent,
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
        check=False,
    )


def encode(artifact: Path, text: str) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(artifact)(text, return_tensors="pt").input_ids


def expected_tokens(artifact: Path) -> list[int]:
    ids = encode(artifact, PROMPT)
    model = runtime.load(artifact)
    cache = model.new_cache()
    tokens: list[int] = model.generate(ids, NEW_TOKENS, eos_token_id=(), cache=cache)[0].tolist()
    assert max(bits for pair in cache.bits for bits in pair) < 16
    return tokens


def test_the_wheel_generates_the_tokens_of_the_artifact(artifact: Path, bare: Path) -> None:
    program = f"""
import importlib.util, json, torch, {PACKAGE}
for other in ("transformers", "pmkvq_compiler", "accelerate", "pytest", "pulp"):
    assert importlib.util.find_spec(other) is None, other
ids = {PACKAGE}.load_tokenizer().encode({PROMPT!r})
print(json.dumps({PACKAGE}.load().generate(ids, {NEW_TOKENS}, eos_token_id=())[0].tolist()))
"""
    assert json.loads(run(bare, "-c", program)) == expected_tokens(artifact)


def test_the_wheel_notices_damage(artifact: Path, bare: Path) -> None:
    (site,) = (bare.parent.parent / "lib").glob("python*/site-packages")
    code = site / PACKAGE / "runtime" / "quantize.py"
    original = code.read_text()
    code.write_text(original + "\n")
    program = f"""
import {PACKAGE}
try:
    {PACKAGE}.load()
except {PACKAGE}.runtime.ArtifactError as error:
    print(error)
"""
    try:
        assert "quantize.py was changed after the compile" in run(bare, "-c", program)
    finally:
        code.write_text(original)


def test_the_terminal_answers_and_chats(artifact: Path, bare: Path) -> None:
    model, tokenizer = runtime.load(artifact), AutoTokenizer.from_pretrained(artifact)

    def reply(text: str, count: int) -> str:
        ids = encode(artifact, text)
        return tokenizer.decode(model.generate(ids, count)[0, ids.shape[1] :], skip_special_tokens=True)

    once = run(bare, "-m", PACKAGE, "--prompt", PROMPT, "--raw", "--max-new-tokens", "20")
    assert once == reply(PROMPT, 20) + "\n"
    said = reply("<user>Ahoy\n<assistant>", 8)
    answer = run(bare, "-m", PACKAGE, "--prompt", "Ahoy", "--max-new-tokens", "8")
    assert answer == said + "\n"
    turns = run(bare, "-m", PACKAGE, "--max-new-tokens", "8", stdin="Ahoy\n/reset\nAhoy\nAgain\n/quit\n")
    assert turns.startswith(f"> {said}\n> > {said}\n> "), "what was reset is forgotten"
    assert turns.endswith("\n> ")


def test_the_terminal_complains_in_one_sentence(bare: Path) -> None:
    for option, value, complaint in (
        ("--device", "cuda:99", 'device "cuda:99" cannot be used'),
        ("--dtype", "int3", "dtype 'int3' is not one of"),
        ("--max-new-tokens", "-3", "max_new_tokens -3 generates nothing"),
        ("--temperature", "-1", "temperature -1.0 is not above 0"),
    ):
        done = ask(bare, "-m", PACKAGE, "--prompt", "Ahoy", option, value)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith(f"{PACKAGE}: {complaint}")
        assert done.stderr.count("\n") == 1


def test_transformers_runs_the_artifact_without_the_compiler(artifact: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", "torch", "transformers")
    program = f"""
import importlib.util, json, torch
assert importlib.util.find_spec("pmkvq_compiler") is None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(artifact)!r})
model = AutoModelForCausalLM.from_pretrained({str(artifact)!r}, trust_remote_code=True)
ids = tokenizer({PROMPT!r}, return_tensors="pt")
print(json.dumps(model.generate(**ids, max_new_tokens={NEW_TOKENS}, do_sample=False, eos_token_id=None)[0].tolist()))
"""
    out = run(python, "-c", program, HF_HOME=str(tmp_path / "huggingface"))
    assert json.loads(out) == expected_tokens(artifact)
