"""The artifact where it is to run: environments that hold what it needs, and neither the compiler nor anything else."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from pmkvq_compiler import runtime
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.runtime.load import file_digest

from .children import in_child
from .conftest import silent
from .environments import build_wheel, environment, install
from .folders import TEXT, model_folder, open_to_others, tree
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
    before = tree(artifact)
    wheel = build_wheel(artifact, folder)
    assert tree(artifact) == before, "a build leaves the artifact as it was"
    python = environment(folder / "venv", "torch", "safetensors", "tokenizers")
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
        env={**{name: os.environ[name] for name in ("HOME", "PATH")}, "HF_HUB_OFFLINE": "1", **variables},
        check=False,
    )


# ---- an artifact that is somewhere else ----


def copied(artifact: Path, place: Path) -> Path:
    """As `cp -r` copies: with the time of the copy, so that bytecode of the original would be out of date."""
    subprocess.run(["cp", "-r", artifact, place / "copy"], check=True)
    return place / "copy"


def moved(artifact: Path, place: Path) -> Path:
    return copied(artifact, place).rename(place / "moved, and renamed")


def zipped(artifact: Path, place: Path) -> Path:
    return Path(unpacked(shutil.make_archive(str(place / "file"), "zip", artifact), place / "unzipped"))


def archived(artifact: Path, place: Path) -> Path:
    return Path(unpacked(shutil.make_archive(str(place / "file"), "gztar", artifact), place / "untarred"))


def unpacked(archive: str, folder: Path) -> Path:
    shutil.unpack_archive(archive, folder)
    return folder


def used_before(artifact: Path, place: Path) -> Path:
    """With all the bytecode that loading it made where it was."""
    original = copied(artifact, place)
    in_child(partial(load_everyhow, original, place / "modules of the original"))
    assert list(original.rglob("*.pyc"))
    return Path(shutil.copytree(original, place / "used"))


def in_the_hubs_cache(artifact: Path, place: Path) -> Path:
    """As a download leaves it: links to blobs, in a folder named by commit."""
    repository = place / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    for path in filter(Path.is_file, artifact.rglob("*")):
        blob = repository / "blobs" / file_digest(path)
        link = snapshot / path.relative_to(artifact)
        for folder in (blob.parent, link.parent):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot


def of_another_user(artifact: Path, place: Path) -> Path:
    """Read-only, with other users allowed to read and nothing else."""
    folder = copied(artifact, place)
    for path in (*folder.rglob("*"), folder):
        assert path.stat().st_mode & 0o004, f"{path} is for its owner alone"
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


WAYS: list[Callable[[Path, Path], Path]] = [
    copied,
    moved,
    zipped,
    archived,
    used_before,
    in_the_hubs_cache,
    of_another_user,
]


def forget_modules() -> None:
    """Let the artifact's code be found anew, wherever its copies lie."""
    for name in [name for name in sys.modules if name.split(".")[0] in (PACKAGE, "transformers_modules")]:
        del sys.modules[name]


def load_everyhow(folder: Path, modules: Path) -> list[list[int]]:
    """The tokens that follow a prompt, from the runtime, from the package and from transformers, which copies code into
    the folder `modules`."""
    forget_modules()
    sys.path[:0] = [str(folder), str(modules)]
    dynamic_module_utils.HF_MODULES_CACHE = str(modules)
    ids = torch.arange(3, 33).unsqueeze(0)
    package: Any = importlib.import_module(PACKAGE)
    remote: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert package.load_tokenizer().decode(torch.arange(97, 100)) == "abc"
    return [
        runtime.load(folder).generate(ids, 8, eos_token_id=()).tolist()[0],
        package.load().generate(ids, 8, eos_token_id=()).tolist()[0],
        remote.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None).tolist()[0],
    ]


@pytest.fixture(scope="module")
def tokens(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What every way of loading the artifact generates. Afterwards all that it needs is imported, which other users
    may have no right to read here."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", "")
        ways = load_everyhow(copied(artifact, folder), folder / "modules")
    forget_modules()
    assert ways[0] == ways[1] == ways[2]
    return ways[0]


@pytest.mark.parametrize("way", WAYS)
def test_an_artifact_elsewhere_loads_twice_in_every_way(
    artifact: Path, tokens: list[int], tmp_path: Path, way: Callable[[Path, Path], Path]
) -> None:
    """Each time in a process of its own, which shares nothing with the first but what the first wrote."""
    open_to_others(tmp_path)
    place = way(artifact, tmp_path)
    modules = tmp_path / "modules"
    modules.mkdir()
    modules.chmod(0o777)
    before = {name for name in tree(place) if "__pycache__" not in name}
    for _ in range(2):
        assert in_child(partial(load_everyhow, place, modules), as_nobody=way is of_another_user) == [tokens] * 3
    assert {name for name in tree(place) if "__pycache__" not in name} == before
    assert bool(list(place.rglob("*.pyc"))) == (way is not of_another_user), "Python left its bytecode where it could"


def test_what_is_compiled_is_what_is_listed(artifact: Path) -> None:
    listed = {*json.loads((artifact / "pmkvq.json").read_text())["files"], "pmkvq.json", "README.md"}
    assert {name for name, content in tree(artifact).items() if content is not None} == listed
    assert not [name for name in listed if "__pycache__" in name or name.startswith(".")]


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
