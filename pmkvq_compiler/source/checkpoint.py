"""The safetensors files of a folder, and which file holds each tensor. The choice is the one that transformers makes.

`model.safetensors` takes precedence over an index with shards. All tensors in the shards count, whether the index names
them or not.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmkvq_compiler.errors import CompileError, first_line

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = {
    "adapter_config.json": "an adapter",
    "shard-?????-model-*.safetensors": "a checkpoint of several processes",
}
"""Files that would make transformers load other weights than the model's checkpoint, or additional ones."""
PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Stored dtypes whose numbers are the weights themselves, not codes."""


@dataclass(frozen=True)
class StoredTensor:
    """The file of a tensor, with the dtype (as safetensors names it) and shape in the file's header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors in a model's folder, by their stored names."""

    def __init__(self, folder: Path, named: str | None = None) -> None:
        """Read only the headers. `named` is the file or index of weights that the config names, if there is one.

        Raises `CompileError` if a file is missing, is damaged, lies outside of the folder, or contradicts another file.
        """
        self.folder = folder
        self.files = _weight_files(folder, named)
        self.tensors: dict[str, StoredTensor] = {}
        self._stored_names: Mapping[str, str] = {}
        for file in self.files:
            for name, tensor in _stored_tensors(file).items():
                if name in self.tensors:
                    _check_same(name, self.tensors[name].file, file)
                self.tensors[name] = tensor

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint with only the tensors in `names`, which are called by its values from here on."""
        twin = copy.copy(self)
        twin.tensors = {name: self.tensors[stored] for stored, name in names.items()}
        twin._stored_names = {name: stored for stored, name in names.items()}
        return twin

    def read(self, name: str) -> Tensor:
        """A tensor in its stored dtype. Raises `CompileError` if it cannot be read."""
        return _read(self.tensors[name].file, self._stored_names.get(name, name))

    def slices(self) -> dict[str, Any]:
        """Every tensor as an object that transformers takes for a safetensors slice, read when it is needed."""
        stored = self._stored_names
        return {name: _Slice(stored.get(name, name), tensor) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class _Slice:
    """A tensor as transformers reads it, by its name in the file. The file is opened for this tensor alone: a mapping
    of the whole file would stay in memory as long as any tensor of it is used, and would count as memory of this
    process."""

    name: str
    tensor: StoredTensor

    def __getitem__(self, index: Any) -> Tensor:
        return _read(self.tensor.file, self.name)[index]

    def get_dtype(self) -> str:
        return self.tensor.dtype

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)


def _weight_files(folder: Path, named: str | None) -> list[Path]:
    for pattern, what in OTHER_WEIGHTS.items():
        if any(folder.glob(pattern)):
            raise CompileError(
                f"folder {folder} holds {what} ({pattern}), which would be left out; merge it into the model first"
            )
    if named is not None:
        file = _inside(folder, named, "config.json (transformers_weights)", (".safetensors", ".safetensors.index.json"))
        return _shards(folder, file) if named.endswith(".json") else [file]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise CompileError(_no_weights(folder))
    return _shards(folder, folder / INDEX_FILE)


def _shards(folder: Path, index: Path) -> list[Path]:
    """The files that an index in the folder names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CompileError(f"{index} is not the index of a sharded checkpoint; fetch it again") from error
    if not names:
        raise CompileError(f"{index} names no file; fetch it again")
    return [_inside(folder, name, str(index), (".safetensors",)) for name in names]


def _inside(folder: Path, name: Any, where: str, endings: tuple[str, ...]) -> Path:
    """The file called `name` in a folder. Raises `CompileError` if it lies elsewhere or has another ending."""
    path = PurePosixPath(str(name))
    if path.is_absolute() or ".." in path.parts or not str(name).endswith(endings):
        raise CompileError(f"{where} names {str(name)!r}, which is not a safetensors file of its folder; correct it")
    return folder / path


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"folder {folder} has only pickled weights ({pickles[0]}), and no pickle is ever loaded; "
            f"convert them to safetensors"
        )
    return f"folder {folder} has no {SINGLE_FILE} and no {INDEX_FILE}; fetch the model's weights"


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    if not file.is_file():
        raise CompileError(f"{file} cannot be read: it is missing or not a file; fetch it again")
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
            f"tensor {name} is in {first} and, with other numbers, in {second}; remove the outdated file"
        )
