"""RoPE whose frequencies change with the length of the text, and the length up to which they do not.

When frequencies change, keys that are already cached become wrong. So such models are compiled for texts in which their
first frequencies hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

CHANGING = ("dynamic", "longrope")
"""The types of RoPE whose frequencies change."""


@dataclass(frozen=True)
class FixedFrequencies:
    """The `rope_type` of a model and the number of tokens, at least 1, up to which its frequencies stay the same."""

    rope_type: str
    tokens: int


def fixed_frequencies(config: PretrainedConfig) -> FixedFrequencies | None:
    """Up to which length the frequencies of all layers stay the same; None if they never change."""
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    found = []
    for parameters in _rope_parameters(getattr(text, "rope_parameters", None) or {}):
        rope_type = parameters["rope_type"]
        original = parameters.get("original_max_position_embeddings") if rope_type == "longrope" else None
        tokens = original or positions
        if rope_type in CHANGING and isinstance(tokens, int):
            found.append(FixedFrequencies(rope_type, max(1, tokens)))
    return min(found, key=lambda fixed: fixed.tokens, default=None)


def fix_frequencies(model: PreTrainedModel) -> None:
    """Keep the frequencies that `model` begins with."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, dict):
            module.rope_type = {layers: _fixed(kind) for layers, kind in rope_type.items()}  # type: ignore[assignment]
        elif isinstance(rope_type, str):
            module.rope_type = _fixed(rope_type)  # type: ignore[assignment]


def _fixed(rope_type: str) -> str:
    return "default" if rope_type in CHANGING else rope_type


def _rope_parameters(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters of all layers, or of each type of layer if these differ."""
    if "rope_type" in parameters:
        yield parameters
    for value in parameters.values():
        if isinstance(value, dict):
            yield from _rope_parameters(value)
