"""The bit plan: what each layer's cache looks like, and how many bytes that takes.

Everything that counts bytes is here, once: the planner chooses with these functions, the cache allocates with them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from .records import Record, row_numbers

KeyAxis = Literal["token", "channel"]

CODE_BITS = (16, 8, 4, 2)
"""The widths that codes may have, widest first; nothing else lists them. Each is half of the one before, because
lowering a code keeps its upper half. A layer begins at the first width."""

FINAL_BITS = CODE_BITS[1:]
"""The widths that a layer may end at."""

ALIGNMENT = 16
"""The arena of a head begins and ends at a multiple of this many bytes."""


def first_seen(position: Any, window: int | None, chunked: bool) -> Any:
    """The first position that a query at `position`, an integer or a tensor of integers, may see. With a window that
    slides it may be negative."""
    if window is None:
        return 0 * position
    return position // window * window if chunked else position - window + 1


@dataclass(frozen=True)
class LayerPlan:
    """The cache of one layer.

    A sequence's tokens are kept as `[sink | blocks | window]`: the first `sink` tokens and the up to `window` most
    recent ones in the model's dtype, everything between as quantized blocks of `block` tokens. `key_bits` and
    `value_bits` are the final widths; `stages` are the (key, value) widths that the layer passes through, widest
    first, ending at the final ones. A layer with no stages is never quantized: its window holds every token (`--recipe
    none`).

    `key_axis` says which numbers of K share a group: one token of one head ("token"), or one channel over one block
    ("channel"). V is always grouped by token. A `sliding_window` layer keeps only what its window can still see. If it
    is `chunked`, the window does not slide: a query sees the tokens before it in its own chunk of `sliding_window`
    tokens.
    `arena_bytes` is the layer's whole share of the budget, for all sequences of the plan.
    """

    num_key_value_heads: int
    key_head_dim: int
    value_head_dim: int
    key_bits: int
    value_bits: int
    key_axis: KeyAxis
    sink: int
    window: int
    block: int
    sliding_window: int | None
    stages: tuple[tuple[int, int], ...]
    arena_bytes: int
    chunked: bool = False

    def first_seen(self, position: Any) -> Any:
        """The first position that a query at `position` may see; see the function of this name."""
        return first_seen(position, self.sliding_window, self.chunked)

    @property
    def quantized(self) -> bool:
        return bool(self.stages)

    @property
    def record(self) -> Record:
        """The layout of a quantized block of one head."""
        return Record(self.block, self.key_head_dim, self.value_head_dim, key_by_channel=self.key_axis == "channel")


@dataclass(frozen=True)
class StatePlan:
    """A state that an operation carries from token to token: a tensor of `shape` for each sequence, of any length.

    It is the state `index` (from 0 on) of the model's layer `layer`. `float32` says that the model keeps it in float32;
    otherwise it is in the model's own dtype.
    """

    layer: int
    index: int
    shape: tuple[int, ...]
    float32: bool

    def nbytes(self, itemsize: int) -> int:
        """Bytes for one sequence, where numbers of the model's own dtype take `itemsize` bytes."""
        return math.prod(self.shape) * (max(4, itemsize) if self.float32 else itemsize)

    @property
    def is_recurrence(self) -> bool:
        """Whether it is that of a linear recurrence, a matrix for each head. A convolution keeps its last inputs."""
        return len(self.shape) == 3


@dataclass(frozen=True)
class CachePlan:
    """The caches of all attention layers, made for `batch_size` sequences of `max_len` tokens within `budget` bytes.

    `dtype` names the model's own dtype ("float32", "bfloat16", "float16"), in which sink and window are kept.
    `attention_layers` are the indices in the model of the layers with attention; it is empty if all layers have one.
    `states` are fixed in size and not part of the budget.
    """

    recipe: str
    budget: int
    max_len: int
    batch_size: int
    dtype: str
    layers: tuple[LayerPlan, ...]
    attention_layers: tuple[int, ...] = ()
    states: tuple[StatePlan, ...] = ()

    @property
    def arena_bytes(self) -> int:
        return sum(layer.arena_bytes for layer in self.layers)

    @property
    def places(self) -> dict[int, int]:
        """For the index in the model of each layer with attention, its place in `layers`."""
        indices = self.attention_layers or range(len(self.layers))
        return {index: place for place, index in enumerate(indices)}

    def state_bytes(self, itemsize: int, batch_size: int | None = None) -> int:
        """Bytes of all states of `batch_size` sequences (by default the plan's), for a model's dtype of `itemsize`."""
        return (batch_size or self.batch_size) * sum(state.nbytes(itemsize) for state in self.states)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> CachePlan:
        def layer(entry: dict[str, Any]) -> LayerPlan:
            return LayerPlan(**{**entry, "stages": tuple((key, value) for key, value in entry["stages"])})

        states = (StatePlan(**{**entry, "shape": tuple(entry["shape"])}) for entry in data.get("states", ()))
        own = {"attention_layers": tuple(data.get("attention_layers", ())), "states": tuple(states)}
        return cls(**{**data, "layers": tuple(layer(entry) for entry in data["layers"]), **own})


