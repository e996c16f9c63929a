"""What the command line says when a compile ends with an exception: one sentence, whatever the exception was."""

from __future__ import annotations

import errno
import sys
import tempfile
import traceback
from pathlib import Path

from pmkvq_compiler.errors import CompileError, Defect, UsageError, first_line

FAILED, WRONG_USAGE = 1, 2
"""Exit codes."""

OUT_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OUT_OF_FILES = {errno.EMFILE, errno.ENFILE}


def explain(error: Exception) -> tuple[str, int]:
    """The sentence for an exception that ended the command, and the exit code.

    What is neither the user's request nor the machine is a defect of this program. Its traceback goes to a file, which
    the sentence names.
    """
    if isinstance(error, CompileError) and not isinstance(error, Defect):
        return str(error), WRONG_USAGE if isinstance(error, UsageError) else FAILED
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_os_error(error), FAILED
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return (
            f"there is not enough memory ({_named(error)}); lower --calib-len, choose another --device, or "
            f"compile on a larger machine",
            FAILED,
        )
    return (
        f"this is a defect of pmkvq-compile ({_named(error)}); please report it with the traceback, which is "
        f"{_kept_traceback(error)}",
        FAILED,
    )


def _explain_os_error(error: OSError) -> str:
    if error.errno in OUT_OF_ROOM:
        return f"there is no room left to write ({error}); free some space or choose another place with -o"
    if error.errno in OUT_OF_FILES:
        return f"too many files are open ({error}); allow more with `ulimit -n 4096`"
    return f"{error}; check that the place exists, can be read and written, and has room"


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch ran out of memory. On a CPU that is a RuntimeError that only its text tells from others."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _named(error: BaseException) -> str:
    """The kind of an error, and its first line where it has one."""
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"


def _kept_traceback(error: Exception) -> str:
    """Where the traceback was put: a file for temporary things, or standard error where none can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="pmkvq-compile-", suffix=".log", delete=False) as file:
            file.write(text)
        return f"in {Path(file.name)}"
    except OSError:
        print(text, file=sys.stderr)
        return "above"
