"""The place of an artifact: checked before the compile, locked while it runs, and filled in one step at its end.

While a compile runs, there is a folder `.NAME.partial` beside the destination `NAME`. The compile holds the file `lock`
in it, writes the artifact into `artifact`, and uses `scratch` for temporary files. At the end, `artifact` and the
destination change places in one step. So whenever a compile is killed, the destination is either the whole old artifact
or the whole new one. If nobody holds the lock of a partial folder, a killed process has left it, and the next compile
removes its contents.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pmkvq_compiler.emit.destination import (
    OTHER,
    cannot_write,
    check_destination,
    check_replaceable,
    destination_of,
    shown,
)
from pmkvq_compiler.emit.renames import Unsupported, exchange, move_to_free_place
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.failures import OUT_OF_FILES, OUT_OF_ROOM
from pmkvq_compiler.interrupts import Signals

try:
    import fcntl
except ModuleNotFoundError:  # Windows has no such locks, so a partial folder is never taken to be abandoned
    fcntl = None  # type: ignore[assignment]


LOCK, ARTIFACT, REPLACED, SCRATCH = "lock", "artifact", "replaced", "scratch"


@contextmanager
def claimed(output: Path, force: bool, keep: dict[str, Path], signals: Signals) -> Iterator[Place]:
    """Reserve the place of an artifact at `output` for this compile. `Place.take` then puts the artifact there.

    Raises `UsageError` before any work if the artifact cannot go there. Raises `CompileError` if another compile is
    writing to the same place, or if the disk is full. At the end, everything that was not taken is removed.
    """
    destination = destination_of(output)
    check_destination(output, destination, force, keep)
    with signals.deferred():
        place = _claim(output, destination)
    try:
        with _told_in_sentences(output, place), _released(place, signals):
            with signals.deferred():
                place.prepare(force, keep)
            signals.check()
            yield place
    finally:  # again, because a signal may have interrupted the first release before it deferred signals
        with signals.deferred():
            place.release()


@contextmanager
def _released(place: Place, signals: Signals) -> Iterator[None]:
    try:
        yield
    finally:
        with signals.deferred():
            place.release()


@contextmanager
def _told_in_sentences(output: Path, place: Place) -> Iterator[None]:
    """Within, an error of the operating system that concerns this compile's files becomes a `CompileError`."""
    try:
        yield
    except CompileError:
        raise
    except Exception as error:
        reason = _of_the_system(error)
        if reason is None or not (reason.errno in OUT_OF_ROOM | OUT_OF_FILES or place.owns(reason.filename)):
            raise
        raise cannot_write(output, reason) from error


