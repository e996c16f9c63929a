"""What an attention mask lets a query see, found by trying the function of positions that describes the mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pmkvq_compiler.runtime.plan import first_seen


@dataclass(frozen=True)
class Sight:
    """A query sees the last `window` tokens up to itself, or all if that is 0. If `chunked`, it sees those before it in
    its own chunk of `window` tokens."""

    window: int
    chunked: bool = False


def sight_of(mask: Callable[..., Tensor] | None, positions: int, chunk: int | None = None) -> Sight:
    """What a mask function of transformers lets queries at the first `positions` see; `chunk` is the length of the
    config's chunks.

    Raises `ValueError` if the mask is neither causal nor a causal window.
    """
    if mask is None:
        raise ValueError("it was not made by transformers' masking functions")
    zero, keys = torch.tensor(0), torch.arange(positions)

    def row(query: int) -> Tensor:
        with _WithoutPadding(chunk is not None):
            return torch.as_tensor(mask(zero, zero, torch.tensor(query), keys)).expand(positions)

    if bool(row(0)[1:].any()):
        raise ValueError("tokens see those that come after them")
    window = int(row(positions - 1).sum())
    if window == 0:
        raise ValueError("tokens do not even see themselves")
    in_chunks = chunk is not None and chunk < positions and not bool(row(chunk)[chunk - 1])
    sight = Sight(chunk, True) if chunk is not None and in_chunks else Sight(0 if window == positions else window)
    size = sight.window or positions
    edges = {0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, positions // 2, positions // 3, positions - 2}
    for query in sorted(edges & set(range(positions))):
        if not torch.equal(
            row(query), (keys <= query) & (keys >= first_seen(query, sight.window or None, sight.chunked))
        ):
            raise ValueError(f"the query at position {query} sees other tokens")
    return sight


class _WithoutPadding(TorchFunctionMode):
    """Within, tensors of the capture, which have no numbers, are zeros. Masks of chunks count the padding before each
    sequence in such a tensor; the cache counts positions without padding."""

    def __init__(self, needed: bool) -> None:
        super().__init__()
        self.needed = needed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.needed:
            args = tree_map(_without_padding, args)
        return func(*args, **(kwargs or {}))


def _without_padding(argument: Any) -> Any:
    return torch.zeros(1, dtype=argument.dtype) if isinstance(argument, FakeTensor) else argument
