"""Models of unusual kinds in every way that an artifact is used: each way works, or is refused in one sentence.

`make fuzz` runs these tests. Wheels, artifacts in transformers, and ONNX models are real.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pmkvq_compiler import runtime
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from tests.conftest import CompileTiny, silent
from tests.environments import build_wheel, environment, install
from tests.families import FAMILIES
from tests.folders import tree
from tests.fuzz import LONG_ONLY
from tests.hybrids import HYBRIDS
from tests.models import tiny_folder
from tests.programs import relative_error
from tests.test_deployment import run

FOUR_BITS: dict[str, Any] = {"budget": "200KiB", "recipe": "uniform", "bits": (4,), "window": 16, "block": 16}
FOUR_BITS |= {"max_len": 160, "calib_samples": 2, "calib_len": 64}


@dataclass(frozen=True)
class Kind:
    """A model type, what makes a tiny model of it, and the reason why ONNX is refused (None: it is not)."""

    model_type: str
    overrides: dict[str, Any]
    not_in_onnx: str | None


def _family(name: str, not_in_onnx: str | None) -> Kind:
    return Kind(FAMILIES[name].model_type, FAMILIES[name].overrides, not_in_onnx)


KINDS = {
    "short convolutions": Kind("lfm2", HYBRIDS["lfm2"], "layers with a recurrent state"),
    "gated delta rules": Kind("qwen3_5_text", HYBRIDS["qwen3_5_text"], "layers with a recurrent state"),
    "latents": _family("minicpm3", None),
    "latents and experts": _family("deepseek_v3", "the matrices of its experts"),
    "shared caches": _family("gemma3n", "attends to the keys and values of layer"),
    "chunks": _family("llama4", "attends in chunks of 12 tokens"),
}


pytestmark = LONG_ONLY


@pytest.fixture(scope="module", params=KINDS)
def artifact(request: pytest.FixtureRequest, compile_tiny: CompileTiny) -> Path:
    kind = KINDS[request.param]
    return compile_tiny(kind.model_type, kind.overrides, **FOUR_BITS, onnx=kind.not_in_onnx is None)


def tokens(count: int = 90) -> Tensor:
    return torch.randint(3, 128, (1, count), generator=torch.Generator().manual_seed(3))


def text(artifact: Path) -> list[int]:
    """What the artifact writes by itself, with a cache at its final bits."""
    model = runtime.load(artifact, trust_code=False)
    cache = model.new_cache()
    written = model.generate(tokens(), 20, cache=cache, eos_token_id=())
    assert any(layer.plan.quantized for layer in cache.layers)
    return [int(one) for one in written[0]]


def test_transformers_writes_the_same_text(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True)
    written = model.generate(tokens(), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert written[0].tolist() == text(artifact)


def test_without_remote_code_it_is_the_source_model(artifact: Path) -> None:
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (artifact, artifact.parent / "source")]
    with torch.no_grad():
        folded, source = (model(tokens()).logits for model in models)
    assert relative_error(folded, source) <= 1e-5


def test_the_wheel_writes_the_same_text_where_no_compiler_is(artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds the artifact's wheel")
    wheel = build_wheel(artifact, tmp_path)
    python = environment(tmp_path / "venv", "torch", "safetensors")
    install(python, wheel)
    package = json.loads((artifact / "pmkvq.json").read_text())["package"]
    code = f"import json, sys, torch, {package}; model = {package}.load(); ids = torch.tensor(json.load(sys.stdin)); "
    code += "print(model.generate(ids, 20, eos_token_id=()).tolist())"
    assert json.loads(run(python, "-c", code, stdin=json.dumps(tokens().tolist()))) == [text(artifact)]


@pytest.mark.parametrize("name", KINDS)
def test_onnx_works_or_is_refused_before_anything_is_measured(
    name: str, compile_tiny: CompileTiny, tmp_path: Path
) -> None:
    kind = KINDS[name]
    if kind.not_in_onnx is None:
        from tests.emit.test_onnx import Decoder

        artifact = compile_tiny(kind.model_type, kind.overrides, **FOUR_BITS, onnx=True)
        decode, model = Decoder(artifact), runtime.load(artifact)
        assert relative_error(torch.tensor(decode(tokens())), model(tokens())) <= 1e-4
        return
    source = tiny_folder(tmp_path / "source", kind.model_type, **kind.overrides)
    before = tree(tmp_path)
    options = CompileOptions(str(source), tmp_path / "out", budget="200KiB", max_len=160, onnx=True)
    with pytest.raises(CompileError, match=f"{kind.not_in_onnx}.* without --onnx$") as caught:
        compile_model(options, silent)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
