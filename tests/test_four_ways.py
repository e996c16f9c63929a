"""One text from the runtime, transformers, the installed wheel and onnxruntime."""

from __future__ import annotations

import pytest

from examples.deploy.four_ways import same_code, with_onnxruntime

from .conftest import CompileTiny
from .fuzz import LONG_ONLY
from .test_huggingface import prompt

pytest.importorskip("onnxruntime")
pytest.importorskip("hatchling", reason="builds the artifact's wheel")

NEW_TOKENS = 64


@pytest.mark.parametrize("recipe", ["best", pytest.param("kivi", marks=LONG_ONLY)])
@pytest.mark.filterwarnings("ignore")
def test_greedy_text_is_the_same_in_four_ways(compile_tiny: CompileTiny, recipe: str) -> None:
    """Where rounding made a tie fall another way in onnxruntime, its logits agree to 1e-3 until then."""
    artifact = compile_tiny("qwen2", {"hidden_size": 128}, recipe=recipe, budget="70%", onnx=True)
    ids = prompt(250)
    texts = same_code(artifact, ids, NEW_TOKENS)
    expected = texts["runtime.load"]
    assert len(expected) == NEW_TOKENS
    assert len(set(expected)) > 8, "a text, not one token again and again"
    assert all(tokens == expected for tokens in texts.values())
    found, reference, error = with_onnxruntime(artifact, ids, NEW_TOKENS)
    assert error <= 1e-3
    if recipe != "best":
        assert reference == expected, "bits that do not change are final from the first token on"
    assert found == reference or error > 0