def block_bytes(layer: LayerPlan, key_bits: int, value_bits: int) -> int:
    """Bytes of one quantized block of one head: K and V codes and the parameters of their groups."""
    return layer.record.nbytes(key_bits, value_bits)


def buffer_bytes(layer: LayerPlan, itemsize: int) -> int:
    """Bytes of sink and window of one head, in a dtype of `itemsize` bytes."""
    row = sum(row_numbers(layer.key_head_dim, layer.value_head_dim).values())
    return (layer.sink + layer.window) * row * itemsize


def blocks_needed(layer: LayerPlan, max_len: int) -> int:
    """Quantized blocks that a sequence of `max_len` tokens holds at most.

    A full window flushes its oldest block when the next token arrives, so it keeps at least `window - block + 1` recent
    tokens. A sliding-window layer needs no token that has left its window.
    """
    if not layer.quantized:
        return 0
    tokens = max_len - layer.sink - layer.window
    if layer.sliding_window is not None:
        tokens = min(tokens, layer.sliding_window - (layer.window - layer.block + 1))
    return max(0, -(-tokens // layer.block))


def flushed_blocks(layer: LayerPlan, length: int) -> int:
    """Blocks that a sequence of `length` tokens has flushed from its window, including those that a sliding window no
    longer sees."""
    return max(0, -(-(length - layer.sink - layer.window) // layer.block))


def head_bytes(layer: LayerPlan, max_len: int, batch_size: int, itemsize: int) -> int:
    """Bytes of the arena of one sequence and head: its share of the layer's bytes, or what it can use if that is
    less."""
    if not blocks_needed(layer, max_len):
        return buffer_bytes(layer, itemsize) // ALIGNMENT * ALIGNMENT
    widest = sequence_bytes(layer, max_len, itemsize, stage=0)
    share = min(layer.arena_bytes // batch_size, widest)
    return share // layer.num_key_value_heads // ALIGNMENT * ALIGNMENT


def pool_blocks(layer: LayerPlan, head_bytes: int, itemsize: int, stage: tuple[int, int]) -> int:
    """Quantized blocks of the widths `stage` that an arena of `head_bytes` holds beside sink and window."""
    return (head_bytes - buffer_bytes(layer, itemsize)) // block_bytes(layer, *stage)


def sequence_bytes(layer: LayerPlan, max_len: int, itemsize: int, stage: int = -1) -> int:
    """Bytes that one sequence of `max_len` tokens takes in this layer at a stage (by default the final one)."""
    pool = blocks_needed(layer, max_len) * block_bytes(layer, *layer.stages[stage]) if layer.quantized else 0
    return layer.num_key_value_heads * (buffer_bytes(layer, itemsize) + pool)


def original_bytes(layer: LayerPlan, max_len: int) -> int:
    """Bytes of the same layer's cache at 16 bits a number, the yardstick of budgets given as `25%` or `3.2bits`."""
    tokens = max_len if layer.sliding_window is None else min(max_len, layer.sliding_window)
    return layer.num_key_value_heads * tokens * (layer.key_head_dim + layer.value_head_dim) * 2


def fitted(layer: LayerPlan, max_len: int) -> LayerPlan:
    """The same layer for sequences of at most `max_len` tokens: a window longer than that would be wasted."""
    return dataclasses.replace(layer, window=min(layer.window, max(1, max_len - layer.sink)))


def longest(plan: CachePlan, batch_size: int, itemsize: int) -> int:
    """The most tokens that each of `batch_size` sequences may have within the plan's arenas; 0 if none fit."""

    def fits(max_len: int) -> bool:
        return all(
            batch_size * sequence_bytes(fitted(layer, max_len), max_len, itemsize) <= layer.arena_bytes
            for layer in plan.layers
        )

    low, high = 0, plan.max_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
