"""A second stream of a CUDA device, for work that need not wait for what the present stream does."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")


def side_by_side(
    device: torch.device, first: Callable[[], First], second: Callable[[], Second]
) -> tuple[First, Second]:
    """What two functions return that launch work on a device. Neither needs the other's: on a CUDA device, the second
    one's begins on multiprocessors for which the first one's has no programs left.

    What the second function allocates may be let go only behind a later call, which follows all that reads it: its
    memory is the second stream's, which then uses it again.
    """
    if device.type != "cuda":
        return first(), second()
    present, beside = torch.cuda.current_stream(device), _second_stream(device)
    beside.wait_stream(present)
    one = first()
    with torch.cuda.stream(beside):
        other = second()
    present.wait_stream(beside)
    beside.wait_stream(present)
    return one, other


@lru_cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
