"""Checks, without reading any weight, that transformers takes a checkpoint's tensors as they are.

A model that is streamed is not loaded by transformers. So transformers loads it once with numbers that say where they
come from: each stored tensor is replaced by one that has its own number in every row, plus the row's index. All columns
share the same memory, so a model of any size takes a few megabytes. If transformers renamed, reordered, joined or
converted tensors while it loads them, other numbers than expected come out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pmkvq_compiler.source.checkpoint import StoredTensor

ROWS = 1 << 32
"""No tensor has more rows."""


def coded_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """A tensor of float64 with the shape of each stored one."""
    return {name: _coded(number, tensor.shape) for number, (name, tensor) in enumerate(tensors.items(), 1)}


def _coded(number: int, shape: tuple[int, ...]) -> Tensor:
    if not shape:
        return torch.tensor(float(number * ROWS), dtype=torch.float64)
    rows = number * ROWS + torch.arange(shape[0], dtype=torch.float64)
    return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def changed_tensors(model: nn.Module, codes: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    """The tensors of a model that was loaded from `codes` that are not the ones stored under their `names`.

    Tensors that the model keeps in another dtype are compared by their rows, as far as their dtype tells them.
    """
    state = model.state_dict()
    return [name for name, stored in names.items() if not _same(state[name], codes[stored])]


def _same(value: Tensor, code: Tensor) -> bool:
    if value.shape != code.shape:
        return False
    shared = value.stride()[1:] == code.stride()[1:] or value.dtype != code.dtype
    return shared and torch.equal(_rows(value).to(code.dtype), _rows(code).to(value.dtype).to(code.dtype))


def _rows(tensor: Tensor) -> Tensor:
    """The first number of each row, without a copy of the others."""
    while tensor.dim() > 1:
        tensor = tensor[:, 0]
    return tensor
