"""Whatever ends a command, it says one sentence; what is the program's own fault keeps its traceback in a file."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pulp
import pytest
import torch

from pmkvq_compiler import cli
from pmkvq_compiler.errors import CompileError, Defect, UsageError
from pmkvq_compiler.passes.base import PostconditionError
from tests.folders import model_folder

COMMAND = ["model", "--budget", "1GiB"]


def said(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[str, int]:
    """The one line that the command says, and its exit code, when a compile ends with `error`."""

    def fail(options: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_compile", fail)
    code = cli.main(COMMAND)
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("pmkvq-compile: ")
    return line, code


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (UsageError("too many apples"), "too many apples", 2),
        (CompileError("no apples"), "no apples", 1),
        (OSError(errno.ENOSPC, "No space left on device", "out/x"), "no room left to write .*out/x.* free some", 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no room left to write", 1),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open .*ulimit", 1),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "Permission denied: 'out'; check that", 1),
        (MemoryError(), "not enough memory", 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "not enough memory .* 2 GiB", 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "not enough memory", 1),
    ],
)
def test_what_the_user_or_the_machine_did_is_one_sentence_without_a_traceback(
    error: BaseException,
    words: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line, returned = said(error, monkeypatch, capsys)
    assert re.search(words, line)
    assert returned == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        *(Defect("the figures do not add up"), PostconditionError("Fold left an invalid program")),
        *(KeyError("x"), IndexError(), AssertionError("a\nb"), RecursionError("deep"), ZeroDivisionError(), OSError()),
        *(
            RuntimeError("size mismatch\nsecond line"),
            NotImplementedError(),
            UnicodeDecodeError("utf-8", b"", 0, 1, "x"),
        ),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_defect_says_so_and_names_the_file_with_the_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    line, code = said(error, monkeypatch, capsys)
    assert code == 1
    assert f"this is a defect of pmkvq-compile ({type(error).__name__}" in line
    (log,) = tmp_path.iterdir()
    assert line.endswith(f"in {log}")
    assert "Traceback" in log.read_text()
    assert type(error).__name__ in log.read_text()


def test_a_defect_shows_its_traceback_where_no_file_can_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))

    def fail(options: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(cli, "_compile", fail)
    assert cli.main(COMMAND) == 1
    *traceback, line = capsys.readouterr().err.splitlines()
    assert traceback[0].startswith("Traceback")
    assert line.endswith("which is above")


def test_a_solver_that_does_not_run_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise pulp.PulpSolverError("cbc died")

    monkeypatch.setattr(pulp.LpProblem, "solve", fail)
    small = ["--max-len", "256", "--window", "64", "--calib-samples", "2", "--calib-len", "96"]
    folder = model_folder(tmp_path / "model", num_hidden_layers=1)
    assert cli.main([str(folder), "--budget", "70%", "--dry-run", *small]) == 1
    assert "the CBC solver of PuLP did not run (cbc died)" in capsys.readouterr().err


@pytest.mark.parametrize("count", [10**6, 10**12, 10**30])
def test_a_batch_of_any_size_is_planned_or_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    folder = model_folder(tmp_path / "model", num_hidden_layers=1)
    small = [
        "--max-len",
        "256",
        "--window",
        "64",
        "--calib-samples",
        "2",
        "--calib-len",
        "96",
        "--batch-size",
        str(count),
    ]
    code = cli.main([str(folder), "--budget", "70%", "--dry-run", *small])
    if count == 10**6:
        assert code == 0
    else:
        assert code == 2
        assert re.search("more than any machine holds|too long for a number", capsys.readouterr().err)


@pytest.mark.parametrize(
    "flag", ["--window", "--sink", "--calib-samples", "--calib-len", "--effective-len", "--max-len"]
)
@pytest.mark.parametrize("value", ["1000000000000", "9" * 40, "9" * 5000])
def test_numbers_of_any_size_end_in_a_plan_or_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    folder = model_folder(tmp_path / "model", num_hidden_layers=1)
    small = {"--max-len": "256", "--window": "64", "--calib-samples": "2", "--calib-len": "96", flag: value}
    arguments = [word for pair in small.items() for word in pair]
    code = cli.main([str(folder), "--budget", "70%", "--dry-run", *arguments])
    shown = capsys.readouterr().err
    assert "defect" not in shown
    assert code == 0 or len([line for line in shown.splitlines() if line.startswith("pmkvq-compile: ")]) == 1


def test_a_reader_that_closes_its_end_early_ends_the_command_quietly(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", num_hidden_layers=1)
    small = ["--max-len", "256", "--window", "64", "--calib-samples", "2", "--calib-len", "96", "--dry-run"]
    command = [sys.executable, "-m", "pmkvq_compiler.cli", str(folder), "--budget", "70%", *small]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
