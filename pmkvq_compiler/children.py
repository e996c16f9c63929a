"""Processes that a compile starts run the code of this installation, whatever lies in the current folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def isolated() -> Iterator[None]:
    """Within, Python processes that are started import nothing from the current folder, where a downloaded model may
    have a `torch.py`. They also write no bytecode, which would end up in the artifact that they import.

    Packages in the user's own site directory and on PYTHONPATH can still be imported.
    """
    chosen = {"PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": _without_relative_paths()}
    before = {name: os.environ.get(name) for name in chosen}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _without_relative_paths() -> str:
    """PYTHONPATH with absolute entries, and without empty ones, which mean the current folder."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(os.path.abspath(entry) for entry in entries if entry)
