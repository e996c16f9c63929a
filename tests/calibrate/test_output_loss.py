"""The measures say what they promise: checked against plain loops and against the model itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, AttentionCall, observed, run
from pmkvq_compiler.calibrate.caches import Caches
from pmkvq_compiler.calibrate.gradient_product import GradientProduct
from pmkvq_compiler.calibrate.output_loss import MAGNIFIED, OutputLoss
from pmkvq_compiler.formats import Format, stored
from pmkvq_compiler.runtime.quantize import fake_quantize
from tests.families import FAMILIES
from tests.models import tiny_model

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
    key_format, value_format = (Format(2, axis, "none", window) for axis in ("channel", "token"))
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
        mixed_value = torch.where(old[:, None], stored_value, value)
        mixed_key = torch.where(old[:, None], key + MAGNIFIED * (stored_key - key), key)
        for losses, keys, values, magnified in (
            (key_loss, mixed_key, value, MAGNIFIED),
            (value_loss, key, mixed_value, 1.0),
        ):
            found = one_query(query[:, position], keys, values, visible)
            change = ((found - exact) * gradient[0, :, position].double()).sum().item()
            losses.append(change**2 / 2 / magnified**2)
    assert measure.key[5][key_format] == pytest.approx(sum(key_loss) / len(key_loss), rel=1e-3)
    assert measure.value[5][value_format] == pytest.approx(sum(value_loss) / len(value_loss), rel=1e-3)


def test_predicted_losses_are_those_of_the_model() -> None:
    """Every layer's values kept in 4 bits: the sum of what was predicted is the divergence that comes."""
    torch.manual_seed(0)
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    kept = Format(4, "token", "none", 32)
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


@pytest.mark.parametrize(("name", "readers"), [("gemma3n", {3: 1, 4: 2}), ("gemma4", {3: 1, 4: 2})])
def test_a_shared_cache_weighs_what_all_its_readers_feel(name: str, readers: dict[int, int]) -> None:
    """The values of one cache in 4 bits, as every layer reads them: what was predicted is the divergence that comes."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    overrides = {**family.overrides, "sliding_window": LENGTH}
    model = tiny_model(family.model_type, **overrides).requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    kept = Format(4, "token", "none", 32)
    texts, positions = torch.randint(3, 128, (12, LENGTH)), torch.arange(LENGTH).unsqueeze(0)
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output.requires_grad_(True))
    none: dict[int, list[Format]] = {1: [], 2: []}
    together, alone = (OutputLoss(none, {1: [kept], 2: [kept]}, {}, {}, SINK, BLOCK) for _ in range(2))
    divergence = {1: 0.0, 2: 0.0}
    for text in texts.split(1):
        for measure, cache_of in ((together, readers), (alone, {3: 9, 4: 9})):

            def observe(one: AttentionCall, measure: OutputLoss = measure) -> Tensor | None:
                return measure(one) if one.layer in (1, 2) else None

            with observed(observe, Caches(cache_of).seen):
                logits = run(model, text, positions)[0]
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(1))
            F.cross_entropy(logits, labels[:, 0], reduction="sum").backward()
        expected = logits.detach().log_softmax(-1)
        for layer in (1, 2):

            def quantized(one: AttentionCall, layer: int = layer) -> Tensor | None:
                return one.output(value=stored(one.value, kept, SINK, BLOCK)) if one.layer == layer else None

            with torch.no_grad(), observed(quantized, Caches(readers).seen):
                found = run(model, text, positions)[0].log_softmax(-1)
            divergence[layer] += (expected.exp() * (expected - found)).sum(-1)[LENGTH // 2 :].mean().item()
    for layer in (1, 2):
        assert 0.5 < together.value[layer][kept] / divergence[layer] < 2
        assert together.value[layer][kept] != alone.value[layer][kept]


def test_the_papers_measure_takes_a_shared_cache_once() -> None:
    key, value = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(2))
    kept = Format(2, "token", "none", 64)
    measure = GradientProduct({0: [kept]}, {0: [kept]})
    gradients = torch.randn(2, 1, 2, 40, 8)
    for _ in range(2):
        measure(AttentionCall(0, torch.randn(1, 4, 40, 8), key, value, None, 0.25, None, None))
    (key * gradients[0] + key * gradients[1]).sum().backward()
    error = fake_quantize(key.detach(), 2, dim=-1) - key.detach()
    assert measure.key[0][kept] == pytest.approx((error * gradients.sum(0)).abs().sum().item(), rel=1e-5)


def test_the_papers_measure_is_the_sum_of_error_times_gradient_paired_as_its_code_pairs_layers() -> None:
    """Against lists like those of the published code: tensors in forward order, gradients as they come back."""
    torch.manual_seed(0)
    model = tiny_model("llama").requires_grad_(False)
    model.set_attn_implementation(ATTENTION)
    model.get_input_embeddings().register_forward_hook(lambda module, arguments, output: output.requires_grad_(True))
    scaled, plain = Format(2, "token", "scale", 64), Format(4, "token", "none", 64)
    measure = GradientProduct({layer: [scaled] for layer in range(3)}, {layer: [plain] for layer in range(3)})
    expected = {"key": torch.zeros(3), "value": torch.zeros(3)}
    tensors: dict[str, list[Tensor]] = {"key": [], "value": []}
    gradients: dict[str, list[Tensor]] = {"key": [], "value": []}

    def observe(one: AttentionCall) -> None:
        measure(one)
        for name, x in (("key", one.key), ("value", one.value)):
            tensors[name].append(x.detach())
            x.register_hook(gradients[name].append)

    for length in (80, 50):
        text = torch.randint(3, 128, (1, length))
        with observed(observe):
            logits = run(model, text, torch.arange(length).unsqueeze(0))[0]
        F.cross_entropy(logits[:-1], text[0, 1:]).backward()
        for name, bits in (("key", 2), ("value", 4)):
            for layer, (x, gradient) in enumerate(zip(tensors[name][-3:], gradients[name][-3:], strict=True)):
                error = fake_quantize(x, bits, dim=-1) - x
                expected[name][layer] += (error * gradient).abs().sum()
    for layer in range(3):
        assert measure.key[layer][scaled] == pytest.approx(expected["key"][layer].item(), rel=1e-5)
        assert measure.value[layer][plain] == pytest.approx(expected["value"][layer].item(), rel=1e-5)


def test_the_papers_measure_pairs_layers_of_a_shape() -> None:
    """Layers 0 and 3 have keys of 16 channels, 1, 2 and 4 of 32: 0 and 3 are paired, 1 and 4, and 2 with itself."""
    kept = Format(2, "token", "none", 64)
    measure = GradientProduct({layer: [kept] for layer in range(5)}, {layer: [] for layer in range(5)})
    keys, gradients = ([torch.randn(1, 2, 40, size) for size in (16, 32, 32, 16, 32)] for _ in range(2))
    loss = torch.zeros(())
    for layer, (key, gradient) in enumerate(zip(keys, gradients, strict=True)):
        key.requires_grad_()
        value = torch.randn(1, 2, 40, 8, requires_grad=True)
        measure(AttentionCall(layer, torch.randn(1, 4, 40, key.shape[-1]), key, value, None, 0.25, None, None))
        loss = loss + (key * gradient).sum()
    loss.backward()
    for layer, paired in enumerate([3, 4, 2, 0, 1]):
        key = keys[layer].detach()
        error = stored(key, kept, sink=0, block=8) - key
        assert measure.key[layer][kept] == pytest.approx((error * gradients[paired]).abs().sum().item(), rel=1e-5)
