"""Tests that damage what people's machines may damage, many times over.

`make test` runs a few seconds of each; `make fuzz` runs the long versions.
"""

from __future__ import annotations

import os

LONG = "PMKVQ_FUZZ"
"""The environment variable that `make fuzz` sets."""


def rounds(short: int, long: int) -> int:
    """How often a test is to try: `long` times in `make fuzz`, `short` times elsewhere."""
    return long if os.environ.get(LONG) else short
