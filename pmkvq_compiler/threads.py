"""In how many threads PyTorch computes on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, PyTorch computes in one thread.

    The inverse or the eigenvectors of a matrix as small as a head take many times as long in several threads, which
    wait for each other, most of all where other programs use the same cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
