"""Where an artifact goes: tried before the work, locked during it, taken in one step after it.

Beside the destination `NAME` lies, for as long as a compile runs, a folder `.NAME.partial`: its `lock` is held by the
compile, the artifact grows in `artifact`, and `scratch` is for what is needed on the way. A destination that is to be
replaced changes places with `artifact`. So the destination is the old artifact or the new one, whole, whenever a
compile is killed; and a partial folder whose lock nobody holds was left by a dead process and is swept by the next
compile.
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
except ModuleNotFoundError:  # Windows: an unfinished folder is then never taken for one of a dead process
    fcntl = None  # type: ignore[assignment]


LOCK, ARTIFACT, REPLACED, SCRATCH = "lock", "artifact", "replaced", "scratch"


@contextmanager
def claimed(output: Path, force: bool, keep: dict[str, Path], signals: Signals) -> Iterator[Place]:
    """The place of an artifact at `output`, for this compile alone; `take` puts the artifact there.

    Raises `UsageError` before anything is done where it cannot go there, and `CompileError` where another compile is
    about to, or where the disk is full. At the end, what was not taken is removed.
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
    finally:  # a signal may have come before the first release deferred it
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
    """Within, errors of the operating system about this compile's files become a `CompileError`."""
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
    """A destination that this compile has for itself."""

    output: Path
    """As the user named it."""
    destination: Path
    lock: int
    """File descriptor."""
    made: list[Path]
    """Folders above the destination that were not there."""
    before: os.stat_result | None = None
    """The folder that is to be replaced, None where there is none."""
    kept: bool = False
    """Whether something in the partial folder must stay after the compile."""
    released: bool = False

    @property
    def partial(self) -> Path:
        return _partial(self.destination)

    def owns(self, file: object) -> bool:
        """Whether a file that an error names is of this compile."""
        return str(self.partial) in str(file)

    @property
    def folder(self) -> Path:
        """Where the artifact is written."""
        return self.partial / ARTIFACT

    @property
    def scratch(self) -> Path:
        """A folder for files that are needed on the way."""
        return self.partial / SCRATCH

    def prepare(self, force: bool, keep: dict[str, Path]) -> None:
        """Finish or remove what dead processes have left, look at the destination, and make empty folders."""
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
        """Raises `CompileError` where the file system has fewer free bytes than are needed."""
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise CompileError(
                f"output {shown(self.output)} needs {needed:,} bytes and its file system has {free:,} free; free some "
                f"room or {OTHER}"
            )

    def take(self, force: bool) -> None:
        """Put the artifact where it belongs, in one step. Raises `CompileError` where that fails, which names the place
        that the finished artifact is in instead."""
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
                f"output {shown(self.output)} could not be put into its place ({reason}) after all was done; the "
                f"finished artifact is in {shown(self._put_aside())}"
            ) from error
        self.made.clear()
        with suppress(OSError):  # some file systems cannot
            _sync(self.destination.parent)

    def _check_unchanged(self, force: bool) -> None:
        """Raises `OSError` or `UsageError` where the destination is not what it was when the compile began."""
        if self.before is None or not os.path.samestat(os.lstat(self.destination), self.before):
            raise FileExistsError(errno.EEXIST, "another folder is there now", str(self.destination))
        check_replaceable(self.output, self.destination, force)

    def _replace(self) -> None:
        try:
            exchange(self.folder, self.destination)
        except Unsupported:
            if not any(self.destination.iterdir()):  # a rename replaces an empty folder, and no other
                os.rename(self.folder, self.destination)
                return
            replaced = self.partial / REPLACED  # where the next compile finds it if this one is killed between
            os.rename(self.destination, replaced)
            try:
                move_to_free_place(self.folder, self.destination)
            except OSError:
                self.kept = True
                os.rename(replaced, self.destination)
                self.kept = False
                raise

    def _put_aside(self) -> Path:
        """Move the artifact to a free name beside the destination; returns where it is."""
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
        """Remove the partial folder, and the folders that were made for a destination that is not there; once is
        enough."""
        if self.released:
            return
        if not self.kept:
            with suppress(OSError):  # the next compile goes on where this one cannot
                _sweep(self.partial)
                (self.partial / LOCK).unlink()
                self.partial.rmdir()
        os.close(self.lock)
        _remove_empty(self.made)
        self.released = True


def _partial(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


def _claim(output: Path, destination: Path) -> Place:
    """Make the partial folder, or take that of a dead process, and lock it. Raises `UsageError` where it cannot be
    made, `CompileError` where another process has it."""
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
    """The file descriptor of the lock in the partial folder; None where its last owner was just removing it."""
    try:
        partial.mkdir()
        fresh = True
    except FileExistsError:
        fresh = False
    try:
        others = {path.name for path in partial.iterdir()} - {LOCK, ARTIFACT, REPLACED, SCRATCH}
        if others or partial.is_symlink():
            raise UsageError(f"{shown(partial)}, where output {shown(output)} is to be written, is in use; {OTHER}")
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
    """Raises `CompileError` where another process has the lock, or may have it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CompileError(
            f"output {shown(output)} is being written by another compile; wait for it or {OTHER}"
        ) from error
    except OSError as error:
        if not fresh:  # a file system without locks cannot tell whether who made it still runs
            raise CompileError(
                f"{shown(partial)} is of another compile; remove it if none is running ({error.strerror}), or {OTHER}"
            ) from error


def _sweep(partial: Path) -> None:
    """Remove what a compile has written. Raises `OSError`."""
    for name in (ARTIFACT, REPLACED, SCRATCH):
        folder = partial / name
        if folder.is_dir() and not folder.is_symlink():
            _allow_removal(folder)
            shutil.rmtree(folder)


def _allow_removal(folder: Path) -> None:
    """Make a folder of read-only folders one that its owner may empty."""
    with suppress(OSError):
        folder.chmod(0o700)
    for root, names, _ in os.walk(folder):
        for inner in (Path(root, name) for name in names):
            if not inner.is_symlink():
                with suppress(OSError):
                    inner.chmod(0o700)


def _sweep_calibrations(folder: Path) -> None:
    """Remove unfinished calibrations of processes that are no more."""
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
    """Remove folders, given from the outermost on, in which nothing is."""
    for folder in reversed(list(folders)):
        with suppress(OSError):
            folder.rmdir()


def _sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk, where a rename must not come before it."""
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            with suppress(OSError):  # some file systems cannot
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
    """The operating system's error that an exception is, or tells of: what is written in Rust or C++ knows no errno."""
    if isinstance(error, OSError):
        return error
    told = (number for number in OUT_OF_ROOM | OUT_OF_FILES if os.strerror(number) in str(error))
    return next((OSError(number, os.strerror(number)) for number in told), None)
