"""Runs an artifact on a device that may not have room for its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pmkvq_compiler import runtime

RESERVE = 1 << 30
"""The bytes of a device that its libraries and the hidden states of a text take."""

LARGEST_COPIES = 8
"""The bytes that the computing device needs for each number of the largest weight, which is copied there and widened to
float32."""


@dataclass(frozen=True)
class Fetched(Mapping[str, Tensor]):
    """Weights that are copied to a device when they are read, and converted to a dtype if it is given. Constants that
    are no floating point numbers keep their dtype."""

    stored: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.stored[name].to(self.device)
        return tensor.to(self.dtype) if self.dtype is not None and tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def load_anyhow(folder: str | Path, rooms: Mapping[str, int]) -> runtime.CompiledModel:
    """The artifact in `folder`, without kernels. It computes on the first of the devices in `rooms`, which have so many
    bytes free.

    Its weights lie on the devices in this order, as far as there is room, and the others stay in their files, which are
    mapped. They are copied to the first device whenever they are needed.
    """
    model = runtime.load(folder, "cpu", backend="reference")
    device = torch.device(next(iter(rooms)))
    stored = placed(model.weights, _left(rooms, max(tensor.numel() for tensor in model.weights.values())))
    bind = model.hidden_states.func.__globals__["bind"]  # type: ignore[attr-defined]
    hidden_states, logits = bind(Fetched(stored, device))
    return replace(model, weights=stored, hidden_states=hidden_states, logits=logits, device=device)


def _left(rooms: Mapping[str, int], largest: int) -> dict[str, int]:
    """The bytes for weights on each device; the largest weight has so many numbers."""
    first, *_ = rooms
    working = {first: LARGEST_COPIES * largest}
    return {device: room - RESERVE - working.get(device, 0) for device, room in rooms.items()}


def placed(weights: Mapping[str, Tensor], rooms: Mapping[str, int]) -> dict[str, Tensor]:
    """The weights, each on the first device that has room for it, or where it was."""
    left, found = dict(rooms), dict[str, Tensor]()
    for name, tensor in weights.items():
        device = next((device for device, room in left.items() if tensor.nbytes <= room), None)
        if device is not None:
            left[device] -= tensor.nbytes
        found[name] = tensor if device is None else tensor.to(device)
    return found
