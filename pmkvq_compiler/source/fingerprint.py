"""sha256 of everything that decides what a model computes, fast enough for checkpoints of many gigabytes."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PIECE = 64 << 20
"""Bytes of a file that are digested by one thread."""


def fingerprint(facts: dict[str, Any], files: Iterable[Path]) -> str:
    """sha256 (hex) over `facts`, written as JSON, and over the names and contents of files."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in files:
        digest.update(f"{path.name}:{_file_digest(path)}:".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    """sha256 (hex) over the digests of a file's pieces, which are read and digested in parallel."""
    size = path.stat().st_size
    if size == 0:
        return hashlib.sha256().hexdigest()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:

        def piece(start: int) -> bytes:
            with memoryview(data) as view, view[start : start + PIECE] as part:
                return hashlib.sha256(part).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(piece, range(0, size, PIECE)))
    return hashlib.sha256(b"".join(digests)).hexdigest()
