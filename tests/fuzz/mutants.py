"""Damage, and the processes in which it is tried: seeded, bounded in time, counted."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
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


def damage(content: bytes, generator: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, put in, filled with zeros or gone."""
    if not content:
        return generator.randbytes(generator.randint(1, 40))
    at = generator.randrange(len(content))
    end = min(len(content), at + generator.choice((1, 2, 8, 64, 1000)))
    match generator.randrange(8):
        case 0:
            flipped = bytearray(content)
            for _ in range(generator.choice((1, 1, 2, 10))):
                flipped[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            return bytes(flipped)
        case 1:
            return content[:at]
        case 2:
            return content[at:]
        case 3:
            return content[:end] + content[at:end] + content[end:]
        case 4:
            return content[:at] + content[end:]
        case 5:
            return content[:at] + generator.randbytes(generator.choice((1, 4, 100))) + content[at:]
        case 6:
            return content[:at] + bytes(end - at) + content[end:]
    return generator.choice((b"", content + content, b"\xff\xfe" + content, b"\xef\xbb\xbf" + content, content + b"\0"))


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, 2**31, 2**63, 10**30, -(10**30)),
    *("", "a", "\0", "../..", "0" * 64, "x" * 10_000, "🐳\ud800"),
    *([], [[]], [1], [None], {}, {"": 0}, {"a": {"a": {}}}, [[16, 16]] * 3),
)


def damage_json(value: Any, generator: random.Random) -> str:
    """The text of a JSON value in which one or two places are something else."""
    value = copy.deepcopy(value)
    for _ in range(generator.choice((1, 1, 1, 2))):
        value = _changed(value, generator)
    text = json.dumps(value)
    match generator.randrange(40):
        case 0:
            return generator.choice(("", "[]", "null", "{}", "1", '"a"', "[" * 100_000, '{"a":' * 100_000, "NaN"))
        case 1:
            return text.replace(": ", ": NaN, ", 1) if generator.random() < 0.5 else text.replace("0", "Infinity", 1)
        case 2:  # a key twice
            return text.replace("{", '{"plan": 1, "plan": 2, ', 1)
        case 3:
            return text.replace("1", "1" * 5000, 1)
        case 4:
            return text.replace("null", "[" * 50_000 + "]" * 50_000, 1)
    return text


def _changed(value: Any, generator: random.Random) -> Any:
    places = list(_places(value, ()))
    if not places or generator.random() < 0.02:
        return copy.deepcopy(generator.choice(VALUES))
    path = generator.choice(places)
    owner = value
    for step in path[:-1]:
        owner = owner[step]
    key, present = path[-1], owner[path[-1]]
    match generator.randrange(8):
        case 0 | 1 | 2:
            owner[key] = copy.deepcopy(generator.choice(VALUES))
        case 3 if isinstance(present, int | float):
            owner[key] = generator.choice(
                (present + 1, present - 1, present * 2, -present, float(present), str(present))
            )
        case 3:
            owner[key] = [present]
        case 4:
            del owner[key]
        case 5 if isinstance(owner, dict):
            owner[generator.choice(("extra", "", key + " ", key.upper()))] = copy.deepcopy(present)
        case 5:
            owner.append(copy.deepcopy(present))
        case 6 if isinstance(owner, dict):
            owner[generator.choice(list(owner))] = copy.deepcopy(present)
        case _:
            owner[key] = copy.deepcopy(_at(value, generator.choice(places)))
    return value


def _places(value: Any, path: tuple[Any, ...]) -> Any:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value
