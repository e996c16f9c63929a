"""Which thread uses an object that only one thread at a time may use.

Nobody waits and there is no lock: a use is over when the function that began it has left its thread's stack, in
whatever way. So no exception, wherever it is raised, leaves an object claimed for ever, and there is no deadlock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from threading import get_ident
from types import FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from .errors import InputError


@dataclass(frozen=True, eq=False)
class Use:
    """A running function, known by its frame and its thread."""

    frame: FrameType
    thread: int = field(default_factory=get_ident)

    @property
    def goes_on(self) -> bool:
        # search from the top of the stack, where the frame usually is
        frame = sys._getframe() if self.thread == get_ident() else sys._current_frames().get(self.thread)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None


class Claims:
    """The uses of one object, the oldest first. All that go on belong to one thread."""

    def __init__(self) -> None:
        self._uses: dict[Use, None] = {}
        self._watch: Use | None = None
        """While this use goes on, the thread that uses the object may read it but not change it."""

    def claim(self, to_read: bool = False) -> Claim:
        """For a `with` statement, during which the object belongs to this thread. Raises `InputError` if another thread
        uses the object, or if a streamer tries to change it."""
        return Claim(self, to_read)

    def watch(self) -> Claim:
        """For a `with` statement around the call of a user's streamer."""
        return Claim(self, to_read=True, watches=True)

    def current(self) -> Use | None:
        """This thread's oldest use that goes on."""
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
                    "this cache is in use by another thread; give each thread its own cache, or wait until the other "
                    "thread's call has ended"
                )
        if not to_read and self._watch is not None and self._watch.goes_on:
            self.remove(mine)
            raise InputError(
                "this cache is in use by the generation that calls the streamer; a streamer may look at the cache or "
                "copy it, not change it"
            )

    def remove(self, use: Use) -> None:
        """Forget a use, which may go on, or whose frame would keep its objects alive."""
        self._uses.pop(use, None)
        if self._watch is use:
            self._watch = None

    def set_watch(self, use: Use) -> None:
        self._watch = use


class Claim:
    """The context manager of a claim. The use is that of the function that contains the `with` statement."""

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


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Method = Callable[Concatenate[Any, Arguments], Result]


def claims(to_read: bool = False) -> Callable[[Method[Arguments, Result]], Method[Arguments, Result]]:
    """A decorator for methods that claim their object, by its attribute `claims`, for as long as they run."""

    def claiming(method: Method[Arguments, Result]) -> Method[Arguments, Result]:
        @wraps(method)
        def claimed(owner: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with owner.claims.claim(to_read):
                return method(owner, *args, **kwargs)

        return claimed

    return claiming
