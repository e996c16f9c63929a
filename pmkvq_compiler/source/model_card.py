"""The metadata of a checkpoint's model card, as far as it can be read: nothing depends on it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import metadata_load

MOST_BYTES = 1 << 20
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A hub id, or the name of a license: what may be written into other files as it is."""


def read_card(path: Path) -> dict[str, str]:
    """What a card says of `license` and `base_model`; without what is missing, damaged, or several things at once."""
    try:
        metadata = metadata_load(path) if path.stat().st_size <= MOST_BYTES else None
    except Exception:  # YAML that people write by hand ends in many kinds of errors
        return {}
    found = {}
    for name in ("license", "base_model"):
        value = (metadata or {}).get(name)
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if isinstance(value, str) and NAME.fullmatch(value):
            found[name] = value
    return found
