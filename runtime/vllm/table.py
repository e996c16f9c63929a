"""The table that says to kernels in which blocks pages lie, and how it is written from the host.

It is written before many steps, while the device may have nothing to do. So all that is needed for it is made before:
memory on both sides, and views of it.
"""

from __future__ import annotations

import itertools
from array import array

import torch
from torch import Tensor

from .tiers import ROW

AT_ONCE = 256
"""Rows that most steps write at most."""

NOTHING = array("q")


class Table:
    """`ties` [blocks, ROW - 1] (int32) has the further blocks of every page, 0 where it has none. The device is done
    with a step before the host tells of the one that comes `in_flight` steps later."""

    def __init__(self, blocks: int, device: torch.device, in_flight: int = 1) -> None:
        with torch.inference_mode(False):  # so that it can be written in any mode
            self.ties = torch.zeros(blocks, ROW - 1, dtype=torch.int32, device=device)
            self._usual = Told(self.ties, AT_ONCE, in_flight)

    def told(self, numbers: array[int]) -> Told:
        """Rows of `Changes`, which the device has before it does what is launched next."""
        usual = len(numbers) <= AT_ONCE * ROW
        told = self._usual if usual else Told(self.ties, len(numbers) // ROW, in_flight=1)
        told.send(numbers)
        return told


class Told:
    """`rows` [most, ROW] (int64) of `Changes` on the device, the last of them of block 0: it is nobody's, and has no
    further ones."""

    def __init__(self, ties: Tensor, most: int, in_flight: int) -> None:
        self._ties = ties
        self.rows = torch.zeros(most, ROW, dtype=torch.int64, device=ties.device)
        self._blocks, self._further = self.rows[:, 0], self.rows.view(torch.int32)[:, 2::2]  # the lower halves
        # for each step in flight and one more: none is written while the device may still read it
        pinned = [
            torch.zeros(most, ROW, dtype=torch.int64, device="cpu", pin_memory=ties.is_cuda)
            for _ in range(in_flight + 1)
        ]
        self._pinned = itertools.cycle([(one, one.view(-1).numpy()) for one in pinned])

    def send(self, numbers: array[int]) -> None:
        pinned, view = next(self._pinned)
        view[: len(numbers)] = numbers
        view[len(numbers) :] = 0
        self.rows.copy_(pinned, non_blocking=True)

    def note(self) -> None:
        """Write the further blocks of all rows to the table."""
        self._ties.index_copy_(0, self._blocks, self._further)
