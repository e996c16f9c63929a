"""Reads the header of a GGUF file. Every length is checked against the file, so no header can hang or exhaust memory.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pmkvq_compiler.errors import CompileError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = "general.alignment"
NUMBERS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the tensor table: `shape` as in PyTorch, number format, and place (`start`, `bytes`) in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The contents of a header: values by key, and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file. Raises `CompileError` if it is damaged or points outside of the file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (OSError, ValueError, struct.error, OverflowError, MemoryError) as error:
        raise CompileError(f"{path} cannot be used: {error or type(error).__name__}; fetch the file again") from error


class _Reader:
    """Reads one value after another. Raises `ValueError` or `struct.error` if the bytes are not a valid value."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    def header(self) -> GgufHeader:
        if self.data[:4] != MAGIC:
            raise ValueError("it does not begin like a GGUF file")
        self.position = len(MAGIC)
        version, tensor_count, field_count = self.number("I"), self.number("Q"), self.number("Q")
        if version not in VERSIONS:
            raise ValueError(f"it is GGUF of version {version}, but only versions 2 and 3 are supported")
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self.text()
            if key in fields:
                raise ValueError(f"its header has the key {key!r} twice")
            fields[key] = self.value(GGUFValueType(self.number("I")))
        entries = [self.entry() for _ in range(tensor_count)]
        alignment = fields.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"its {ALIGNMENT} is {alignment!r}, which is not a number of bytes")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        place = 0
        for name, shape, type_, offset in entries:
            if offset != place or name in tensors:
                raise ValueError(f"its header has tensor {name} twice, or not directly after the tensor before it")
            tensors[name] = self.placed(name, shape, type_, start + offset)
            place += -(-tensors[name].bytes // alignment) * alignment
        return GgufHeader(fields, tensors)

    def number(self, format_: str) -> Any:
        (value,) = struct.unpack_from(f"<{format_}", self.data, self.position)
        self.position += struct.calcsize(f"<{format_}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.within(length)
        value = self.data[self.position : self.position + length].decode()
        self.position += length
        return value

    def value(self, type_: GGUFValueType) -> Any:
        if type_ == GGUFValueType.STRING:
            return self.text()
        if type_ != GGUFValueType.ARRAY:
            return self.number(NUMBERS[type_])
        element, count = GGUFValueType(self.number("I")), self.number("Q")
        if element == GGUFValueType.ARRAY:
            raise ValueError("its header has arrays of arrays, which no model file has")
        if element == GGUFValueType.STRING:
            self.within(8 * count)
            return [self.text() for _ in range(count)]
        format_ = NUMBERS[element]
        self.within(count * struct.calcsize(f"<{format_}"))
        values = struct.unpack_from(f"<{count}{format_}", self.data, self.position)
        self.position += count * struct.calcsize(f"<{format_}")
        return list(values)

    def entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, GGMLQuantizationType(self.number("I")), self.number("Q")

    def placed(self, name: str, shape: tuple[int, ...], type_: GGMLQuantizationType, start: int) -> GgufTensor:
        block, size = GGML_QUANT_SIZES[type_]
        if shape[-1] % block or 0 in shape:
            raise ValueError(f"tensor {name} has shape {list(shape)}, which does not hold whole {type_.name} blocks")
        bytes_ = math.prod(shape) // block * size
        if start + bytes_ > len(self.data):
            raise ValueError(f"tensor {name} ends after the end of the file, which is cut off")
        return GgufTensor(shape, type_, start, bytes_)

    def within(self, length: int) -> None:
        if length > len(self.data) - self.position:
            raise ValueError("its header ends after the end of the file")
