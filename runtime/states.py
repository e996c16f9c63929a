"""The states of a cache: tensors of fixed size that operations such as convolutions carry from token to token."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import StatePlan


class StateStore:
    """For each planned state a tensor [batch_size, *shape], which is zero before the first token.

    A state is of all tokens at once, so none of them can be taken back.
    """

    def __init__(
        self, plans: Sequence[StatePlan], batch_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        wide = torch.promote_types(dtype, torch.float32)
        self.tensors = {
            (plan.layer, plan.index): torch.zeros(
                batch_size, *plan.shape, dtype=wide if plan.float32 else dtype, device=device
            )
            for plan in plans
        }
        self.overwritten = False
        """Whether the current change has written a state."""

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, layer: int, index: int) -> Tensor:
        """The state [B, *shape] with this `index` in the model's layer `layer`."""
        return self.tensors[layer, index]

    def write(self, layer: int, index: int, state: Tensor) -> None:
        """Put a new state in the place of the old one, in the same memory."""
        self.overwritten = True
        self.tensors[layer, index].copy_(state)

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget all tokens."""
        self.overwritten = bool(self.tensors)
        for tensor in self.tensors.values():
            tensor.zero_()

    @torch.inference_mode()
    def reorder(self, sequences: Sequence[int]) -> None:
        """Let every sequence i have the states that `sequences[i]` had."""
        self.overwritten = bool(self.tensors)
        self.take(self, sequences)

    @torch.inference_mode()
    def take(self, source: StateStore, sequences: Sequence[int]) -> None:
        """Copy the states of `sequences` from the states `source` of the same plan."""
        for name, tensor in self.tensors.items():
            tensor.copy_(source.tensors[name][list(sequences)])

    def copy_on(self, device: torch.device | str | None = None) -> StateStore:
        """The same states in memory of their own on a device (by default their own)."""
        twin = StateStore.__new__(StateStore)
        twin.tensors = {name: tensor.to(device or tensor.device, copy=True) for name, tensor in self.tensors.items()}
        twin.overwritten = self.overwritten
        return twin

    def __copy__(self) -> StateStore:
        return self.copy_on()

    def __deepcopy__(self, memo: dict[int, Any]) -> StateStore:
        return self.copy_on()

    def __getstate__(self) -> dict[str, Any]:
        """The states are pickled as bytes: a tensor would be shared with the receiving process."""
        content = io.BytesIO()
        torch.save([tensor.cpu() for tensor in self.tensors.values()], content)
        return {"names": list(self.tensors), "content": content.getvalue()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the states on the CPU; the cache that they belong to moves them to its device."""
        loaded = torch.load(io.BytesIO(state["content"]), weights_only=True)
        self.tensors = dict(zip(state["names"], loaded, strict=True))
        self.overwritten = False
