"""Errors that end a compile. Each message is one sentence or two: the value, the reason, what to do."""


class CompileError(Exception):
    """The compile cannot go on; the command line prints the message and exits with 1."""


class UsageError(CompileError):
    """The request itself is wrong; the command line prints the message and exits with 2."""


class Defect(CompileError):
    """This program is wrong, not the request; the command line keeps the traceback in a file and asks for a report."""
