"""Checks of kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_interpreted(module: str, *arguments: object) -> str:
    """What `python -m module` prints where Triton interprets kernels.

    It is a process of its own, because an interpreted kernel cannot be compiled, nor the other way round. If it fails,
    that is an `AssertionError` here.
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
