"""Processes that a compile starts run the code of this installation, whatever lies in the current folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def isolated() -> Iterator[None]:
    """Within, Python processes that are started do not look for modules in the current folder, in which a model may
    have a `torch.py`, and write no bytecode, which would lie in the artifact that they import.

    Packages that a user has installed for themselves, and those on PYTHONPATH, stay.
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
    """PYTHONPATH without its empty entries, which mean the current folder, and with what others mean from here."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(os.path.abspath(entry) for entry in entries if entry)
