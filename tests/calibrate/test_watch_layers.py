"""A model computes in float32 with weights of 16 bits, of which a few at a time are converted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pmkvq_compiler.calibrate.watch_layers import in_float32
from tests.models import tiny_model

IDS = torch.arange(3, 23).unsqueeze(0)


class Rounding(nn.Module):
    """Some architectures round what the head is given to the head's dtype, such as hy_v4."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16)])
        self.head = nn.Linear(16, 128)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.eye(16, dtype=self.head.weight.dtype)[input_ids % 16]
        out: Tensor = self.head(self.layers[0](hidden).to(self.head.weight.dtype))
        return out


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {}), ("gemma2", {"tie_word_embeddings": True}), ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2})],
)
def test_a_model_computes_in_float32_what_its_copy_in_float32_does(model_type: str, overrides: dict[str, Any]) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16, **overrides)
    (layers,) = [part for name, part in model.named_modules() if name.endswith((".layers", ".h"))]
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    with torch.no_grad(), in_float32(model, list(layers)):
        found = model(IDS).logits
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    expected = tiny_model(model_type, dtype=torch.bfloat16, **overrides).float()
    with torch.no_grad():
        torch.testing.assert_close(found, expected(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_model_may_round_what_it_passes_on() -> None:
    model = Rounding().to(torch.bfloat16)
    with torch.no_grad(), in_float32(model, list(model.layers)):
        found = model(IDS)
    with torch.no_grad():
        torch.testing.assert_close(found, model.float()(IDS), rtol=1e-2, atol=1e-2)


def test_weights_are_given_back_after_an_error() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with torch.no_grad(), in_float32(model, list(model.model.layers)), pytest.raises(RuntimeError):
        model(inputs_embeds=torch.zeros(1, 4, 3))
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


def resident(which: str) -> int:
    (kibibytes,) = re.findall(which + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes)


def test_the_embedding_and_the_head_are_not_converted_at_once() -> None:
    """Each of them takes 67 MB in float32."""
    model = tiny_model("llama", dtype=torch.bfloat16, vocab_size=1 << 18, num_hidden_layers=1)
    converted = model.lm_head.weight.numel() * torch.float32.itemsize
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before = resident("VmRSS")
    with torch.no_grad(), in_float32(model, list(model.model.layers)):
        model(IDS, logits_to_keep=1)
    growth = resident("VmHWM") - before
    print(f"{growth / 1e6:.0f} MB for {converted / 1e6:.0f} MB of the head in float32")
    assert 0.9 * converted < growth < 1.5 * converted