@dataclass
class Place:
    """A destination that is reserved for this compile."""

    output: Path
    """The destination as the user named it."""
    destination: Path
    lock: int
    """The file descriptor of the lock."""
    made: list[Path]
    """Parent folders of the destination that this compile has created."""
    before: os.stat_result | None = None
    """The folder that is to be replaced; None if there is none."""
    kept: bool = False
    """Whether the partial folder has something that must stay after the compile."""
    released: bool = False

    @property
    def partial(self) -> Path:
        return _partial(self.destination)

    def owns(self, file: object) -> bool:
        """Whether a file that an error names belongs to this compile."""
        return str(self.partial) in str(file)

    @property
    def folder(self) -> Path:
        """Where the artifact is written."""
        return self.partial / ARTIFACT

    @property
    def scratch(self) -> Path:
        """A folder for temporary files."""
        return self.partial / SCRATCH

    def prepare(self, force: bool, keep: dict[str, Path]) -> None:
        """Finish or remove what killed processes have left, check the destination, and create empty folders."""
        replaced = self.partial / REPLACED
        if replaced.exists() and not os.path.lexists(self.destination):
            os.rename(replaced, self.destination)
        _sweep(self.partial)
        _sweep_calibrations(self.destination.parent)
        check_destination(self.output, self.destination, force, keep)
        self.before = os.lstat(self.destination) if os.path.lexists(self.destination) else None
        self.folder.mkdir()
        self.scratch.mkdir()

    def check_room(self, needed: int) -> None:
        """Raises `CompileError` if the file system has fewer free bytes than are needed."""
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise CompileError(
                f"output {shown(self.output)} needs {needed:,} bytes, but its file system has {free:,} free; free some "
                f"room or {OTHER}"
            )

    def take(self, force: bool) -> None:
        """Move the artifact to its destination in one step. If that fails, raises `CompileError`, which names the place
        where the finished artifact is instead."""
        _sync_tree(self.folder)
        try:
            if self.before is None:
                move_to_free_place(self.folder, self.destination)
            else:
                self._check_unchanged(force)
                self._replace()
        except (OSError, UsageError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise CompileError(
                f"output {shown(self.output)} could not be put into place at the end of the compile ({reason}); the "
                f"finished artifact is in {shown(self._put_aside())}"
            ) from error
        self.made.clear()
        with suppress(OSError):  # some file systems cannot sync a folder
            _sync(self.destination.parent)

    def _check_unchanged(self, force: bool) -> None:
        """Raises `OSError` or `UsageError` if the destination is not what it was when the compile began."""
        if self.before is None or not os.path.samestat(os.lstat(self.destination), self.before):
            raise FileExistsError(errno.EEXIST, "another folder is there now", str(self.destination))
        check_replaceable(self.output, self.destination, force)

    def _replace(self) -> None:
        try:
            exchange(self.folder, self.destination)
        except Unsupported:
            if not any(self.destination.iterdir()):  # a rename can replace a folder only if it is empty
                os.rename(self.folder, self.destination)
                return
            replaced = self.partial / REPLACED  # the next compile finds it here if this one is killed in between
            os.rename(self.destination, replaced)
            try:
                move_to_free_place(self.folder, self.destination)
            except OSError:
                self.kept = True
                os.rename(replaced, self.destination)
                self.kept = False
                raise

    def _put_aside(self) -> Path:
        """Move the artifact to a free name beside the destination; returns its new place."""
        self.made.clear()
        for number in itertools.count(2):
            aside = self.destination.with_name(f"{self.destination.name}-{number}")
            try:
                move_to_free_place(self.folder, aside)
            except FileExistsError:
                continue
            except OSError:
                break
            return aside
        self.kept = True
        return self.folder

    def release(self) -> None:
        """Remove the partial folder, and created parent folders that are still empty. Further calls do nothing."""
        if self.released:
            return
        if not self.kept:
            with suppress(OSError):  # the next compile removes what this one cannot
                _sweep(self.partial)
                (self.partial / LOCK).unlink()
                self.partial.rmdir()
        os.close(self.lock)
        _remove_empty(self.made)
        self.released = True


def _partial(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


def _claim(output: Path, destination: Path) -> Place:
    """Create the partial folder, or take over that of a killed process, and lock it.

    Raises `UsageError` if it cannot be created, and `CompileError` if another process holds it.
    """
    made = [folder for folder in destination.parents if not folder.exists()][::-1]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        while (lock := _locked(output, _partial(destination))) is None:
            pass
    except BaseException as error:
        _remove_empty([*made, _partial(destination)])
        if isinstance(error, OSError):
            raise cannot_write(output, error, UsageError) from error
        raise
    return Place(output, destination, lock, made)


def _locked(output: Path, partial: Path) -> int | None:
    """The file descriptor of the lock in the partial folder; None if its last owner was just removing the folder."""
    try:
        partial.mkdir()
        fresh = True
    except FileExistsError:
        fresh = False
    try:
        others = {path.name for path in partial.iterdir()} - {LOCK, ARTIFACT, REPLACED, SCRATCH}
        if others or partial.is_symlink():
            raise UsageError(
                f"{shown(partial)}, where output {shown(output)} would be written first, is in use; {OTHER}"
            )
        lock = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    try:
        _lock(lock, fresh, output, partial)
        if os.path.samestat(os.fstat(lock), os.stat(partial / LOCK)):
            return lock
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _lock(lock: int, fresh: bool, output: Path, partial: Path) -> None:
    """Raises `CompileError` if another process holds the lock, or may hold it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CompileError(
            f"output {shown(output)} is being written by another compile; wait for it or {OTHER}"
        ) from error
    except OSError as error:
        if not fresh:  # without locks, we cannot tell whether the process that created the folder still runs
            raise CompileError(
                f"{shown(partial)} belongs to another compile and cannot be locked ({error.strerror}); remove it if no "
                f"compile is running, or {OTHER}"
            ) from error


def _sweep(partial: Path) -> None:
    """Remove everything that a compile has written into its partial folder. Raises `OSError`."""
    for name in (ARTIFACT, REPLACED, SCRATCH):
        folder = partial / name
        if folder.is_dir() and not folder.is_symlink():
            _allow_removal(folder)
            shutil.rmtree(folder)


def _allow_removal(folder: Path) -> None:
    """Make a folder and the folders in it writable, so that its owner can remove them."""
    with suppress(OSError):
        folder.chmod(0o700)
    for root, names, _ in os.walk(folder):
        for inner in (Path(root, name) for name in names):
            if not inner.is_symlink():
                with suppress(OSError):
                    inner.chmod(0o700)


def _sweep_calibrations(folder: Path) -> None:
    """Remove unfinished calibrations of processes that no longer run."""
    for path in folder.glob(".*.calibration.safetensors.*"):
        if path.suffix[1:].isdecimal() and not _runs(int(path.suffix[1:])):
            with suppress(OSError):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders, given from the outermost on, that are empty."""
    for folder in reversed(list(folders)):
        with suppress(OSError):
            folder.rmdir()


def _sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk, so that a crash cannot keep the rename and lose the files."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            with suppress(OSError):  # some file systems cannot sync a folder
                _sync(path)
        else:
            _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _of_the_system(error: Exception) -> OSError | None:
    """The operating system's error that an exception is or reports. Libraries in Rust or C++ report only its text."""
    if isinstance(error, OSError):
        return error
    told = (number for number in OUT_OF_ROOM | OUT_OF_FILES if os.strerror(number) in str(error))
    return next((OSError(number, os.strerror(number)) for number in told), None)
