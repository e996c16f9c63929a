"""sha256 of everything that decides what a model computes, fast enough for checkpoints of many gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

PIECE = 64 << 20
"""Bytes of a file that are digested by one thread."""
READ_AT_ONCE = 1 << 20


def fingerprint(facts: dict[str, Any], files: Iterable[Path]) -> str:
    """sha256 (hex) over `facts`, written as JSON, and over the names and contents of files."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for path in files:
        digest.update(f"{path.name}:{_file_digest(path)}:".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    """sha256 (hex) over the digests of a file's pieces, which are read and digested in parallel."""
    starts = range(0, path.stat().st_size, PIECE)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(partial(_piece_digest, path), starts)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _piece_digest(path: Path, start: int) -> bytes:
    """sha256 of a piece. It is read bit by bit: pages of a mapped file would count as memory of this process."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for _ in range(PIECE // READ_AT_ONCE):
            digest.update(file.read(READ_AT_ONCE))
    return digest.digest()
