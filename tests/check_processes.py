"""Checks of artifacts in processes that are forked from one which has imported torch and nothing of ours.

Every compile ends with a check in a fresh interpreter. For the models of these tests, importing torch there takes ten
times as long as the check. `multiprocessing` calls a process that waits to be forked a fork server.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["torch", "safetensors.torch"])


def run(command: Sequence[str], *, cwd: str, **_: object) -> CompletedProcess[bytes]:
    """What `subprocess.run` does for a check: `python -m module arguments`, whose errors are kept."""
    errors = Path(cwd, "errors")
    process = FORK_SERVER.Process(target=_run_module, args=(command[2:], cwd, dict(os.environ), errors))
    process.start()
    try:
        process.join()
    finally:
        process.kill()
    assert process.exitcode is not None
    return CompletedProcess(command, process.exitcode, stderr=errors.read_bytes())


def _run_module(arguments: list[str], cwd: str, environment: dict[str, str], errors: Path) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, place, how in ((0, os.devnull, "rb"), (1, os.devnull, "wb"), (2, errors, "wb")):
        with open(place, how) as file:
            os.dup2(file.fileno(), stream)
    sys.argv = list(arguments)
    sys.dont_write_bytecode = True
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


FORKED = SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL, PIPE=subprocess.PIPE)
"""Takes the place of the module `subprocess` where checks are started."""
