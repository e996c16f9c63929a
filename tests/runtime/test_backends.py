"""The two backends of a loaded artifact: which is taken when, and that they say the same."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.reference import REFERENCE, Reference

from ..conftest import CompileTiny
from ..interpreted import run_interpreted

loading = sys.modules[runtime.load.__module__]
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


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key_head_dim": 576}, "head_dim 576 is more than 512, the most that the Triton kernels hold"),
        ({"value_head_dim": 120}, "head_dim 120 is not a multiple of 16, which the Triton kernels need"),
        ({"block": 96}, "a block of 96 tokens is not a power of two"),
    ],
)
def test_layers_that_kernels_cannot_read_are_left_to_the_reference(
    artifact: Path, change: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a warning, unless the kernels were asked for. The other layers and the recurrences are as they would be."""
    monkeypatch.setattr(loading, "_check_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    opened, device = runtime.open_artifact(artifact), torch.device("cuda:0")
    first, *others = opened.manifest.plan.layers
    plan = dataclasses.replace(opened.manifest.plan, layers=(dataclasses.replace(first, **change), *others))
    with pytest.warns(UserWarning, match=f"^{reason}.*: such layers are computed in plain PyTorch, which is slower$"):
        left, *kept = runtime.choose_attention(opened.package, plan, device)
    assert isinstance(left, Reference)
    assert left is not REFERENCE, "nobody asked for plain PyTorch"
    assert all(isinstance(one, LayerKernels) for one in kept)
    with pytest.raises(runtime.InputError, match=f'^{reason}.*; load with backend="reference"$'):
        runtime.choose_attention(opened.package, plan, device, "triton")


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
    run_interpreted("tests.backend_checks", artifact, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_both_backends_say_the_same_on_the_device(compile_tiny: CompileTiny, dtype: torch.dtype) -> None:
    from ..backend_checks import compare

    budget = OPTIONS["budget"] if dtype == torch.float32 else "60KiB"  # sink and window take half the bytes
    artifact = compile_tiny(
        "gemma2", SHAPE, **{**OPTIONS, "budget": budget, "dtype": str(dtype).removeprefix("torch.")}
    )
    compare(artifact, "cuda", dtype, 3e-2 if dtype == torch.bfloat16 else 1e-2)
