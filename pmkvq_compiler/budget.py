"""A memory budget as a user writes it, in bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from pmkvq_compiler.errors import UsageError

UNITS = {"": 1, "b": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SHARES = {"%": Fraction(1, 100), "bit": Fraction(1, 16), "bits": Fraction(1, 16)}
LARGEST_BYTES = 2**50
"""1 PiB: no machine has that much memory, so a larger budget or cache is a mistake of the request."""
LARGEST_SHARE = 100
LONGEST_TEXT = 40
FORMS = "write a size (512MiB, 2GB, 65536bytes), a share of the 16-bit cache (25%) or true bits a number (3.2bits)"


@dataclass(frozen=True)
class Budget:
    """What a budget's text says: so many bytes, and so large a `share` of the 16-bit cache; one of them is 0."""

    text: str
    fixed: Fraction
    share: Fraction

    def bytes(self, original_bytes: int) -> int:
        """The bytes that it stands for, rounded down, where the whole cache at 16 bits has `original_bytes`.

        Raises `UsageError` where that is less than one byte.
        """
        size = self.fixed + self.share * original_bytes
        if size < 1:
            raise UsageError(f"budget {self.text!r} leaves no byte for the cache; {FORMS}")
        return int(size)


def read_budget(text: str) -> Budget:
    """The budget that `text` stands for.

    `512MiB` (bytes, KB, MB, GB, KiB, MiB, GiB; upper and lower case alike) is a size, `25%` a share of the whole cache
    at 16 bits a number, and `3.2bits` is `3.2 / 16` of it. Raises `UsageError` for anything else, and for what is not
    above 0 or larger than any machine's memory.
    """
    if len(text) > LONGEST_TEXT:
        raise UsageError(f"budget {text[:LONGEST_TEXT]!r}... is too long to be one; {FORMS}")
    match = re.fullmatch(r"([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*(%|[a-z]*)", text.strip().lower())
    if match is None:
        raise UsageError(f"budget {text!r} is not understood; {FORMS}")
    number, unit = Fraction(match[1]), match[2]
    if unit not in UNITS and unit not in SHARES:
        raise UsageError(f"budget {text!r} has the unknown unit {unit!r}; {FORMS}")
    if number <= 0:
        raise UsageError(f"budget {text!r} leaves no byte for the cache; {FORMS}")
    budget = Budget(text, number * UNITS.get(unit, 0), number * SHARES.get(unit, 0))
    if budget.fixed > LARGEST_BYTES or budget.share > LARGEST_SHARE:
        raise UsageError(f"budget {text!r} is more than any machine holds; {FORMS}")
    return budget


def parse_budget(text: str, original_bytes: int) -> int:
    """`read_budget(text).bytes(original_bytes)`; raises what these raise."""
    return read_budget(text).bytes(original_bytes)
