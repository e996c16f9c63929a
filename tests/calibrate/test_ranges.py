"""A model whose K or V lies where codes are coarse is scaled by powers of two, and is as good as one that does not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pmkvq_compiler import runtime
from pmkvq_compiler.calibrate.ranges import exponents, unusual
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from tests.conftest import silent, token_lines
from tests.fuzz import LONG_ONLY
from tests.models import tiny_folder

OPTIONS: dict[str, Any] = {
    "max_len": 200,
    "block": 32,
    "window": 32,
    "calib_samples": 2,
    "calib_len": 96,
    "recipe": "uniform",
    "bits": (4,),
    "budget": "100%",
}
PROMPT = torch.randint(3, 128, (1, 190), generator=torch.Generator().manual_seed(3))


def scaled(folder: Path, scale: float, tensors: tuple[str, str]) -> Path:
    """A tiny model one of whose projections is multiplied by a scale and the other divided by it: the same function."""
    tiny_folder(folder, "llama", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            for name, factor in zip(tensors, (scale, 1 / scale), strict=True):
                projection = getattr(layer.self_attn, name)
                projection.weight *= factor
                if projection.bias is not None and name != "o_proj":
                    projection.bias *= factor
    model.save_pretrained(folder)
    return folder


def error_of(folder: Path, **options: Any) -> float:
    """Of an artifact's logits, against those of its source, relative."""
    calib = str(token_lines(folder.parent / f"{folder.name}.jsonl"))
    output = folder.parent / f"{folder.name}-artifact"
    compile_model(CompileOptions(str(folder), output, calib=calib, **{**OPTIONS, **options}), silent)
    model = runtime.load(output)
    cache = model.new_cache()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(PROMPT).logits[:, 100:]
    logits = torch.cat([model(piece, cache) for piece in PROMPT.split([100, 40, 50], dim=1)], dim=1)[:, 100:]
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("tensors", "scales", "options"),
    [
        (("v_proj", "o_proj"), (1e-7,), {}),
        pytest.param(("v_proj", "o_proj"), (1e7,), {}, marks=LONG_ONLY),
        pytest.param(("k_proj", "q_proj"), (1e7,), {"recipe": "rotation"}, marks=LONG_ONLY),
        pytest.param(("k_proj", "q_proj"), (1e-7, 1e5), {}, marks=LONG_ONLY),
        pytest.param(
            ("v_proj", "o_proj"), (1e-7,), {"recipe": "best", "budget": "90%", "bits": (2, 4)}, marks=LONG_ONLY
        ),
    ],
)
def test_a_scaled_model_loses_no_more_than_it_would_unscaled(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tensors: tuple[str, str],
    scales: tuple[float, ...],
    options: dict[str, Any],
) -> None:
    plain = error_of(scaled(tmp_path / "plain", 1.0, tensors), **options)
    assert 1e-3 < plain < 0.5
    for scale in scales:
        found = error_of(scaled(tmp_path / f"scaled-{scale}", scale, tensors), **options)
        assert "cannot be scaled" not in caplog.text, "where it is folded there is nothing to tell"
        print(f"{tensors} {options} by {scale}: {found:.4f}, plain {plain:.4f}")
        assert found < 1.2 * plain, f"{scale}: {found} where it was {plain}"


def test_what_cannot_be_folded_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fused = tiny_folder(tmp_path / "fused", "gpt2", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(fused)
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.attn.c_attn.weight[:, 128:] *= 1e-7
            layer.attn.c_attn.bias[128:] *= 1e-7
            layer.attn.c_proj.weight *= 1e7
    model.save_pretrained(fused)
    with caplog.at_level(logging.WARNING, "pmkvq_compiler"):
        error_of(fused)
    assert "V of layer 0 spans" in caplog.text
    assert "cannot be scaled in the weights (v_proj or the output projection was not found" in caplog.text


def test_usual_ranges_are_left_alone() -> None:
    one = torch.ones(3, 3)
    ranges = torch.tensor([2.0**-8, 1.0, 1000.0, 0.0], dtype=torch.float64)
    assert not bool(unusual(ranges).any())
    assert not bool(exponents(ranges, one, one, torch.float32).any())


@pytest.mark.parametrize(
    ("dtype", "multiplied", "divided", "low", "high"),
    [
        (torch.float32, 1e-7, 1e7, 23, 23),
        (torch.bfloat16, 1.0, 1.0, 23, 23),
        (torch.float16, 1.0, 1.0, 0, 8),
        (torch.float16, 1e-4, 6e4, 10, 23),
        (torch.float16, 300.0, 1.0, 0, 0),
    ],
)
def test_weights_stay_ordinary_numbers(
    dtype: torch.dtype, multiplied: float, divided: float, low: int, high: int
) -> None:
    weights = torch.tensor([multiplied]), torch.tensor([divided])
    (found,) = exponents(torch.tensor([1e-7], dtype=torch.float64), *weights, dtype).tolist()
    assert low <= found <= high
    edited = [(weights[0].double() * 2**found).to(dtype), (weights[1].double() / 2**found).to(dtype)]
    assert all(bool(torch.isfinite(weight).all() and (weight != 0).all()) for weight in edited)
    (opposite,) = exponents(torch.tensor([1e7], dtype=torch.float64), *reversed(weights), dtype).tolist()
    assert -high - 1 <= opposite <= 0
