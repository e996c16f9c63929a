"""What a format does to a tensor whose heads are multiplied by matrices."""

from __future__ import annotations

import pytest
import torch

from pmkvq_compiler import formats
from pmkvq_compiler.formats import Format, inverse_of, stored


def test_matrices_are_inverted_once_in_one_thread_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    invert = torch.linalg.inv
    monkeypatch.setattr(torch.linalg, "inv", lambda x: threads.append(torch.get_num_threads()) or invert(x))
    before, kept = torch.get_num_threads(), len(formats._INVERSES)
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 16, 16, dtype=torch.float64, generator=draw) for _ in range(2))
    text = torch.randn(1, 2, 70, 16, generator=draw)
    torch.set_num_threads(2)
    try:
        for bits in (2, 4, 8):
            for matrices in (one, other):
                found = stored(text, Format(bits, "token", "match", 0), sink=2, block=32, matrices=matrices)
                torch.testing.assert_close(found[:, :, :2], text[:, :, :2], rtol=1e-3, atol=1e-4)
        assert threads == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(inverse_of(other) @ other, torch.eye(16, dtype=torch.float64).expand(2, 16, 16))
    del one, matrices, other
    assert len(formats._INVERSES) == kept
