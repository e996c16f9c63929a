from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.passes.base import PreconditionError, run_passes
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.passes.rewrite_attention import RewriteAttention
from pmkvq_compiler.passes.rotate_keys import RotateKeys
from pmkvq_compiler.runtime.rotation import hadamard, rotate_heads

from ..models import SHAPE, tiny_model
from ..programs import full_plan, located, relative_error, run_in_float64


def rotation(site: AttentionSite, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape = (site.num_key_value_heads, site.key_head_dim, site.key_head_dim)
    return torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=draw))[0]


@pytest.mark.parametrize("dim", [1, 16, 48, 64, 80, 96, 112, 128, 256])
def test_hadamards_rotation_is_orthogonal_and_spreads_a_channel(dim: int) -> None:
    found = hadamard(dim)
    torch.testing.assert_close(found @ found.T, torch.eye(dim, dtype=torch.float64))
    assert found.abs().max() <= 1 / (dim & -dim) ** 0.5 + 1e-12


def test_every_head_meets_the_rotation_of_its_key_head() -> None:
    x, turns = torch.randn(2, 6, 5, 8), torch.linalg.qr(torch.randn(3, 8, 8, dtype=torch.float64))[0]
    found = rotate_heads(x, turns)
    assert found.dtype == x.dtype
    for head in range(6):
        torch.testing.assert_close(found[:, head], (x[:, head].double() @ turns[head // 2]).float())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma2", "gpt_neox"])
def test_the_logits_stay_and_the_keys_turn(model_type: str) -> None:
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))
    model, program = tiny_model(model_type), located(model_type)
    logits, keys = run_in_float64(program, model, input_ids)
    turns = {layer: rotation(program.sites[layer], layer) for layer in (0, 2)}
    run_passes(program, pipeline({}, turns, {}, full_plan(program.sites)))
    turned_logits, turned_keys = run_in_float64(program, model, input_ids)
    assert relative_error(turned_logits, logits) <= 1e-6, "rotations are float32 constants"
    for layer, (before, after) in enumerate(zip(keys, turned_keys, strict=True)):
        expected = rotate_heads(before, turns[layer]) if layer in turns else before
        assert relative_error(after, expected) <= 1e-6


def test_rotations_become_constants_of_their_layers() -> None:
    program = located("llama")
    run_passes(program, [RewriteAttention(), RotateKeys({1: rotation(program.sites[1])})])
    (constant,) = (one for one in program.constants.values() if "rotation" in one.name)
    assert constant.name == "model.layers.1.key_rotation"
    assert constant.value.dtype == torch.float32


def test_what_is_no_rotation_is_refused() -> None:
    program = located("llama")
    run_passes(program, [RewriteAttention()])
    turn = rotation(program.sites[1])
    for wrong, words in ((turn[:, :3], "shape"), (2 * turn, "not orthogonal"), (turn / 0, "not orthogonal")):
        with pytest.raises(PreconditionError, match=f"layer 1 .*{words}"):
            run_passes(program, [RotateKeys({1: wrong})])
