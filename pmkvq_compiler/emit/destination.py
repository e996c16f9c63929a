"""What an artifact may take the place of."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from pmkvq_compiler.emit.artifact import foreign_files, is_artifact
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.failures import OUT_OF_FILES, OUT_OF_ROOM

OTHER = "choose another folder with -o"
FORCE = "--force replaces an artifact or an empty folder, nothing else"


def shown(path: Path | str) -> str:
    """A path as a sentence can hold it: quoted where it has line breaks or bytes that are no text."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def destination_of(output: Path) -> Path:
    """The place that `output` means: its folder resolved, its last part as it is. Raises `UsageError`."""
    if "\0" in str(output):
        raise UsageError(f"output {shown(output)} is no path; {OTHER}")
    named = output.name not in ("", "..")
    destination = Path(os.path.realpath(output.parent)) / output.name if named else Path(os.path.realpath(output))
    try:
        os.fspath(destination).encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"output {shown(destination)} is not valid UTF-8, which weight files need; {OTHER}") from error
    return destination


def check_destination(output: Path, destination: Path, force: bool, keep: dict[str, Path]) -> None:
    """Raises `UsageError` where something is at the destination that no artifact may take the place of: anything but an
    empty folder and, with `force`, an artifact; or what holds something to `keep`, which are paths by what they are."""
    try:
        there = os.lstat(destination)
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        file = next(parent for parent in reversed(destination.parents) if not parent.is_dir())
        raise UsageError(f"output {shown(output)} cannot be a folder: {shown(file)} is a file; {OTHER}") from error
    except OSError as error:
        raise cannot_write(output, error, UsageError) from error
    if stat.S_ISLNK(there.st_mode):
        raise UsageError(
            f"output {shown(output)} is a symbolic link to {shown(os.readlink(destination))}; name the folder itself "
            f"with -o"
        )
    if not stat.S_ISDIR(there.st_mode):
        raise UsageError(f"output {shown(output)} is a file; choose a folder with -o")
    _check_holds_nothing(output, there, keep)
    check_replaceable(output, destination, force)


def _check_holds_nothing(output: Path, there: os.stat_result, keep: dict[str, Path]) -> None:
    """Raises `UsageError` where the folder `there` is, or holds, what must not go away."""
    places = [("the current folder", Path(".")), ("the home folder", Path("~").expanduser())]
    places += [(f"the mount point {shown(path)}", path) for path in _mount_points()]
    for what, path in keep.items():
        places += [(what, path)]
        with suppress(OSError):  # a model's files may be links to anywhere
            places += [(f"a file of {what}", file) for file in path.iterdir()]
    for what, path in places:
        real = Path(os.path.realpath(path))
        if any(_same(there, folder) for folder in (real, *real.parents)):
            raise UsageError(f"output {shown(output)} {'is' if _same(there, real) else 'holds'} {what}; {OTHER}")


def _same(there: os.stat_result, path: Path) -> bool:
    try:
        return os.path.samestat(there, os.stat(path))
    except OSError:
        return False


def _mount_points() -> list[Path]:
    """Where something is mounted. Linux lists folders of the same file system, too, which `os.path.ismount` misses."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    octal = re.compile(r"\\([0-7]{3})")
    return [Path(octal.sub(lambda code: chr(int(code.group(1), 8)), line.split(" ")[4])) for line in lines]


def check_replaceable(output: Path, destination: Path, force: bool) -> None:
    """Raises `UsageError` where the folder at the destination must stay, or holds files that must."""
    if os.path.ismount(destination):
        raise UsageError(f"output {shown(output)} is a mount point; choose a folder in it with -o")
    if not os.access(destination, os.R_OK | os.W_OK | os.X_OK):
        raise UsageError(f"output {shown(output)} may not be replaced by this user; {OTHER}")
    if not any(destination.iterdir()):
        return
    if not force:
        raise UsageError(f"output {shown(output)} is not empty; {OTHER} ({FORCE})")
    if not is_artifact(destination):
        raise UsageError(f"output {shown(output)} is not empty and is no artifact: {FORCE}; {OTHER}")
    foreign = next(foreign_files(destination), None)
    if foreign is not None:
        raise UsageError(
            f"output {shown(output)} is an artifact that also holds {shown(foreign)}, which its compile did not write; "
            f"move that away or {OTHER}"
        )


def cannot_write(output: Path, error: OSError, kind: type[CompileError] = CompileError) -> CompileError:
    """What a user is told of an error of the operating system, as an error of a `kind` if the request is its cause."""
    if error.errno in OUT_OF_FILES:
        return CompileError(f"no more files can be opened ({error.strerror}); raise the limit with `ulimit -n`")
    kind = CompileError if error.errno in OUT_OF_ROOM else kind
    elsewhere = error.filename is not None and not str(error.filename).startswith(str(destination_of(output).parent))
    what = f"file {shown(str(error.filename))}" if elsewhere else f"output {shown(output)}"
    advice = f"free some room or {OTHER}" if error.errno in OUT_OF_ROOM else OTHER
    return kind(f"{what} cannot be written ({error.strerror}); {advice}")
