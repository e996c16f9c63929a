"""How a compile tells what it is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with a step's name, what is done of it and what there is to do."""


class Steps:
    """Tells when a step of the compile begins and ends, and keeps how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.began = time.time()

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self.progress(step, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 2)
        self.progress(step, 1, 1)
