"""Names in generated code are Python names that mean nothing else."""

from __future__ import annotations

import ast
import builtins
import keyword

import pytest

from pmkvq_compiler.emit.expressions import Body, identifier
from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.pipeline import pipeline
from tests.programs import full_plan, located

HINTS = ["0", "norms.0", "q_norm.norms.12", "class", "None", "print", "type", "weights", "Tensor", "logits", "F", "a-b"]
HINTS += [
    "1x",
    "",
    ".",
    "_",
    "decoder_layer",
    "decoder_layer_2",
    "x.decoder_layer",
    "match",
    "for.1",
    "self",
    "caf\u00e9",
]


@pytest.mark.parametrize("hint", HINTS)
def test_every_hint_gives_a_name_of_its_own(hint: str) -> None:
    body = Body({}, [], "")
    names = [body.unique(hint) for _ in range(3)]
    assert len(set(names)) == 3
    for name in names:
        assert name.isidentifier()
        assert not keyword.iskeyword(name)
        assert not hasattr(builtins, name)
        assert name not in ("weights", "logits", "Tensor", "F", "torch", "decoder_layer", "decoder_layer_2")


def test_hints_keep_the_words_of_the_model() -> None:
    assert identifier("model.layers.3.self_attn.q_proj") == "q_proj"
    assert identifier("self_attn.q_layernorm.norms.0") == "norms_0"


@pytest.mark.parametrize(("model_type", "overrides"), [("stablelm", {"qk_layernorm": True}), ("qwen3_moe", {})])
def test_generated_functions_shadow_nothing_that_the_module_has(model_type: str, overrides: dict[str, bool]) -> None:
    program = located(model_type, **overrides)
    run_passes(program, pipeline({}, {}, {}, full_plan(program.sites)))
    tree = ast.parse(model_source(program))
    taken = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    stored = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    assert not set(stored) & (taken | imported | set(dir(builtins)))
    if overrides:
        assert "norms_0" in stored
