"""Recurrences in chunks are what they are token by token, with and without padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.runtime import recurrence
from pmkvq_compiler.runtime.backend import NewTokens
from pmkvq_compiler.runtime.plan import StatePlan
from pmkvq_compiler.runtime.records import state_rows
from pmkvq_compiler.runtime.states import StateStore

LENGTH, HEADS, KEYS, VALUES = 150, 4, 8, 6


def fresh(shape: tuple[int, ...], batch: int = 2, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    store = StateStore([StatePlan(0, 0, shape, float32=True)], batch, dtype, device)
    return SimpleNamespace(states=store, new_tokens=NewTokens([], None), attention=())


def fed(cache: Any, columns: list[slice], on_device: bool = False) -> Any:
    """The cache in a call with tokens in these columns; `on_device`, only a tensor says so, as in a CUDA graph."""
    if not on_device:
        cache.new_tokens = NewTokens(columns, None)
        return cache
    counts = {"start": [own.start for own in columns], "count": [own.stop - own.start for own in columns]}
    rows = state_rows({**counts, "length": [0] * len(columns), "reached": [0] * len(columns)})
    told = torch.tensor(rows, dtype=torch.int32, device=cache.states.read(0, 0).device)
    cache.new_tokens = NewTokens([slice(0, 0)] * len(columns), told)
    return cache


def draw(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def delta_operands(per_channel: bool) -> tuple[Tensor, ...]:
    q, k = (draw(2, LENGTH, HEADS // 2, KEYS) - offset for offset in (0.5, 0.4))
    decay = -draw(2, LENGTH, HEADS, KEYS) if per_channel else -draw(2, LENGTH, HEADS)
    return q, k, draw(2, LENGTH, HEADS, VALUES) - 0.5, decay, draw(2, LENGTH, HEADS)


def delta_token_by_token(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    state, out = torch.zeros(2, HEADS, KEYS, VALUES, dtype=torch.float64), []
    q, k = (F.normalize(x.repeat_interleave(2, dim=2), dim=-1) for x in (q, k))
    for t in range(LENGTH):
        state = decay[:, t].reshape(2, HEADS, -1, 1).exp() * state
        missing = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t].unsqueeze(-1) * missing)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * 0.3)
    return torch.stack(out, dim=1)


def scan_operands(per_channel: bool) -> tuple[Tensor, ...]:
    x, step = draw(2, LENGTH, HEADS, VALUES) - 0.5, draw(2, LENGTH, HEADS)
    rate = -draw(HEADS, KEYS) if per_channel else -draw(HEADS)
    return x, step, rate, draw(2, LENGTH, 2, KEYS) - 0.5, draw(2, LENGTH, 2, KEYS) - 0.4


def scan_token_by_token(x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor) -> Tensor:
    state, out = torch.zeros(2, HEADS, KEYS, VALUES, dtype=torch.float64), []
    key, query = (one.repeat_interleave(2, dim=2) for one in (key, query))
    for t in range(LENGTH):
        decay = (step[:, t].unsqueeze(-1) * rate.reshape(1, HEADS, -1)).exp().unsqueeze(-1)
        written = step[:, t].unsqueeze(-1) * x[:, t]
        state = decay * state + torch.einsum("bhk,bhv->bhkv", key[:, t], written)
        out.append(torch.einsum("bhk,bhkv->bhv", query[:, t], state))
    return torch.stack(out, dim=1)


def run_delta(cache: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return recurrence.gated_delta_rule(q, k, v, decay, beta, 0.3, True, cache, 0, 0)


def run_scan(cache: Any, x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor) -> Tensor:
    return recurrence.selective_scan(x, step, rate, key, query, cache, 0, 0)


KINDS = {
    "delta rule": (delta_operands, delta_token_by_token, run_delta),
    "scan": (scan_operands, scan_token_by_token, run_scan),
}


def part(operands: tuple[Tensor, ...], columns: slice) -> tuple[Tensor, ...]:
    """Some tokens of operands [2, S, ...]; others are as they are."""
    return tuple(x[:, columns] if x.dim() > 2 else x for x in operands)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_recurrence(kind: str, per_channel: bool) -> None:
    """To 1e-5: the norms of keys are kept from 0 by 1e-6."""
    operands_of, token_by_token, run = KINDS[kind]
    operands = operands_of(per_channel)
    expected = token_by_token(*operands)
    for size in (LENGTH, 64, 7, 1):
        cache, found = fresh((HEADS, KEYS, VALUES)), []
        for start in range(0, LENGTH, size):
            columns = slice(start, min(LENGTH, start + size))
            width = columns.stop - columns.start
            found.append(run(fed(cache, [slice(0, width)] * 2), *part(operands, columns)))
        assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-5)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_state(kind: str, on_device: bool) -> None:
    operands_of, _, run = KINDS[kind]
    operands = operands_of(False)
    padded, alone = fresh((HEADS, KEYS, VALUES)), [fresh((HEADS, KEYS, VALUES)) for _ in range(2)]
    for columns in ([slice(3, 9), slice(0, 4)], [slice(0, 0), slice(2, 9)], [slice(8, 9), slice(0, 9)]):
        some = part(operands, slice(columns[0].start, columns[0].start + 9))
        out = run(fed(padded, columns, on_device), *some)
        for row, own in enumerate(columns):
            if own.start < own.stop:
                width = own.stop - own.start
                expected = run(fed(alone[row], [slice(0, width)] * 2), *part(some, own))
                assert torch.allclose(out[row, own], expected[row], atol=1e-12)
            assert torch.allclose(padded.states.read(0, 0)[row], alone[row].states.read(0, 0)[row], atol=1e-12)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 7])
def test_a_convolution_sees_the_tokens_before(width: int, on_device: bool) -> None:
    x, weight, bias = draw(2, 5, 60), draw(5, width), draw(5)
    expected = F.conv1d(F.pad(x, (width - 1, 0)), weight.unsqueeze(1), bias, groups=5)
    cache, places = fresh((5, width - 1)), [0, 0]
    for columns in (
        [slice(2, 9), slice(0, 3)],
        [slice(0, 0), slice(4, 9)],
        [slice(0, 1), slice(8, 9)],
        [slice(0, 9), slice(0, 9)],
    ):
        given = torch.full((2, 5, 9), 7.0, dtype=torch.float64)
        for row, own in enumerate(columns):
            given[row, :, own] = x[row, :, places[row] : places[row] + own.stop - own.start]
        out = recurrence.causal_conv1d(given, weight, bias, fed(cache, columns, on_device), 0, 0)
        for row, own in enumerate(columns):
            stop = places[row] + own.stop - own.start
            assert torch.allclose(out[row, :, own], expected[row, :, places[row] : stop], atol=1e-12)
            places[row] = stop


def test_states_are_kept_in_the_dtype_of_the_plan() -> None:
    plans = [StatePlan(0, 0, (4, 3), float32=False), StatePlan(0, 1, (2, 8, 8), float32=True)]
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        store = StateStore(plans, 3, dtype, "cpu")
        assert store.read(0, 0).dtype == dtype
        assert store.read(0, 1).dtype == expected
        assert store.nbytes == 3 * sum(plan.nbytes(dtype.itemsize) for plan in plans)


def test_short_chunks_bound_the_products_of_channels() -> None:
    key, decay = torch.empty(1, 8192, 100, 16), torch.empty(1, 8192, 100, 16)
    chunks = recurrence._chunks(key, decay)
    assert (chunks[0].stop - chunks[0].start) ** 2 * 8192 * 16 <= recurrence.PRODUCTS
    assert len(recurrence._chunks(key, decay[..., :1])) == 2
