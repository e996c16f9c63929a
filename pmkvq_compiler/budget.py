"""A memory budget as a user writes it, in bytes."""

from __future__ import annotations

import re

from .errors import UsageError

UNITS = {"": 1, "b": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
FORMS = "write a size (512MiB, 2GB, 65536bytes), a share of the 16-bit cache (25%) or true bits a number (3.2bits)"


def parse_budget(text: str, original_bytes: int) -> int:
    """The bytes that `text` stands for, rounded down.

    `512MiB` (bytes, KB, MB, GB, KiB, MiB, GiB; upper and lower case alike) is itself; `25%` is a share of
    `original_bytes`, the whole cache at 16 bits a number; `3.2bits` is `3.2 / 16` of it. Raises `UsageError` for
    anything else, and for a budget below one byte.
    """
    match = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+))\s*(%|[a-z]*)", text.strip().lower())
    if match is None:
        raise UsageError(f"budget {text!r} is not understood; {FORMS}")
    number, unit = float(match[1]), match[2]
    if unit == "%":
        size = number / 100 * original_bytes
    elif unit in ("bit", "bits"):
        size = number / 16 * original_bytes
    elif unit in UNITS:
        size = number * UNITS[unit]
    else:
        raise UsageError(f"budget {text!r} has the unknown unit {unit!r}; {FORMS}")
    if size < 1:
        raise UsageError(f"budget {text!r} leaves no byte for the cache; {FORMS}")
    return int(size)
