"""Checks of what a caller passes: numbers, token ids, masks and positions. All raise `InputError`."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

LARGEST_BITS = 64
"""Whole numbers with more bits are refused, since nothing here needs them."""


def whole_number(name: str, value: Any) -> int:
    """`value` as an int. Any integer type will do (Python's, numpy's, a tensor of one number), but no boolean."""
    truth = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        number = None
    if truth or number is None or number.bit_length() > LARGEST_BITS:
        raise InputError(f"{name} {_shown(value)} is not a whole number of at most {LARGEST_BITS} bits; give an int")
    return number


def real_number(name: str, value: Any) -> float:
    """`value` as a finite float. Any type of number will do, but no boolean and no text."""
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} {_shown(value)} is not a finite number; give a float")
    return number


def whole_numbers(name: str, values: Any) -> list[int]:
    """A list of ints from any sequence of them: a list, a range, a tensor, an array."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(listed, str | bytes) or not isinstance(listed, Iterable):
        raise InputError(f"{name} {_shown(values)} is not a list of whole numbers; give a list of ints")
    return [whole_number(name, value) for value in listed]


def token_ids(given: Any, vocab_size: int) -> Tensor:
    """Token ids [B, S] (int64, on the device that they came on) from a tensor of any integer dtype, an array or
    lists."""
    ids = _tensor("input_ids", given)
    if ids.dim() == 2 and ids.numel() == 0:
        raise InputError("the prompt is empty; give at least one token")
    if ids.dim() != 2 or not _counts(ids):
        raise InputError(f"input_ids must be integers [batch, tokens], got {ids.dtype} {list(ids.shape)}")
    ids = ids.to(torch.int64)
    low, high = (int(bound) for bound in torch.aminmax(ids.cpu()))
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size:,} tokens "
            f"(0 to {vocab_size - 1:,}); was the text encoded with this model's tokenizer?"
        )
    return ids


def padding_mask(given: Any, shape: torch.Size) -> Tensor:
    """A mask of `shape` [B, S] (bool, on the CPU), true for tokens and false for padding; all true if none is given."""
    if given is None:
        return torch.ones(shape, dtype=torch.bool)
    mask = _tensor("attention_mask", given).cpu()
    if mask.shape != shape:
        raise InputError(
            f"attention_mask has shape {list(mask.shape)} and input_ids {list(shape)}; "
            f"give one mask value for each new token"
        )
    if mask.dtype == torch.bool:
        return mask
    values = mask.to(torch.complex128 if mask.is_complex() else torch.float64)
    other = values[(values != 0) & (values != 1)]
    if len(other):
        raise InputError(f"attention_mask holds {other[0].item()}; give 1 for a token and 0 for padding")
    return values != 0


def positions_of(given: Any, mask: Tensor, limit: int) -> Tensor:
    """Positions [B, S] (int64, on the CPU) for the tokens of `mask` [B, S], given as one row for all sequences or a row
    for each. Those of padding are ignored; all others must be below `limit`."""
    positions = _tensor("position_ids", given).cpu()
    fitting = [list(mask.shape), [1, mask.shape[1]], [mask.shape[1]]]
    if list(positions.shape) not in fitting or not _counts(positions):
        raise InputError(
            f"position_ids must be integers {fitting[0]}, as input_ids, got {positions.dtype} {list(positions.shape)}; "
            f"leave them out for positions that follow the cached tokens"
        )
    positions = torch.where(mask, positions.to(torch.int64).expand(mask.shape), 0)
    low, high = (int(bound) for bound in torch.aminmax(positions))
    if low < 0 or high >= limit:
        raise InputError(
            f"position {low if low < 0 else high} is outside the 0 to {limit - 1:,} that this artifact was compiled "
            f"for; compile with a larger --max-len"
        )
    return positions


def chosen_tokens(only: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Rows and columns [N] (int64) of the tokens of `shape` [B, S] that are asked for."""
    if not isinstance(only, tuple | list) or len(only) != 2:
        raise InputError("only must be (rows, columns), two equally long lists of whole numbers, a pair for each token")
    rows, columns = (_tensor("only", one) for one in only)
    if (
        rows.dim() != 1
        or rows.shape != columns.shape
        or not all(_counts(one) or not len(one) for one in (rows, columns))
    ):
        raise InputError(
            f"only has rows {list(rows.shape)} of {rows.dtype} and columns {list(columns.shape)} of {columns.dtype}; "
            f"give two equally long lists of whole numbers, a pair for each token"
        )
    for name, wanted, count in (("row", rows, shape[0]), ("column", columns, shape[1])):
        for number in wanted.tolist():
            if not -count <= number < count:
                raise InputError(f"only asks for {name} {number} of input_ids, which have {count:,} {name}s")
    return rows.to(torch.int64), columns.to(torch.int64)


def _tensor(name: str, given: Any) -> Tensor:
    """`given` as a dense tensor that holds numbers."""
    try:
        tensor = given if isinstance(given, Tensor) else torch.tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(
            f"{name} cannot be read as numbers ({str(error).splitlines()[0]}); give a tensor or lists of equal lengths"
        ) from error
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.is_quantized:
        raise InputError(f"{name} is not a dense tensor of numbers on a device; give one")
    return tensor


def _counts(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # of an int with more digits than Python writes out
        return "with thousands of digits"
