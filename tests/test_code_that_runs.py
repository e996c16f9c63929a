"""What of an artifact is run: the files that its manifest lists, from the text that has the digest there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import marshal
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.manifest import file_digest

PACKAGE = "tiny_qwen"
IDS = torch.arange(3, 43).unsqueeze(0)


@pytest.fixture
def original(chat_artifact: Path) -> Path:
    return chat_artifact


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that planted code makes when it runs."""
    return tmp_path / "planted-code-ran"


def payload(marker: Path) -> str:
    return f"open({str(marker)!r}, 'a').write(__name__ + chr(10))\n"


def plant_cache(source: Path, marker: Path, checked: bool) -> None:
    """A `.pyc` that Python takes for the compiled form of `source`."""
    code = marshal.dumps(compile(payload(marker), str(source), "exec"))
    stat = source.stat()
    stamp = int(stat.st_mtime).to_bytes(4, "little") + (stat.st_size & 0xFFFFFFFF).to_bytes(4, "little")
    header = bytes(4) + stamp if checked else (1).to_bytes(4, "little") + bytes(8)
    place = Path(importlib.util.cache_from_source(str(source)))
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(importlib.util.MAGIC_NUMBER + header + code)


def python(program: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does, in a shell that has set nothing."""
    places = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    command = [sys.executable, *arguments] if arguments else [sys.executable, "-c", program]
    environment = {**places, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


USE = f"""
import sys
sys.path.insert(0, ARTIFACT)
import {PACKAGE}
import torch
model = {PACKAGE}.load()
print(model.generate(torch.arange(3, 43).unsqueeze(0), 8, eos_token_id=()).tolist()[0][-8:])
tokenizer = {PACKAGE}.load_tokenizer()
print(tokenizer.encode_chat([{{"role": "user", "content": "Ahoy"}}]).shape[1])
import {PACKAGE}.chat, {PACKAGE}.plan, {PACKAGE}.model
"""


def expected(artifact: Path) -> str:
    out = runtime.load(artifact).generate(IDS, 8, eos_token_id=()).tolist()[0][-8:]
    return f"{out}\n{len('<user>Ahoy<assistant>')}\n"


def test_a_compiled_cache_beside_a_module_is_never_run(
    original: Path, copy: Path, marker: Path, tmp_path: Path
) -> None:
    """For every module but the package's `__init__.py`, which Python itself imports before anything of ours runs."""
    modules = [path for path in copy.rglob("*.py") if path != copy / PACKAGE / "__init__.py"]
    assert len(modules) > 15
    for number, path in enumerate(modules):
        plant_cache(path, marker, checked=number % 2 == 0)
    runtime.load(copy)
    done = python(USE.replace("ARTIFACT", repr(str(copy))), tmp_path)
    assert (done.returncode, done.stdout) == (0, expected(original)), done.stderr
    done = python("", copy, "-m", PACKAGE, "--prompt", "Ahoy", "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    assert not marker.exists(), marker.read_text()


def test_the_cache_of_the_package_itself_is_not_run_by_those_who_load_it(copy: Path, marker: Path) -> None:
    for path in copy.rglob("*.py"):
        plant_cache(path, marker, checked=False)
    runtime.load(copy)
    model = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert not marker.exists(), marker.read_text()


def test_kernels_are_compiled_from_what_is_listed(copy: Path, marker: Path, tmp_path: Path) -> None:
    """In Triton's interpreter, which reads the source of kernels as the compiler does."""
    pytest.importorskip("triton")
    for path in (copy / PACKAGE / "kernels").glob("*.py"):
        plant_cache(path, marker, checked=True)
    program = f"""
import torch
from pathlib import Path
from pmkvq_compiler import runtime
model = runtime.load({str(copy)!r}, backend="triton")
for path in (Path({str(copy)!r}) / {PACKAGE!r} / "kernels").glob("*.py"):
    path.write_text("raise SystemExit('read after it was compared')")
ids = torch.arange(3, 43).unsqueeze(0)
print(float((model(ids) - {{}}).norm()))
"""
    reference = tmp_path / "logits.pt"
    from safetensors.torch import save_file

    save_file({"logits": runtime.load(copy)(IDS)}, reference)
    program = program.format(f"__import__('safetensors.torch').torch.load_file({str(reference)!r})['logits']")
    done = python(program, Path(__file__).parent.parent, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-2
    assert not marker.exists()


UNLISTED = [
    f"{PACKAGE}/runtime/plan{importlib.machinery.EXTENSION_SUFFIXES[0]}",
    f"{PACKAGE}/model{importlib.machinery.EXTENSION_SUFFIXES[0]}",
    f"{PACKAGE}/runtime/plan/__init__.py",
    f"{PACKAGE}/text/__init__.py",
    f"{PACKAGE}/torch.py",
    f"{PACKAGE}/kernels/__init__.py",
    f"{PACKAGE}/regenerate.py",
    f"{PACKAGE}/__init__/__init__.py",
    "torch.py",
    "json.py",
    "hashlib.py",
    "safetensors/__init__.py",
    "jinja2.py",
    "tokenizers.py",
    "sitecustomize.py",
    "usercustomize.py",
    f"{PACKAGE}.py",
]


def test_files_that_are_not_listed_are_not_imported(original: Path, copy: Path, marker: Path, tmp_path: Path) -> None:
    for name in UNLISTED:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(payload(marker))
    program = f"{USE.replace('ARTIFACT', repr(str(copy)))}\nimport {PACKAGE}.regenerate"
    done = python(program, tmp_path)
    assert done.stdout == expected(original), done.stderr
    assert f"{PACKAGE}.regenerate is not a module that pmkvq.json lists" in done.stderr
    done = python("", copy, "-m", PACKAGE, "--prompt", "Ahoy", "--max-new-tokens", "2")
    assert done.returncode == 0, done.stderr
    runtime.load(copy)
    AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    assert not marker.exists(), marker.read_text()


def test_an_artifact_that_python_has_imported_from_loads_again(original: Path, copy: Path, tmp_path: Path) -> None:
    """Python makes `__pycache__`, a user compiles the folder: neither is an error, and neither is looked at."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", copy / PACKAGE], check=True)
    moved = Path(shutil.copytree(copy, tmp_path / "moved"))
    runtime.load(moved)
    assert python(USE.replace("ARTIFACT", repr(str(moved))), tmp_path).stdout == expected(original)
    runtime.load(moved)
    assert (moved / PACKAGE / "__pycache__").is_dir()


@pytest.mark.parametrize("name", ["model.py", "plan.py", "runtime/load.py", "text.py", "__init__.py"])
def test_a_changed_module_is_not_run(copy: Path, marker: Path, name: str) -> None:
    path = copy / PACKAGE / name
    path.write_text(payload(marker) + path.read_text())
    with pytest.raises(runtime.ArtifactError, match=f"{name} was changed after the compile"):
        runtime.load(copy)
    with pytest.raises(Exception, match=f"{name} was changed after the compile"):
        AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    if name in ("runtime/load.py", "text.py"):
        wrong = "was changed after the compile"
        if name == "text.py":
            path.unlink()
            wrong = "is missing"
        done = python("", copy, "-m", PACKAGE, "--prompt", "Ahoy")
        assert done.returncode == 1
        assert done.stderr.startswith(f"{PACKAGE}: ")
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"{name} {wrong}" in done.stderr
    assert not marker.exists(), marker.read_text()


def test_every_file_that_is_used_is_listed(original: Path, tmp_path: Path) -> None:
    """An artifact that holds nothing but the files of its manifest does everything; without one of them it says so."""
    manifest = json.loads((original / "pmkvq.json").read_text())
    bare = tmp_path / "bare"
    for name in ("pmkvq.json", *manifest["files"]):
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original / name, bare / name)
    assert python(USE.replace("ARTIFACT", repr(str(bare))), tmp_path).stdout == expected(original)
    AutoModelForCausalLM.from_pretrained(bare, trust_remote_code=True)
    needed = ("model.py", "plan.py", "kernels/tuning.json", "constants.safetensors")
    for name in ("model.safetensors", "generation_config.json", *(f"{PACKAGE}/{name}" for name in needed)):
        unlisted = {one: digest for one, digest in manifest["files"].items() if one != name}
        rewrite(bare, files=unlisted)
        with pytest.raises(runtime.ArtifactError, match=r"is not listed|without its digest"):
            runtime.load(bare)
    rewrite(bare, files={one: digest for one, digest in manifest["files"].items() if one != "tokenizer.json"})
    done = python(USE.replace("ARTIFACT", repr(str(bare))), tmp_path)
    assert "has no tokenizer.json; pass token ids to generate" in done.stderr


@pytest.mark.parametrize("files", [{}, None, [], {"../elsewhere": "0" * 64}])
def test_a_manifest_that_lists_nothing_is_refused(copy: Path, marker: Path, tmp_path: Path, files: Any) -> None:
    manifest = json.loads((copy / "pmkvq.json").read_text())
    (copy / "pmkvq.json").write_text(json.dumps({**manifest, "files": files}))
    for path in copy.rglob("*.py"):
        if path.name != "__init__.py" or path.parent.name != PACKAGE:
            path.write_text(payload(marker))
    with pytest.raises(runtime.ArtifactError):
        runtime.load(copy)
    if not isinstance(files, list):
        done = python("", copy, "-m", PACKAGE, "--prompt", "Ahoy")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
    assert not marker.exists(), marker.read_text()


def rewrite(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / "pmkvq.json").read_text())
    (folder / "pmkvq.json").write_text(json.dumps({**manifest, **changes}))


PLACES = [
    "../elsewhere",
    "/etc",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "C:evil",
    "tiny_qwen/../tiny_qwen",
    "TINY_QWEN",
    "tiny qwen",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_package_elsewhere_is_refused(copy: Path, marker: Path, place: str) -> None:
    shutil.copytree(copy / PACKAGE, copy.parent / "elsewhere")
    for path in (copy.parent / "elsewhere").rglob("*.py"):
        path.write_text(payload(marker))
    files = json.loads((copy / "pmkvq.json").read_text())["files"]
    moved = {name.replace(PACKAGE, place, 1): digest for name, digest in files.items()}
    for listed in (files, moved):
        rewrite(copy, package=place, files=listed)
        with pytest.raises(runtime.ArtifactError, match=r"pmkvq\.json"):
            runtime.load(copy)
        with pytest.raises((ValueError, runtime.ArtifactError)):
            AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    assert not marker.exists(), marker.read_text()


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/tmp/outside.safetensors", "./model.safetensors", "a//b", "x\0"]
)
def test_weights_elsewhere_are_refused(copy: Path, place: str) -> None:
    shutil.copy(copy / "model.safetensors", copy.parent / "outside.safetensors")
    manifest = json.loads((copy / "pmkvq.json").read_text())
    files = {**manifest["files"], place: file_digest(copy / "model.safetensors")}
    tensors = {**manifest["tensors"], place: manifest["tensors"].pop("model.safetensors")}
    rewrite(copy, weights=[place], files=files, tensors=tensors)
    with pytest.raises(runtime.ArtifactError, match=r"not a path inside the artifact|must list files beside it"):
        runtime.load(copy)


def test_links_to_files_load_where_the_content_is_what_is_listed(original: Path, tmp_path: Path) -> None:
    """As in the hub's cache, whose files are links to `../../blobs`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    for path in filter(Path.is_file, original.rglob("*")):
        link = snapshot / path.relative_to(original)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / file_digest(path)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert python(USE.replace("ARTIFACT", repr(str(snapshot))), tmp_path).stdout == expected(original)
    runtime.load(snapshot)
    (blobs / "other").write_text("raise SystemExit")
    (snapshot / PACKAGE / "model.py").unlink()
    (snapshot / PACKAGE / "model.py").symlink_to(blobs / "other")
    with pytest.raises(runtime.ArtifactError, match=r"model\.py was changed"):
        runtime.load(snapshot)
    (snapshot / PACKAGE / "model.py").unlink()
    os.mkfifo(snapshot / PACKAGE / "model.py")
    with pytest.raises(runtime.ArtifactError, match=r"model\.py is missing"):
        runtime.load(snapshot)
