"""The measures say what they promise: checked against plain loops and against the model itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.formats import Format, stored
from pmkvq_compiler.recording import ATTENTION, AttentionCall, observed, run
from pmkvq_compiler.sensitivity import MAGNIFIED, GradientProduct, OutputLoss

from .models import tiny_model

SINK, BLOCK, LENGTH = 4, 32, 200


def call(sliding_window: int | None = None) -> AttentionCall:
    query, key, value = (torch.randn(1, heads, LENGTH, 16) for heads in (4, 2, 2))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if sliding_window:
        mask &= ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-sliding_window)
    return AttentionCall(5, query, key.requires_grad_(), value.requires_grad_(), mask, 0.25, None, None)


def one_query(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Attention [Hq, d] of `query` [Hq, d] by a loop over heads, float64."""
    outputs = []
    for head in range(4):
        scores = (keys[head // 2].double() @ query[head].double()) * 0.25
        outputs.append(scores.masked_fill(~visible, -torch.inf).softmax(0) @ values[head // 2].double())
    return torch.stack(outputs)


@pytest.mark.parametrize("sliding_window", [None, 90])
@pytest.mark.parametrize("window", [32, 48])
def test_the_predicted_loss_is_that_of_what_the_cache_would_give_each_query(
    window: int, sliding_window: int | None
) -> None:
    torch.manual_seed(window)
    observed_call = call(sliding_window)
    key_format, value_format = (Format(2, axis, "none", 0.8, window) for axis in ("channel", "token"))
    measure = OutputLoss({5: [key_format]}, {5: [value_format]}, {}, {}, SINK, BLOCK)
    gradient = torch.randn(1, 4, LENGTH, 16)
    drawn = LENGTH // 2 + torch.randperm(LENGTH - LENGTH // 2, generator=torch.Generator().manual_seed(0))
    (measure(observed_call) * gradient).sum().backward()

    key, value, query = (x.detach()[0] for x in (observed_call.key, observed_call.value, observed_call.query))
    stored_key = stored(key[None], key_format, SINK, BLOCK)[0]
    stored_value = stored(value[None], value_format, SINK, BLOCK)[0]
    key_loss, value_loss = [], []
    for position in drawn.tolist():
        blocks = max(0, -(-(position + 1 - SINK - window) // BLOCK))
        old = torch.zeros(LENGTH, dtype=torch.bool)
        old[SINK : SINK + blocks * BLOCK] = True
        visible = observed_call.mask[position]  # type: ignore[index]
        exact = one_query(query[:, position], key, value, visible)
        mixed_key = torch.where(old[:, None], key + MAGNIFIED * (stored_key - key), key)
        mixed_value = torch.where(old[:, None], stored_value, value)
        for losses, found in (
            (key_loss, one_query(query[:, position], mixed_key, value, visible)),
            (value_loss, one_query(query[:, position], key, mixed_value, visible)),
        ):
            losses.append(((found - exact) * gradient[0, :, position].double()).sum().square().item() / 2)
    assert measure.key[5][key_format] == pytest.approx(sum(key_loss) / len(key_loss) / MAGNIFIED**2, rel=1e-3)
    assert measure.value[5][value_format] == pytest.approx(sum(value_loss) / len(value_loss), rel=1e-3)


def test_predicted_losses_are_those_of_the_model() -> None:
    """Every layer's values kept in 4 bits: the sum of what was predicted is the divergence that comes."""
    torch.manual_seed(0)
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    kept = Format(4, "token", "none", 1.0, 32)
    texts = torch.randint(3, 128, (12, LENGTH))
    positions = torch.arange(LENGTH).unsqueeze(0)
    formats = {layer: [kept] for layer in range(3)}
    measure = OutputLoss({layer: [] for layer in range(3)}, formats, {}, {}, SINK, BLOCK)
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output.requires_grad_(True))
    divergence = 0.0
    for text in texts.split(1):
        with observed(measure):
            logits = run(model, text, positions)[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0]
        F.cross_entropy(logits, labels, reduction="sum").backward()

        def quantized(one: AttentionCall) -> Tensor:
            return one.output(value=stored(one.value, kept, SINK, BLOCK))

        with torch.no_grad(), observed(quantized):
            found = run(model, text, positions)[0].log_softmax(-1)
        expected = logits.detach().log_softmax(-1)
        divergence += (expected.exp() * (expected - found)).sum(-1)[LENGTH // 2 :].mean().item()
    predicted = sum(measure.value[layer][kept] for layer in range(3))
    assert 0.5 < predicted / divergence < 2


def test_the_papers_measure_is_the_sum_of_error_times_gradient() -> None:
    key, value, key_gradient, value_gradient = torch.randn(4, 1, 2, 80, 16).unbind(0)
    matrices = torch.randn(2, 16, 16, dtype=torch.float64)
    key.requires_grad_(), value.requires_grad_()
    scaled, plain = Format(2, "token", "scale", 1.0, 64), Format(4, "token", "none", 1.0, 64)
    measure = GradientProduct({5: [scaled]}, {5: [plain]}, {5: {"scale": matrices}}, {}, sink=4, block=32)
    measure(AttentionCall(5, torch.randn(1, 4, 80, 16), key, value, None, 0.25, None, None))
    ((key * key_gradient).sum() + (value * value_gradient).sum()).backward()
    for x, gradient, kept, own, found in (
        (key, key_gradient, scaled, matrices, measure.key[5][scaled]),
        (value, value_gradient, plain, None, measure.value[5][plain]),
    ):
        error = stored(x.detach(), kept, 4, 32, own) - x.detach()
        assert found == pytest.approx((error * gradient).abs().sum().item(), rel=1e-5)
