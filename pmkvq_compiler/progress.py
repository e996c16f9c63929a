"""How a compile tells what it is doing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it and what there is to do."""


class Stages:
    """Tells when a stage begins and ends, and keeps how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.began = time.time()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.progress(stage, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)
        self.progress(stage, 1, 1)
