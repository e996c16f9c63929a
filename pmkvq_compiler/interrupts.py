"""Signals that end a compile, handled so that no code can swallow them.

Python raises `KeyboardInterrupt` wherever it happens to be. That may be a `__del__` or a callback, where exceptions are
printed and dropped. Here a signal is remembered as well as raised. Every report of progress calls `Signals.check`,
which raises the signal again until the compile has ended.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pmkvq_compiler.progress import Progress

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""The signals that end a compile, and the word for each in the message. Windows has no SIGHUP."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the compile to end."""


class Signals:
    """The first signal that has arrived, and what the message says about the files."""

    def __init__(self) -> None:
        self.arrived: signal.Signals | None = None
        self.state = "nothing was changed"
        """What to tell a user who interrupts the compile now."""
        self._deferred = 0

    @property
    def sentence(self) -> str:
        return f"{WORDS['SIGINT' if self.arrived is None else self.arrived.name]}; {self.state}"

    @property
    def exit_code(self) -> int:
        """The exit code that shells use for a command that this signal has ended."""
        return 128 + (self.arrived or signal.SIGINT)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.arrived = self.arrived or signal.Signals(number)
        self.check()

    def check(self) -> None:
        """Raises `Interrupted` if a signal has arrived, even if it was raised before and swallowed."""
        if self.arrived is not None and not self._deferred:
            raise Interrupted(self.sentence)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, signals are remembered but not raised, so that the block runs to its end; `check` raises them."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    @contextmanager
    def not_disguised(self) -> Iterator[None]:
        """Within, an interrupt that a library turns into another error, as torch.export does, is raised again."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def checking(self, progress: Progress) -> Progress:
        """`progress`, with a check for signals before and after each report."""

        def report(step: str, done: int, total: int) -> None:
            self.check()
            progress(step, done, total)
            self.check()

        return report


@contextmanager
def watched() -> Iterator[Signals]:
    """Within, signals that would end the process end the compile cleanly. A `Signals` that already watches is reused.

    Signals that the caller ignores or handles itself are left to the caller. Outside the main thread no signal is
    watched, because Python handles signals only there.
    """
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outer, Signals):
        with outer.not_disguised():
            yield outer
        return
    signals = Signals()
    defaults = (signal.default_int_handler, signal.SIG_DFL)
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in WORDS if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) in defaults}
    try:
        for number in before:
            signal.signal(number, signals.handle)
        with signals.not_disguised():
            yield signals
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == signals.handle:
                signal.signal(number, handler)


def ignore_from_now_on() -> None:
    """Ignore these signals in a process that is about to end, so that another Ctrl-C does not disturb its end."""
    for name in WORDS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
