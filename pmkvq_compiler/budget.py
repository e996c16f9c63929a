"""Memory budgets: from the text that a user writes to a number of bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from pmkvq_compiler.errors import UsageError

UNITS = {"": 1, "b": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SHARES = {"%": Fraction(1, 100), "bit": Fraction(1, 16), "bits": Fraction(1, 16)}
LARGEST_BYTES = 2**50
"""1 PiB: no machine has that much memory, so a request for a larger budget or cache is a mistake."""
LARGEST_SHARE = 100
LONGEST_TEXT = 40
FORMS = "write a size (512MiB, 2GB, 65536bytes), a share of the 16-bit cache (25%) or bits a number (3.2bits)"


@dataclass(frozen=True)
class Budget:
    """A budget as written: either `fixed` bytes or a `share` of the 16-bit cache; the other one is 0."""

    text: str
    fixed: Fraction
    share: Fraction

    def bytes(self, original_bytes: int) -> int:
        """The budget in bytes, rounded down, for a cache that takes `original_bytes` at 16 bits a number.

        Raises `UsageError` if that is less than one byte.
        """
        size = self.fixed + self.share * original_bytes
        if size < 1:
            raise UsageError(f"budget {self.text!r} leaves no byte for the cache; {FORMS}")
        return int(size)


def read_budget(text: str) -> Budget:
    """Parse a budget.

    `512MiB` (or bytes, KB, MB, GB, KiB, GiB; in upper or lower case) is a size, `25%` is a share of the whole cache at
    16 bits a number, and `3.2bits` is `3.2 / 16` of it. Raises `UsageError` for any other text, and for a budget that
    is not positive or that is larger than any machine's memory.
    """
    if len(text) > LONGEST_TEXT:
        raise UsageError(f"budget {text[:LONGEST_TEXT]!r}... is too long to be a budget; {FORMS}")
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
    """`read_budget(text).bytes(original_bytes)`; raises the same errors."""
    return read_budget(text).bytes(original_bytes)
