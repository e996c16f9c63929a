"""Each layer of an artifact against the source model's: rounding passes at any depth, one wrong head does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.storage import load_calibration
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.emit.check import LAYER_TOLERANCE
from pmkvq_compiler.emit.layer_errors import LayerError, layer_errors
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import HeadTransform

from ..conftest import CompileTiny, silent, token_lines
from ..fuzz import LONG_ONLY
from ..models import tiny_folder

LAYERS, HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 4, 16
DEEP = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
TOLERANCE = LAYER_TOLERANCE["bfloat16"]


@pytest.fixture(scope="module")
def deep(compile_tiny: CompileTiny) -> Path:
    """A model of 32 layers in bfloat16, V of which is folded."""
    return compile_tiny("llama", DEEP, budget="50%", dtype="bfloat16", calib_samples=1)


def calibration_of(artifact: Path) -> Calibration:
    (path,) = artifact.parent.glob("*.calibration.safetensors")
    return load_calibration(path)


def errors_of(artifact: Path, spoil: Callable[[dict[str, Tensor]], None] | None = None) -> list[LayerError]:
    model, calibration = runtime.load(artifact), calibration_of(artifact)
    if spoil is not None:
        spoil(model.weights)
    return layer_errors(model, calibration.check_ids, calibration.check_layers)


def test_rounding_does_not_grow_with_depth(deep: Path) -> None:
    found = errors_of(deep)
    assert len(found) == 2 * LAYERS + 1
    assert max(one.error for one in found) < TOLERANCE / 2


@pytest.mark.parametrize("layer", [0, 17, LAYERS - 1])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_one_wrong_head_of_one_layer_is_found(deep: Path, projection: str, layer: int) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weight = weights[f"model.layers.{layer}.self_attn.{projection}.weight"]
        head = weight[:, -HEAD_DIM:] if projection == "o_proj" else weight[-HEAD_DIM:]
        head.copy_(head[torch.randperm(HEAD_DIM)] if projection != "o_proj" else head[:, torch.randperm(HEAD_DIM)])

    wrong = [one.place for one in errors_of(deep, spoil) if not one.error <= TOLERANCE]
    assert wrong
    assert all(place.endswith(f"layer {layer}") for place in wrong)


def test_other_numbers_than_those_of_a_layer_are_found(deep: Path) -> None:
    """A norm, an MLP, the embedding and the head are compared as well as attention."""
    for name in ("model.layers.9.mlp.down_proj.weight", "model.layers.9.input_layernorm.weight", "lm_head.weight"):

        def spoil(weights: dict[str, Tensor], name: str = name) -> None:
            weights[name].mul_(1.1)

        assert max(one.error for one in errors_of(deep, spoil)) > TOLERANCE, name


def test_a_fold_that_is_wrong_in_one_head_ends_the_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(tmp_path / "source", "qwen2", num_hidden_layers=6)
    apply = HeadTransform.apply

    def wrong(edit: HeadTransform, value: Tensor) -> Tensor:
        if ".4." in edit.tensor and edit.side == "rows" and value.dim() == 2:
            value = torch.cat([value[:HEAD_DIM].roll(1, dims=0), value[HEAD_DIM:]])
        return apply(edit, value)

    monkeypatch.setattr(HeadTransform, "apply", wrong)
    calib = str(token_lines(tmp_path / "tokens.jsonl"))
    options = {"budget": "50%", "max_len": 400, "block": 32, "window": 64, "calib_samples": 1, "calib_len": 64}
    request = CompileOptions(str(tmp_path / "source"), tmp_path / "out", calib=calib, dtype="bfloat16", **options)
    with pytest.raises(CompileError, match=r"the hidden states after layer 4 differ from the source model's by"):
        compile_model(request, silent)
    assert not (tmp_path / "out").exists()


KINDS = [
    "qwen3_moe",
    "gemma2",
    "gpt_oss",
    "cohere",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "mixtral",
    "gemma3_text",
    "olmo2",
    "phi3",
    "stablelm",
    "starcoder2",
]


@LONG_ONLY
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", KINDS)
def test_layers_of_every_kind_are_well_within_the_tolerance(
    compile_tiny: CompileTiny, model_type: str, dtype: str
) -> None:
    shape = {"num_hidden_layers": 2 + KEY_HEADS * (dtype == "float16")}
    found = errors_of(compile_tiny(model_type, shape, budget="60%", dtype=dtype, calib_samples=1))
    assert len(found) == 2 * shape["num_hidden_layers"] + 1
    assert max(one.error for one in found) < LAYER_TOLERANCE[dtype] / 2
