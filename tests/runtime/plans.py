"""Cache plans for tests of the runtime, with arenas of exactly the bytes that they need."""

from __future__ import annotations

import dataclasses
from typing import Any

from pmkvq_compiler.runtime.plan import CODE_BITS, CachePlan, LayerPlan, sequence_bytes


def stages_to(key_bits: int, value_bits: int) -> tuple[tuple[int, int], ...]:
    """From the widest codes down, the wider of the two first, V before K."""
    stages = [(CODE_BITS[0], CODE_BITS[0])]
    while stages[-1] != (key_bits, value_bits):
        key, value = stages[-1]
        lower_value = value > value_bits and (value >= key or key == key_bits)
        stages.append((key, value // 2) if lower_value else (key // 2, value))
    return tuple(stages)


def layer_plan(max_len: int = 600, batch_size: int = 1, itemsize: int = 4, **changes: Any) -> LayerPlan:
    """A layer of 3 heads of 64 that ends at K 4 bits, V 2 bits, with `changes`."""
    values: dict[str, Any] = {
        "num_key_value_heads": 3,
        "key_head_dim": 64,
        "value_head_dim": 64,
        "key_bits": 4,
        "value_bits": 2,
        "key_axis": "token",
        "sink": 4,
        "window": 128,
        "block": 64,
        "sliding_window": None,
        **changes,
    }
    if "stages" not in values:
        values["stages"] = stages_to(values["key_bits"], values["value_bits"])
    layer = LayerPlan(**values, arena_bytes=0)
    return dataclasses.replace(layer, arena_bytes=batch_size * sequence_bytes(layer, max_len, itemsize))


def cache_plan(*layers: LayerPlan, max_len: int = 600, batch_size: int = 1) -> CachePlan:
    total = sum(layer.arena_bytes for layer in layers)
    return CachePlan("best", total, max_len, batch_size, "float32", layers)
