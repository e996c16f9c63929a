"""Where everything lies that a cache keeps on its device.

    arena of a sequence and head    [rows of K | rows of V | pool of records]
    record of a block               [K parameters | V parameters | K codes | V codes]
    state, a column a sequence      [length | start | count | reached]

Rows are the tokens of sink and window in the model's dtype. This is written here alone: the cache makes its views with
it, the plan counts bytes with it, the generated kernels have it as constants, and the ONNX function takes the shapes of
its tensors from it. Put a tuple below in another order, and all of them follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

PARAMETER_BITS = 16
"""Bits of a group's middle and range, a byte each."""

RowsName = Literal["keys", "values"]
FieldName = Literal["key_parameters", "value_parameters", "key_codes", "value_codes"]
StateName = Literal["length", "start", "count", "reached"]

ROWS: tuple[RowsName, ...] = ("keys", "values")
"""The rows of an arena, in their order. The pool follows and takes what they leave."""

FIELDS: tuple[FieldName, ...] = ("key_parameters", "value_parameters", "key_codes", "value_codes")
"""The fields of a record, in their order. Parameters of K and V are neighbours: lowering moves them as one."""

STATE: tuple[StateName, ...] = ("length", "start", "count", "reached")
"""The rows of `state` (int32), by which kernels know each sequence: its length before the call, the first column and
the count of its own tokens in the call, and a length that it has had and that says how many blocks every layer has
flushed."""


def state_row(name: StateName) -> int:
    """The row of `state` [len(STATE), B] with this name."""
    return STATE.index(name)


def state_rows(told: Mapping[StateName, list[int]]) -> list[list[int]]:
    """What `state` is to hold, in the order of its rows."""
    return [told[name] for name in STATE]


@dataclass(frozen=True)
class Field:
    """A field of a record: `lines` of `numbers`, which are parameters, codes of K or codes of V."""

    lines: int
    numbers: int
    kind: Literal["parameter", "key", "value"]

    def bits(self, key_bits: int, value_bits: int) -> int:
        """Bits that the field takes where codes of K and V have these widths."""
        width = {"parameter": PARAMETER_BITS, "key": key_bits, "value": value_bits}[self.kind]
        return self.lines * self.numbers * width


@dataclass(frozen=True)
class Record:
    """The layout of a record: a quantized block of `block` tokens of one head.

    K is packed along the channels of a token, V along the tokens of a channel. A group of K is a channel of the block
    where keys go `key_by_channel`, else a token; a group of V is a token.
    """

    block: int
    key_head_dim: int
    value_head_dim: int
    key_by_channel: bool

    @property
    def key_groups(self) -> int:
        """Groups of K in a block."""
        return self.key_head_dim if self.key_by_channel else self.block

    @property
    def fields(self) -> dict[FieldName, Field]:
        """The fields by name, in the order in which they lie."""
        shapes: dict[FieldName, Field] = {
            "key_parameters": Field(1, self.key_groups, "parameter"),
            "value_parameters": Field(1, self.block, "parameter"),
            "key_codes": Field(self.block, self.key_head_dim, "key"),
            "value_codes": Field(self.value_head_dim, self.block, "value"),
        }
        return {name: shapes[name] for name in FIELDS}

    def before(self, name: FieldName) -> list[Field]:
        """The fields that lie before one."""
        fields = self.fields
        return [fields[other] for other in FIELDS[: FIELDS.index(name)]]

    def nbytes(self, key_bits: int, value_bits: int) -> int:
        """Bytes of a record whose codes of K and V have these widths."""
        return sum(field.bits(key_bits, value_bits) for field in self.fields.values()) // 8


def row_numbers(key_head_dim: int, value_head_dim: int) -> dict[RowsName, int]:
    """Numbers of one row of K and of V, in the order in which their rows lie in an arena."""
    numbers: dict[RowsName, int] = {"keys": key_head_dim, "values": value_head_dim}
    return {name: numbers[name] for name in ROWS}
