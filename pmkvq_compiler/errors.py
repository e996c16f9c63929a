"""Errors that end a compile. Each message is one sentence or two: the value, the reason, what to do."""


class CompileError(Exception):
    """The compile cannot go on; the command line prints the message and exits with 1."""


class UsageError(CompileError):
    """The request itself is wrong; the command line prints the message and exits with 2."""


class Defect(CompileError):
    """This program is wrong, not the request; the command line keeps the traceback in a file and asks for a report."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to be quoted within a sentence. If it ends with a colon, the next line
    is added."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0][:300].rstrip(".: ") if lines else type(error).__name__
