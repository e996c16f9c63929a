"""The two backends of a loaded artifact: which is taken when, and that they say the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.reference import REFERENCE

from ..conftest import CompileTiny

ROOT = Path(__file__).parent.parent.parent
SHAPE = {"head_dim": 16, "sliding_window": 200}
OPTIONS = {"budget": "107KiB", "max_len": 420, "block": 64, "window": 64, "calib_len": 160}


@pytest.fixture
def artifact(compile_tiny: CompileTiny) -> Path:
    """A model with layers that see everything and layers that see a window, in an artifact that must lower both."""
    return compile_tiny("gemma2", SHAPE, **OPTIONS)


def test_a_backend_is_taken_as_told_or_refused(artifact: Path) -> None:
    for model in (runtime.load(artifact), runtime.load(artifact, backend="reference")):
        assert model.attention == [REFERENCE] * len(model.plan.layers)
    with pytest.raises(runtime.InputError, match=r'"triton" needs a CUDA device and the model is on cpu'):
        runtime.load(artifact, backend="triton")
    with pytest.raises(runtime.InputError, match=r"backend 'cuda' is not known"):
        runtime.load(artifact, backend="cuda")  # type: ignore[arg-type]


def test_an_artifact_has_a_readable_file_of_kernels_for_each_kind_of_layer(artifact: Path) -> None:
    package = artifact / json.loads((artifact / "pmkvq.json").read_text())["package"]
    files = sorted(path.name for path in (package / "kernels").iterdir() if path.suffix == ".py")
    assert files == ["attention_0.py", "attention_1.py", "fused.py", "layers.py"]
    for name in files:
        text = (package / "kernels" / name).read_text()
        compile(text, name, "exec")
        assert "{{" not in text
        assert max(map(len, text.splitlines())) <= 120


def test_both_backends_say_the_same(artifact: Path) -> None:
    """Logits over a prompt and greedy steps, the kernels in Triton's interpreter, through every stage of the cache."""
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    package = artifact / json.loads((artifact / "pmkvq.json").read_text())["package"]
    constants = load_file(package / "constants.safetensors")
    assert any(name.endswith("key_rotation") for name in constants), "the run was to have keys that are rotated"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.backend_checks", str(artifact), "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_both_backends_say_the_same_on_the_device(compile_tiny: CompileTiny, dtype: torch.dtype) -> None:
    from ..backend_checks import compare

    budget = OPTIONS["budget"] if dtype == torch.float32 else "60KiB"  # sink and window take half the bytes
    artifact = compile_tiny(
        "gemma2", SHAPE, **{**OPTIONS, "budget": budget, "dtype": str(dtype).removeprefix("torch.")}
    )
    compare(artifact, "cuda", dtype, 3e-2 if dtype == torch.bfloat16 else 1e-2)
