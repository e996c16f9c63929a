"""Matched maps: what they promise of the error, and that what they are made of is what the model did."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.calibrate import transforms
from pmkvq_compiler.calibrate.attention_hook import ATTENTION, AttentionCall, observed, run
from pmkvq_compiler.calibrate.transforms import FLOOR, Moments, matched
from pmkvq_compiler.formats import as_cached
from pmkvq_compiler.threads import one_thread
from tests.models import tiny_model

HEADS, DIM = 2, 16


def spread(seed: int, decades: float) -> Tensor:
    """Random positive definite matrices [HEADS, DIM, DIM] (float64), eigenvalues over some decades."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=draw))[0]
    return (basis * torch.logspace(0, -decades, DIM, dtype=torch.float64)) @ basis.transpose(1, 2)


def traces(matrices: Tensor, covariance: Tensor, importance: Tensor) -> Tensor:
    """tr(M^T C M) tr(M^-1 G M^-T) of each head."""
    inverse = torch.linalg.inv(matrices)
    spreads = matrices.transpose(1, 2) @ covariance @ matrices
    errors = inverse @ importance @ inverse.transpose(1, 2)
    return torch.stack([torch.trace(a) * torch.trace(b) for a, b in zip(spreads, errors, strict=True)])


def floored(moments: Tensor) -> Tensor:
    mean = moments.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    return moments / mean + FLOOR * torch.eye(DIM, dtype=torch.float64)


def test_no_other_map_has_less_error() -> None:
    covariance, importance = spread(0, 3), spread(1, 2)
    found = matched(torch.randn(HEADS, DIM, dtype=torch.float64), covariance, importance)
    least = traces(found, floored(covariance), floored(importance))
    eye = torch.eye(DIM, dtype=torch.float64)
    assert (least < 0.8 * traces(eye.repeat(HEADS, 1, 1), floored(covariance), floored(importance))).all()
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        other = found @ (eye + 0.1 * torch.randn(HEADS, DIM, DIM, dtype=torch.float64, generator=draw))
        assert (least <= traces(other, floored(covariance), floored(importance)) * (1 + 1e-9)).all()


def test_channels_get_alike_and_the_mean_the_same_in_all() -> None:
    mean, covariance = 5 * torch.randn(HEADS, DIM, dtype=torch.float64), spread(0, 1)
    found = matched(mean, covariance, covariance)
    turned = (mean.unsqueeze(1) @ found).squeeze(1)
    torch.testing.assert_close(turned, turned.mean(-1, keepdim=True).expand_as(turned))
    without_mean = matched(torch.zeros_like(mean), covariance, covariance)
    assert torch.isfinite(without_mean).all()
    nothing = torch.zeros(HEADS, DIM, DIM, dtype=torch.float64)
    assert torch.isfinite(matched(torch.zeros_like(mean), nothing, nothing)).all(), "a head that is never used"


def test_small_matrices_are_computed_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(transforms, "matched", lambda *moments: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        moments = Moments()
        moments.tokens, moments.value = {0: 1, 1: 1}, dict.fromkeys((0, 1), torch.zeros(HEADS, DIM))
        moments.value_square = moments.gradient_square = dict.fromkeys((0, 1), spread(0, 1))
        moments.value_matrices()
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_codes_of_matched_values_cost_the_output_less() -> None:
    """Skewed values behind a mean, read by a skewed gradient: what 2-bit codes change of the loss falls by half."""
    covariance, importance = spread(2, 3), spread(3, 2)
    mean = torch.randn(HEADS, DIM, dtype=torch.float64)
    values = torch.linalg.cholesky(covariance) @ torch.randn(HEADS, DIM, 4096, dtype=torch.float64)
    values = (values.transpose(1, 2) + mean.unsqueeze(1)).unsqueeze(0)
    found = matched(mean, covariance, importance)

    def loss(matrices: Tensor | None) -> float:
        given = values if matrices is None else values @ matrices
        kept = as_cached(given.float(), 2, "token", 0, 64).double()
        error = kept - values if matrices is None else kept @ torch.linalg.inv(matrices) - values
        return float(torch.einsum("bhsd,hde,bhse->", error, importance, error))

    assert loss(found) < loss(None) / 2


def test_moments_are_those_of_the_calls() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output.requires_grad_(True))
    moments, calls, gradients = Moments(), [], []

    def observe(call: AttentionCall) -> Tensor:
        output = moments(call)
        if call.layer == 1:
            calls.append(call)
            output.register_hook(gradients.append)
        return output

    for text in torch.randint(3, 128, (2, 1, 50)):
        with observed(observe):
            logits = run(model, text, torch.arange(50).unsqueeze(0))[0]
        F.cross_entropy(logits[:-1], text[0, 1:], reduction="sum").backward()
    key, value, gradient = (
        torch.cat([x.detach()[0] for x in group], dim=1).double()
        for group in ([call.key for call in calls], [call.value for call in calls], gradients)
    )
    mean = value.mean(1)
    covariance = torch.stack([torch.cov(head.T, correction=0) for head in value])
    by_head = gradient.unflatten(0, (value.shape[0], -1))
    importance = torch.einsum("hgsd,hgse->hde", by_head, by_head)
    torch.testing.assert_close(moments.value_matrices()[1], matched(mean, covariance, importance), rtol=1e-4, atol=1e-6)
    turned = (key.mean(1).unsqueeze(1) @ moments.key_rotations()[1]).squeeze(1)
    torch.testing.assert_close(turned, turned.mean(-1, keepdim=True).expand_as(turned), rtol=1e-4, atol=1e-6)
