"""The artifact folder: written beside its target, renamed when it is whole, never half there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.runtime.load import FORMAT_VERSION, MANIFEST, file_digest


def check_target(output: Path, force: bool) -> None:
    """Raises `UsageError` where something is at `output` that the compile must not replace."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file; choose a folder with -o")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise UsageError(f"output {output} is not empty; choose another folder with -o or replace it with --force")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place when the block ends well and vanishes when it does not."""
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = output.parent / f".{output.name}.{os.getpid()}.partial"
        staging.mkdir()
    except OSError as error:
        raise CompileError(f"output {output} cannot be written ({error}); choose another folder with -o") from error
    try:
        yield staging
        _replace(output, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(output: Path, staging: Path) -> None:
    if not output.exists():
        staging.rename(output)
        return
    old = staging.with_suffix(".old")
    output.rename(old)
    try:
        staging.rename(output)
    except BaseException:
        old.rename(output)
        raise
    shutil.rmtree(old)


MODEL_CARD = "README.md"


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """`pmkvq.json`: the format version, `content` and the sha256 of every other file.

    Only the model card has none: people edit it where they publish the artifact.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, MODEL_CARD))
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    manifest = {"format_version": FORMAT_VERSION, **content, "files": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
