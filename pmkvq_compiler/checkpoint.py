"""The safetensors files of a folder, and which of them holds a tensor: what transformers would choose, made explicit.

`model.safetensors` comes before an index and its shards. All that the shards hold counts, named by the index or not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CompileError, first_line

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored dtypes whose numbers are the weights themselves."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what its header says: `dtype` in the words of safetensors."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a model's folder by the names that they are stored under."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers alone. Raises `CompileError` where a file is missing, damaged or contradicts another."""
        self.files = _weight_files(folder)
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, tensor in _stored_tensors(file).items():
                if name in self.tensors:
                    _check_same(name, self.tensors[name].file, file)
                self.tensors[name] = tensor

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype."""
        return _read(self.tensors[name].file, name)

    def slices(self) -> dict[str, Any]:
        """Every tensor in the form in which transformers takes a checkpoint: not read before it is needed."""
        opened = {file: safe_open(file, framework="pt") for file in self.files}
        return {name: opened[tensor.file].get_slice(name) for name, tensor in self.tensors.items()}


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if (folder / ADAPTER_FILE).is_file():
        raise CompileError(
            f"folder {folder} holds an adapter ({ADAPTER_FILE}), which would be left out; merge it into its base model"
        )
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CompileError(_no_weights(folder))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [PurePosixPath(name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CompileError(f"{index} is not the index of a sharded checkpoint; fetch it again") from error
    for path in paths:
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors":
            raise CompileError(f"{index} names {str(path)!r}, which is no safetensors file of its folder; correct it")
    if not paths:
        raise CompileError(f"{index} names no file; fetch it again")
    return [folder / path for path in paths]


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"folder {folder} has only pickled weights ({pickles[0]}) and no pickle is ever loaded; "
            f"convert them to safetensors"
        )
    return f"folder {folder} has no {SINGLE_FILE} and no {INDEX_FILE}; fetch the model's weights"


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise CompileError(f"{file} cannot be read: it is missing or no file; fetch it again")
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: StoredTensor(file, str(part.get_dtype()), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CompileError(f"{file} cannot be read: {first_line(error)}; fetch it again") from error


def _read(file: Path, name: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CompileError(f"{file} cannot be read: {first_line(error)}; fetch it again") from error


def _check_same(name: str, first: Path, second: Path) -> None:
    one, other = _read(first, name), _read(second, name)
    if one.dtype != other.dtype or not torch.equal(one, other):
        raise CompileError(
            f"tensor {name} is in {first} and, with other numbers, in {second}; remove the file that is out of date"
        )
