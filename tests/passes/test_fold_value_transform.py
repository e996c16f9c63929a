from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.passes.base import PreconditionError, run_passes
from pmkvq_compiler.passes.fold_value_transform import FoldValueTransform, can_transform
from pmkvq_compiler.passes.program import AttentionSite

from ..models import SHAPE, tiny_model
from ..programs import located, relative_error, run_in_float64

FOLDING = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "olmo2", "starcoder2", "cohere"]


def matrices(site: AttentionSite, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape = (site.num_key_value_heads, site.value_head_dim, site.value_head_dim)
    return torch.randn(shape, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("model_type", FOLDING)
def test_graph_computes_the_same_logits(model_type: str) -> None:
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))
    model, program = tiny_model(model_type), located(model_type)
    logits, _ = run_in_float64(program, model, input_ids)
    run_passes(program, [FoldValueTransform({layer: matrices(program.sites[layer], layer) for layer in (0, 2)})])
    assert {edit.tensor.split(".")[2] for edit in program.edits} == {"0", "2"}
    transformed, _ = run_in_float64(program, model, input_ids)
    assert relative_error(transformed, logits) <= 1e-9


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_cached_values_are_the_transformed_ones(model_type: str) -> None:
    model, program = tiny_model(model_type, dtype=torch.float64), located(model_type)
    site = program.sites[1]
    assert site.value is not None
    own, weight = matrices(site), dict(model.named_parameters())[site.value.weight].detach()
    run_passes(program, [FoldValueTransform({1: own})])
    edit = next(edit for edit in program.edits if edit.tensor == site.value.weight)
    x = torch.randn(7, weight.shape[1], dtype=torch.float64)
    before = (x @ weight.T).unflatten(-1, (site.num_key_value_heads, -1))
    after = (x @ edit.apply(weight).T).unflatten(-1, (site.num_key_value_heads, -1))
    assert relative_error(after, torch.einsum("thd,hde->the", before, own)) <= 1e-12


def test_what_cannot_be_folded_is_refused() -> None:
    program = located("llama")
    own = matrices(program.sites[1])
    for wrong, words in ((own[:, :3], "shape"), (torch.zeros_like(own), "finite inverse")):
        with pytest.raises(PreconditionError, match=f"layer 1 .*{words}"):
            run_passes(program, [FoldValueTransform({1: wrong})])
    program.sites[1] = replace(program.sites[1], output=None)
    assert not can_transform(program.sites[1])
    with pytest.raises(PreconditionError, match="V of layer 1 cannot be transformed"):
        run_passes(program, [FoldValueTransform({1: own})])


def test_a_fused_projection_is_left_alone() -> None:
    assert not any(can_transform(site) for site in located("gpt_neox").sites)
