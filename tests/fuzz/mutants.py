"""The processes in which mutants are tried: seeded, bounded in time, counted."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from . import rounds

FACTOR = rounds(1, 10)
"""How many times as many mutants as in a short run."""

LONGEST = 10
"""Seconds after which a mutant counts as a hang."""

CHUNK = 50

Try = Callable[[int], str]
"""From a mutant's number to what became of it, in a word; raises what is not to be."""


def run(attempt: Try, numbers: Sequence[int]) -> Counter[str]:
    """Try all mutants in forked processes, a chunk in each; how often each outcome was.

    Raises `AssertionError` with the numbers of those that raised, hung, or ended their process.
    """
    context = multiprocessing.get_context("fork")
    outcomes: Counter[str] = Counter()
    faults = []
    waiting = list(numbers)
    while waiting:
        chunk, waiting = waiting[:CHUNK], waiting[CHUNK:]
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_try_all, args=(attempt, chunk, theirs))
        process.start()
        theirs.close()
        for place, number in enumerate(chunk):
            outcome = _receive(ours)
            if isinstance(outcome, str):
                outcomes[outcome] += 1
                continue
            faults.append(f"mutant {number}: {outcome[0]}")
            if outcome[1]:  # the process is gone, or must be
                waiting = [*chunk[place + 1 :], *waiting]
                process.kill()
                break
        process.join()
    assert not faults, f"{len(faults)} of {len(numbers)}:\n" + "\n".join(faults[:20])
    return outcomes


def _receive(connection: Any) -> str | tuple[str, bool]:
    """An outcome, or what went wrong and whether that ends the process."""
    try:
        if not connection.poll(LONGEST):
            return f"hung for more than {LONGEST} seconds", True
        received: str | tuple[str, bool] = connection.recv()
        return received
    except EOFError:
        return "ended its process", True


def _try_all(attempt: Try, numbers: Sequence[int], connection: Any) -> None:
    for number in numbers:
        try:
            connection.send(attempt(number))
        except BaseException as error:  # whatever comes is to be told
            connection.send((f"{type(error).__name__}: {error}"[:600], False))
