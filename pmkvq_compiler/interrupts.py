"""Signals that end a compile, in a way that nothing can swallow.

Python raises `KeyboardInterrupt` wherever it happens to be. That may be a `__del__` or a callback, where exceptions are
printed and dropped. Here a signal is noted as well as raised: `Signals.check`, which every step of the progress calls,
raises it again for as long as the compile has not ended.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pmkvq_compiler.progress import Progress

WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
"""The signals that end a compile, and what is said of them. Windows has no SIGHUP."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the compile to end."""


class Signals:
    """What has arrived, and what is true of the files by now."""

    def __init__(self) -> None:
        self.arrived: signal.Signals | None = None
        self.state = "nothing was changed"
        """What can be told to who interrupts the compile now."""
        self._deferred = 0

    @property
    def sentence(self) -> str:
        return f"{WORDS['SIGINT' if self.arrived is None else self.arrived.name]}; {self.state}"

    @property
    def exit_code(self) -> int:
        """What a shell reports for a command that the signal has ended."""
        return 128 + (self.arrived or signal.SIGINT)

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.arrived = self.arrived or signal.Signals(number)
        self.check()

    def check(self) -> None:
        """Raises `Interrupted` where a signal has arrived, once more where it was swallowed."""
        if self.arrived is not None and not self._deferred:
            raise Interrupted(self.sentence)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, signals are noted and not raised: for what must be whole. It raises none at its end either."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    @contextmanager
    def not_disguised(self) -> Iterator[None]:
        """Within, an error that a library has made of an interrupt, as torch.export does, is an interrupt again."""
        try:
            yield
        except Exception:
            self.check()
            raise

    def checking(self, progress: Progress) -> Progress:
        """`progress`, with a look at the signals before and after each report."""

        def report(step: str, done: int, total: int) -> None:
            self.check()
            progress(step, done, total)
            self.check()

        return report


@contextmanager
def watched() -> Iterator[Signals]:
    """Within, signals that end a process end the compile cleanly. Whoever is watching already goes on to.

    What the caller ignores or handles itself stays as it is, as does everything outside the main thread, where Python
    handles no signals.
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
    """For a process that is about to end: another Ctrl-C must not interrupt how it does."""
    for name in WORDS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
