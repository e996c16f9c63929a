"""An artifact on the disk: a manifest, and exactly the files that the manifest lists."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pmkvq_compiler.runtime.manifest import FORMAT_VERSION, MANIFEST, file_digest

MODEL_CARD = "README.md"
"""The one file without a digest: people edit it where they publish the artifact."""
MADE_BY_OTHERS = ("__pycache__", ".cache")
"""Folders that Python and the hub's client create in an artifact that is in use."""
MANIFEST_BYTES = 64 << 20
"""No manifest is larger."""
METADATA = {"format": "pt"}
DIGESTED_AT_ONCE = 8
"""How many files are digested at the same time, on a machine with as many cores."""


def write_manifest(folder: Path, content: dict[str, Any], written: Iterable[Path]) -> None:
    """Write `pmkvq.json`: the format version, `content` and the sha256 of the files that the compiler has `written`."""
    listed = sorted(path for path in written if path.name != MODEL_CARD)
    names = [path.relative_to(folder).as_posix() for path in listed]
    with ThreadPoolExecutor(min(DIGESTED_AT_ONCE, os.cpu_count() or 1)) as pool:
        digests = dict(zip(names, pool.map(_digest, listed), strict=True))
    manifest = {"format_version": FORMAT_VERSION, **content, "files": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    """sha256 of a file. Large files are digested once, unless they change."""
    state = path.stat()
    return _digest_of(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest_of(path: Path, inode: int, size: int, changed: int) -> str:
    return file_digest(path)


def remove_unlisted(folder: Path, written: Iterable[Path]) -> None:
    """Remove files that other programs left in the folder of a new artifact, such as Python's bytecode."""
    belonging = {folder / MANIFEST, *written}
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before the folder
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in belonging:
            path.unlink()


def is_artifact(folder: Path) -> bool:
    """Whether the compiler wrote this folder. It may be damaged, or have another format version."""
    return _listed(folder) is not None


def foreign_files(folder: Path) -> Iterator[str]:
    """The files in an artifact's folder that neither its compile nor its use has put there."""
    listed = {*(_listed(folder) or ()), MANIFEST, MODEL_CARD}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_file = path.is_symlink() or not path.is_dir()
        if is_file and name.as_posix() not in listed and not set(MADE_BY_OTHERS) & set(name.parts[:-1]):
            yield name.as_posix()


def _listed(folder: Path) -> set[str] | None:
    """The files that the manifest lists; None if there is no manifest, or another kind of file has its name."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            return None
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format_version"), int):
        return None
    files = manifest.get("files")
    return set(files) if isinstance(files, dict) else None


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] = METADATA) -> None:
    """Call `save_file` of safetensors, with the errors and permissions of any other file that Python writes.

    By default, safetensors creates files that only their owner may read. Raises `OSError`.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code.group(1)), os.strerror(int(code.group(1))), str(path)) from error
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    """The permissions that new files do not get. Linux tells them; other systems tell them only when one sets them."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("Umask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask
