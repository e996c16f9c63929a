from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pmkvq_compiler.passes.base import PreconditionError, run_passes
from pmkvq_compiler.passes.fold_value_rotation import FoldValueRotation, can_rotate
from pmkvq_compiler.runtime.rotation import hadamard

from ..models import SHAPE, tiny_model
from ..programs import located, relative_error, run_in_float64

ROTATING = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2", "starcoder2", "cohere"]


@pytest.mark.parametrize("dim", [1, 16, 48, 64, 80, 96, 112, 128, 256])
def test_the_rotation_is_orthogonal_and_spreads_a_channel(dim: int) -> None:
    rotation = hadamard(dim)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64))
    assert rotation.abs().max() <= 1 / (dim & -dim) ** 0.5 + 1e-12


@pytest.mark.parametrize("model_type", ROTATING)
def test_graph_computes_the_same_logits(model_type: str) -> None:
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))
    model, program = tiny_model(model_type), located(model_type)
    logits, _ = run_in_float64(program, model, input_ids)
    run_passes(program, [FoldValueRotation({0, 2})])
    assert {edit.tensor.split(".")[2] for edit in program.edits} == {"0", "2"}
    rotated, _ = run_in_float64(program, model, input_ids)
    assert relative_error(rotated, logits) <= 1e-10


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_cached_values_are_the_rotated_ones(model_type: str) -> None:
    model, program = tiny_model(model_type, dtype=torch.float64), located(model_type)
    site = program.sites[1]
    assert site.value is not None
    weight = dict(model.named_parameters())[site.value.weight].detach()
    run_passes(program, [FoldValueRotation({1})])
    edit = next(edit for edit in program.edits if edit.tensor == site.value.weight)
    x = torch.randn(7, weight.shape[1], dtype=torch.float64)
    before = (x @ weight.T).unflatten(-1, (site.num_key_value_heads, -1))
    after = (x @ edit.apply(weight).T).unflatten(-1, (site.num_key_value_heads, -1))
    assert relative_error(after, before @ hadamard(site.value_head_dim)) <= 1e-12


def test_a_layer_that_was_not_matched_is_refused() -> None:
    program = located("llama")
    program.sites[1] = replace(program.sites[1], output=None)
    assert not can_rotate(program.sites[1])
    with pytest.raises(PreconditionError, match="layer 1 cannot be rotated"):
        run_passes(program, [FoldValueRotation({1})])


def test_a_fused_projection_is_left_alone() -> None:
    assert not any(can_rotate(site) for site in located("gpt_neox").sites)
