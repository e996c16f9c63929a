"""Tests that damage what people's machines may damage, many times over.

`make test` runs a few seconds of each; `make fuzz` runs the long versions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import pytest

LONG = "PMKVQ_FUZZ"
"""The environment variable that `make fuzz` sets."""


def rounds(short: int, long: int) -> int:
    """How often a test is to try: `long` times in `make fuzz`, `short` times elsewhere."""
    return long if os.environ.get(LONG) else short


LONG_ONLY = pytest.mark.skipif(not os.environ.get(LONG), reason="one of many alike; `make fuzz` runs it")


def chosen(names: Iterable[str], *short: str) -> list[str]:
    """The names to test: all of them in `make fuzz`, those in `short` elsewhere."""
    return [name for name in names if name in short or os.environ.get(LONG)]
