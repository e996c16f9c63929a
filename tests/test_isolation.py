"""Whose code runs: that of the installation, whatever lies in the current folder, which may be the model's.

Every trap writes a file when it is imported.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.calibrate.layer_outputs import LayerOutputs
from pmkvq_compiler.children import isolated
from pmkvq_compiler.emit.check import check_artifact
from pmkvq_compiler.errors import CompileError, Defect
from pmkvq_compiler.failures import explain
from tests.conftest import CompileTiny
from tests.folders import tree

pytestmark = pytest.mark.usefixtures("real_checks")

TRAPS = ["torch", "json", "struct", "pickle", "multiprocessing", "safetensors", "sitecustomize_of_mine", "subprocess"]


@pytest.fixture
def traps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which modules lie that must not be imported."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in [*TRAPS, "pmkvq_compiler"]:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'caught')!r}, 'a').write({name!r})\n")
    monkeypatch.chdir(folder)
    return folder


def caught(folder: Path) -> str:
    file = folder.parent / "caught"
    return file.read_text() if file.exists() else ""


def reference(artifact: Path) -> tuple[torch.Tensor, torch.Tensor, LayerOutputs]:
    """A text, and what the artifact makes of it; its layers are not told apart."""
    ids = torch.arange(3, 67).unsqueeze(0)
    logits = runtime.load(artifact)(ids)[0, -8:]
    return ids, logits, LayerOutputs(torch.zeros(1, 1))


@pytest.mark.parametrize("path", [None, ":/nowhere"])
def test_the_check_imports_nothing_from_the_current_folder_and_writes_nothing_into_the_artifact(
    compile_tiny: CompileTiny, tmp_path: Path, traps: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    artifact = compile_tiny("llama", recipe="none")
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    expected = reference(artifact)
    before = tree(artifact)
    figures = check_artifact(artifact, tmp_path, "float32", {"cpu": 0}, *expected)
    assert figures["full_precision_error"] < 1e-5
    assert caught(traps) == ""
    assert tree(artifact) == before
    assert os.environ.get("PYTHONPATH") == path


def test_an_artifact_that_does_not_load_is_told_in_a_sentence(
    compile_tiny: CompileTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compile_tiny("llama", recipe="none")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(Defect, match=r"does not load in a fresh process \(.*is not an artifact.*\)$") as error:
        check_artifact(tmp_path, tmp_path, "float32", {"cpu": 0}, *reference(artifact))
    assert "\n" not in str(error.value)
    said, code = explain(error.value)
    (log,) = tmp_path.glob("pmkvq-compile-*.log")
    assert code == 1
    assert "is not an artifact" in said
    assert str(log) in said
    assert log.read_text().count("Traceback") == 2, "of this process and of the one that loaded the artifact"
    assert "emit/check.py" in log.read_text()


@pytest.mark.parametrize("signal", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_check_that_a_signal_ends_is_no_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: signal.Signals
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nkill -{int(signal)} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    ids, logits = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 8)
    with pytest.raises(CompileError, match=f"was ended by {signal.name}") as error:
        check_artifact(tmp_path, tmp_path, "float32", {"cpu": 0}, ids, logits, LayerOutputs(torch.zeros(1, 1)))
    assert not isinstance(error.value, Defect)


def test_workers_import_nothing_from_the_current_folder(traps: Path) -> None:
    with isolated(), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        path, bytecode = pool.submit(eval, "__import__('sys').path, __import__('sys').dont_write_bytecode").result()
    assert caught(traps) == ""
    assert str(traps) not in path
    assert "" not in path
    assert bytecode
    assert "PYTHONSAFEPATH" not in os.environ


def test_the_command_imports_nothing_from_the_current_folder(traps: Path) -> None:
    """But for a module called as the compiler itself, which `python -m` finds there before any code of ours runs."""
    (traps / "pmkvq_compiler.py").unlink()
    command = [sys.executable, "-m", "pmkvq_compiler.cli", ".", "--budget", "1GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has no config.json" in done.stderr
    assert caught(traps) == ""
