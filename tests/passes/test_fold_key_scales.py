from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.passes.base import PreconditionError, run_passes
from pmkvq_compiler.passes.fold_key_scales import FoldKeyScales
from pmkvq_compiler.passes.program import Program

from ..families import FAMILIES
from ..fuzz import chosen
from ..models import SHAPE, tiny_model
from ..programs import located, relative_error, run_in_float64

FOLDING = ["llama", "qwen2", "mistral", "qwen3", "gemma3_text", "olmo2", "exaone4"]


def paired_scales(program: Program, seed: int = 0) -> dict[int, Tensor]:
    """Random scales between 1/4 and 4 whose RoPE pairs agree, and whose heads agree where they share them."""
    generator = torch.Generator().manual_seed(seed)
    scales = {}
    for site in program.sites:
        half = torch.rand(site.num_key_value_heads, site.key_head_dim // 2, generator=generator, dtype=torch.float64)
        if site.heads_share_scales:
            half = half[:1].expand_as(half)
        scales[site.layer] = torch.cat([half, half], dim=-1).mul(4).sub(2).exp2()
    return scales


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", FOLDING)
def test_graph_computes_the_same_logits_and_divided_keys(model_type: str, input_ids: Tensor) -> None:
    model, program = tiny_model(model_type), located(model_type)
    logits, keys = run_in_float64(program, model, input_ids)
    scales = paired_scales(program)
    run_passes(program, [FoldKeyScales(scales)])
    folded_logits, folded_keys = run_in_float64(program, model, input_ids)
    assert relative_error(folded_logits, logits) <= 1e-10
    for layer, (key, folded) in enumerate(zip(keys, folded_keys, strict=True)):
        assert relative_error(folded, key / scales[layer].unsqueeze(1)) <= 1e-10
        assert relative_error(folded, key) > 0.1


@pytest.mark.parametrize("model_type", FOLDING)
def test_transformers_computes_the_same_with_the_edited_weights(model_type: str, input_ids: Tensor) -> None:
    model, program = tiny_model(model_type, dtype=torch.float64), located(model_type)
    with torch.no_grad():
        logits = model(input_ids).logits
        run_passes(program, [FoldKeyScales(paired_scales(program))])
        parameters = dict(model.named_parameters())
        for edit in program.edits:
            parameters[edit.tensor].copy_(edit.apply(parameters[edit.tensor]))
        # the norms of transformers compute in float32 whatever the model's dtype
        assert relative_error(model(input_ids).logits, logits) <= 3e-7


@pytest.mark.parametrize("name", chosen(["gemma3n", "gemma4"], "gemma4"))
def test_rope_before_heads_are_moved_folds_too(name: str, input_ids: Tensor) -> None:
    family = FAMILIES[name]
    overrides = {**family.overrides, "sliding_window": 512}
    model, program = (make(family.model_type, **overrides) for make in (tiny_model, located))
    logits, keys = run_in_float64(program, model, input_ids)
    scales = {0: paired_scales(program)[0]}
    run_passes(program, [FoldKeyScales(scales)])
    folded_logits, folded_keys = run_in_float64(program, model, input_ids)
    assert relative_error(folded_logits, logits) <= 1e-10
    assert relative_error(folded_keys[0], keys[0] / scales[0].unsqueeze(1)) <= 1e-10


def test_biases_are_folded_too() -> None:
    program = located("qwen2")
    run_passes(program, [FoldKeyScales({0: paired_scales(program)[0]})])
    attention = "model.layers.0.self_attn"
    assert [edit.tensor for edit in program.edits] == [
        f"{attention}.{name}" for name in ("k_proj.weight", "k_proj.bias", "q_proj.weight", "q_proj.bias")
    ]


def test_layers_without_scales_are_left_alone() -> None:
    program = located("llama")
    assert not run_passes(program, [FoldKeyScales({})])["FoldKeyScales"].modified
    assert program.edits == []


def test_site_with_a_reason_is_refused() -> None:
    with pytest.raises(PreconditionError, match="layer 0 cannot be folded: there is no RoPE between k_proj"):
        run_passes(located("opt"), [FoldKeyScales({0: torch.ones(4, 16, dtype=torch.float64)})])


def test_heads_that_share_the_weights_of_a_norm_share_their_scales() -> None:
    scale = torch.ones(2, 16, dtype=torch.float64)
    scale[1] = 2
    with pytest.raises(PreconditionError, match="differ between heads, which share the weights of a norm"):
        run_passes(located("qwen3"), [FoldKeyScales({0: scale})])


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (torch.arange(1.0, 33).reshape(2, 16), "differ within a RoPE pair"),
        (torch.zeros(2, 16), "not all finite and positive"),
        (torch.full((2, 16), float("nan")), "not all finite and positive"),
        (torch.ones(4, 16), r"shape \[4, 16\] instead of \[2, 16\]"),
    ],
)
def test_wrong_scales_are_refused(scale: Tensor, reason: str) -> None:
    with pytest.raises(PreconditionError, match=reason) as caught:
        run_passes(located("llama"), [FoldKeyScales({1: scale.double()})])
    assert isinstance(caught.value.__cause__, ValueError)


def test_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(PreconditionError, match="layer 7"):
        run_passes(located("llama"), [FoldKeyScales({7: torch.ones(2, 16)})])
