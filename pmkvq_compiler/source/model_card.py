"""Reads the metadata of a checkpoint's model card if it can be read. No step of the compile needs it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import metadata_load

MOST_BYTES = 1 << 20
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A hub id or the name of a licence. Such text may be copied into other files."""


def read_card(path: Path) -> dict[str, str]:
    """The `license` and `base_model` of a card, without values that are missing, damaged or lists of several."""
    try:
        metadata = metadata_load(path) if path.stat().st_size <= MOST_BYTES else None
    except Exception:  # YAML that people write by hand causes many kinds of errors
        return {}
    found = {}
    for name in ("license", "base_model"):
        value = (metadata or {}).get(name)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, str) and NAME.fullmatch(value):
            found[name] = value
    return found
