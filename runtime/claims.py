"""Who uses an object that one thread at a time may use.

Nobody waits and nothing is locked: a use is over when the function that began it is off its thread's stack, however it
left it. So no exception, wherever it strikes, leaves an object that seems to be in use, and there is no deadlock.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from threading import get_ident
from types import FrameType, TracebackType

from .errors import InputError


@dataclass(frozen=True, eq=False)
class Use:
    """A function that runs, by its frame and its thread."""

    frame: FrameType
    thread: int = field(default_factory=get_ident)

    @property
    def goes_on(self) -> bool:
        # frames are compared from the top of the stack, which is near to them
        frame = sys._getframe() if self.thread == get_ident() else sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


class Claims:
    """The uses of one object, the oldest first. All that go on are of one thread."""

    def __init__(self) -> None:
        self._uses: dict[Use, None] = {}
        self._watch: Use | None = None
        """While it goes on, the thread that uses the object may look at it, not change it."""

    def claim(self, to_read: bool = False) -> Claim:
        """For a with-statement: the object is the thread's until it ends. Raises `InputError` where another thread uses
        the object, or a streamer would change it."""
        return Claim(self, to_read)

    def watch(self) -> Claim:
        """For a with-statement around a call of somebody's streamer."""
        return Claim(self, to_read=True, watches=True)

    def current(self) -> Use | None:
        """The oldest use of this thread that goes on."""
        for use in list(self._uses):
            if use.thread == get_ident() and use.goes_on:
                return use
        return None

    def add(self, mine: Use, to_read: bool) -> None:
        self._uses[mine] = None
        for use in list(self._uses):
            if use is mine:
                break
            if not use.goes_on:
                self.remove(use)
            elif use.thread == mine.thread:
                break
            else:
                self.remove(mine)
                raise InputError(
                    "this cache is in use by another thread; give each thread a cache of its own, or wait until the "
                    "other one's call has ended"
                )
        if not to_read and self._watch is not None and self._watch.goes_on:
            self.remove(mine)
            raise InputError(
                "this cache is in use by the generation that calls the streamer; a streamer may look at the cache or "
                "copy it, not change it"
            )

    def remove(self, use: Use) -> None:
        """Before it has ended, or so that it keeps nothing alive."""
        self._uses.pop(use, None)
        if self._watch is use:
            self._watch = None

    def set_watch(self, use: Use) -> None:
        self._watch = use


class Claim:
    """The with-statement of a claim; the use is that of the function which the statement is in."""

    def __init__(self, claims: Claims, to_read: bool, watches: bool = False) -> None:
        self.claims, self.to_read, self.watches = claims, to_read, watches

    def __enter__(self) -> None:
        self.use = Use(sys._getframe(1))
        self.claims.add(self.use, self.to_read)
        if self.watches:
            self.claims.set_watch(self.use)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.claims.remove(self.use)
