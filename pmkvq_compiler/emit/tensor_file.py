"""Writes a safetensors file tensor by tensor; the library's own writer needs all tensors of a file in memory.

The format is the length of a header (8 bytes), the header as JSON, and the bytes of the tensors without gaps. As in the
library, wider dtypes come first, so that every tensor begins at a multiple of its element's size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

ALIGNMENT = 8
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtypes as the format names them."""
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a file: its name, shape and dtype."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def write_tensors(
    path: Path, specs: Sequence[TensorSpec], value: Callable[[TensorSpec], Tensor], metadata: dict[str, str]
) -> None:
    """Write the tensors that `specs` describe; `value` returns the numbers of each. One tensor at a time is in memory.

    Raises `OSError` if the file cannot be written, and whatever `value` raises.
    """
    ordered = sorted(specs, key=lambda one: (-one.dtype.itemsize, one.name))
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for one in ordered:
        stop = start + one.bytes
        header[one.name] = {"dtype": DTYPE_NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for one in ordered:
            _write(file, one, value(one))


def _write(file: BinaryIO, one: TensorSpec, tensor: Tensor) -> None:
    """Write the numbers of a tensor, which is free again when the next one is read."""
    assert (tensor.shape, tensor.dtype) == (one.shape, one.dtype), one.name
    file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
