"""Damage with a seed: to bytes, as disks and downloads do it, and to JSON, as editors and other programs do it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three changes; never `data` itself."""
    changed = data
    while changed == data:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            changed = rng.choice(BYTE_CHANGES)(changed, rng)
    return changed


def mutate_json(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one or two changes somewhere inside."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2))):
        if root:  # a first change may take the whole value
            holder, key = rng.choice(_places(root))
            holder[key] = _other(holder[key], rng)
            _rearrange(holder, key, rng)
    return root[0] if root else None


def mutate_json_text(value: Any, rng: random.Random) -> str:
    """The text of `mutate_json`; sometimes one that is no JSON, or none that a reader should follow to its end."""
    text = json.dumps(mutate_json(value, rng))
    match rng.randrange(40):
        case 0:
            return rng.choice(("", "[]", "null", "{}", "1", '"a"', "[" * 100_000, '{"a":' * 100_000, "NaN"))
        case 1:
            return text.replace(": ", ": NaN, ", 1) if rng.random() < 0.5 else text.replace("0", "Infinity", 1)
        case 2:  # a key twice
            return text.replace("{", '{"plan": 1, "plan": 2, ', 1)
        case 3:
            return text.replace("1", "1" * 5000, 1)
        case 4:
            return text.replace("null", "[" * 50_000 + "]" * 50_000, 1)
    return text


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three bits turned over: as long as before."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = _flip(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) or 1)
    return data[:place] + bytes([byte ^ 1 << rng.randrange(8) for byte in data[place : place + 1]]) + data[place + 1 :]


def _zero(data: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(data) or 1), rng.choice((1, 8, 64, 1000))
    return data[:place] + bytes(len(data[place : place + length])) + data[place + length :]


def _replace(data: bytes, rng: random.Random) -> bytes:
    place, length = rng.randrange(len(data) or 1), rng.randrange(1, 9)
    filler = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:place] + filler + data[place + length :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) or 1)
    return data[:place] + data[place + rng.randrange(1, 65) :]


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) or 1)]


def _behead(data: bytes, rng: random.Random) -> bytes:
    return data[rng.randrange(len(data) or 1) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) or 1)
    return data[:place] + data[place : place + rng.randrange(1, 65)] + data[place:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) or 1)
    return data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:]


def _extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 65))


def _whole(data: bytes, rng: random.Random) -> bytes:
    """Nothing, everything twice, or a mark of an encoding in front."""
    return rng.choice((b"", data + data, b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, data + b"\0"))


def _digit(data: bytes, rng: random.Random) -> bytes:
    """Another digit, if there is one."""
    places = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
    if not places:
        return data
    place = rng.choice(places)
    return data[:place] + rng.choice("0123456789-.e").encode() + data[place + 1 :]


BYTE_CHANGES: list[Callable[[bytes, random.Random], bytes]] = [
    _flip,
    _flip,
    _zero,
    _replace,
    _cut,
    _truncate,
    _behead,
    _repeat,
    _insert,
    _extend,
    _digit,
    _whole,
]

ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    1.5,
    1 << 31,
    1 << 63,
    10**12,
    -(10**12),
    10**40,
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "x",
    "../../x",
    "/etc/passwd",
    "caf\u00e9 \u6f22\u5b57 \u0000",
    "x" * 5000,
    "0" * 64,
    "\U0001f433\ud800",
    [],
    [[]],
    [1],
    [None],
    [[16, 16]] * 3,
    {},
    {"": 0},
    {"a": {"a": {}}},
]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    places, containers = [], [root]
    while containers:
        container = containers.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], (dict, list)):
                containers.append(container[key])
    return places


def _other(value: Any, rng: random.Random) -> Any:
    choice = rng.randrange(6)
    if choice == 0 and type(value) in (int, float):
        return value + rng.choice((-1, 1))
    if choice == 1 and type(value) in (int, float):
        return value * rng.choice((-1, 0.5, 2, 10, 1 << 40))
    if choice == 2:
        return rng.choice((str(value), [value], {"value": value}))
    if choice == 3:
        deep: Any = value
        for _ in range(rng.choice((3, 50, 200))):
            deep = [deep]
        return deep
    return copy.deepcopy(rng.choice(ODD_VALUES))


def _rearrange(holder: Any, key: Any, rng: random.Random) -> None:
    """Sometimes the value goes, or is given to another name, or changes places, or is there twice."""
    choice = rng.randrange(8)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[rng.choice((f"{key}_", f"_{key}", str(key)[:-1], "auto_map", "quantization_config"))] = holder.pop(key)
    elif choice == 2:
        other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif choice == 3 and isinstance(holder, dict):
        holder[rng.choice(("extra", "", str(key).upper(), *holder))] = copy.deepcopy(holder[key])
    elif choice == 3:
        holder.append(copy.deepcopy(holder[key]))
