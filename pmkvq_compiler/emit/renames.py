"""Renames of whole folders in one step of the file system: either everything happens or nothing."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
"""Error codes of systems and file systems that do not support such renames."""


class Unsupported(OSError):
    """The system or this file system cannot exchange two folders, or cannot refuse to replace one."""


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders, so that neither place is ever empty. Raises `Unsupported` or another `OSError`."""
    _rename(one, other, linux_flag=2, darwin_flag=2)  # RENAME_EXCHANGE, RENAME_SWAP


def move_to_free_place(folder: Path, place: Path) -> None:
    """Rename `folder` to `place`, which must be free. Raises `FileExistsError` if it is not, or another `OSError`."""
    try:
        _rename(folder, place, linux_flag=1, darwin_flag=4)  # RENAME_NOREPLACE, RENAME_EXCL
    except Unsupported:
        if os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place)) from None
        os.rename(folder, place)


def _rename(source: Path, target: Path, *, linux_flag: int, darwin_flag: int) -> None:
    rename = _native_rename()
    if rename is None:
        raise Unsupported(errno.ENOSYS, os.strerror(errno.ENOSYS))
    flag = darwin_flag if sys.platform == "darwin" else linux_flag
    if rename(os.fsencode(source), os.fsencode(target), flag) != 0:
        number = ctypes.get_errno()
        kind = Unsupported if number in UNSUPPORTED else OSError
        raise kind(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _native_rename() -> Callable[[bytes, bytes, int], int] | None:
    """The system's rename function that takes flags; None if there is none."""
    if sys.platform not in ("linux", "darwin"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            darwin = library.renamex_np
            darwin.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
            return lambda source, target, flag: int(darwin(source, target, flag))
        linux = library.renameat2
    except AttributeError:  # an older C library
        return None
    linux.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return lambda source, target, flag: int(linux(AT_FDCWD, source, AT_FDCWD, target, flag))


AT_FDCWD = -100
"""On Linux: relative paths start at the current folder."""
