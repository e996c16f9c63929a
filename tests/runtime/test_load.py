"""Loading an artifact: damage and newer formats are named, and the artifact needs nothing but torch and safetensors."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmkvq_compiler import runtime
from tests.conftest import CompileTiny


@pytest.fixture
def copy(compile_tiny: CompileTiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(compile_tiny("llama", budget="70%"), tmp_path / "copy"))


def test_every_changed_file_is_named(copy: Path) -> None:
    manifest = json.loads((copy / "pmkvq.json").read_text())
    written = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    assert written == {*manifest["files"], "pmkvq.json", "README.md"}, "every file has a digest, but what people edit"
    for name in manifest["files"]:
        original = (copy / name).read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        (copy / name).write_bytes(changed)
        with pytest.raises(runtime.ArtifactError, match=f"{name} was changed"):
            runtime.load(copy)
        (copy / name).write_bytes(original)
    runtime.load(copy)


def test_weights_may_be_loaded_without_their_digests_but_not_with_other_shapes_or_other_code(copy: Path) -> None:
    weights = copy / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(runtime.ArtifactError, match=r"model\.safetensors was changed"):
        runtime.load(copy)
    runtime.load(copy, verify="manifest")
    weights.write_bytes(original[:-1])
    with pytest.raises(runtime.ArtifactError, match=r"model\.safetensors cannot be read"):
        runtime.load(copy, verify="manifest")
    weights.write_bytes(original)
    save_file({name: tensor.unsqueeze(0) for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(runtime.ArtifactError, match=r"where pmkvq\.json says"):
        runtime.load(copy, verify="manifest")
    weights.write_bytes(original)
    code = copy / json.loads((copy / "pmkvq.json").read_text())["package"] / "model.py"
    code.write_bytes(code.read_bytes() + b"#")
    with pytest.raises(runtime.ArtifactError, match=r"model\.py was changed"):
        runtime.load(copy, verify="manifest")
    with pytest.raises(runtime.InputError, match="verify 'nothing' is not known"):
        runtime.load(copy, verify="nothing")  # type: ignore[arg-type]


def test_missing_file_other_formats_and_other_folders_are_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(runtime.ArtifactError, match="is not an artifact"):
        runtime.load(tmp_path / "nowhere")
    with pytest.raises(runtime.ArtifactError, match="dtype 'int3'"):
        runtime.load(copy, dtype="int3")
    manifest = json.loads((copy / "pmkvq.json").read_text())
    own = runtime.FORMAT_VERSION
    for version, advice in ((own + 1, "upgrade"), (own - 1, "compile the model with this version")):
        (copy / "pmkvq.json").write_text(json.dumps({**manifest, "format_version": version}))
        with pytest.raises(runtime.ArtifactError, match=f"format version {version} .* reads {own}; {advice}"):
            runtime.load(copy)
    (copy / "pmkvq.json").write_text("{")
    with pytest.raises(runtime.ArtifactError, match="cannot be read"):
        runtime.load(copy)
    (copy / "pmkvq.json").write_text(json.dumps(manifest))
    (copy / "model.safetensors").unlink()
    with pytest.raises(runtime.ArtifactError, match=r"model\.safetensors is missing"):
        runtime.load(copy)


@pytest.mark.parametrize("device", ["cuda:99", "banana"])
def test_a_device_that_is_not_there_is_named(copy: Path, device: str) -> None:
    with pytest.raises(runtime.InputError, match=f'device "{device}" cannot be used .*; name one that PyTorch has'):
        runtime.load(copy, device=device)


def test_other_dtypes(copy: Path) -> None:
    ids = torch.randint(3, 128, (1, 40))
    exact = runtime.load(copy, dtype=torch.float64)(ids)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        logits = runtime.load(copy, dtype=dtype)(ids)
        assert logits.dtype == dtype
        assert (logits.double() - exact).norm() / exact.norm() < tolerance


def test_artifact_runs_without_transformers_and_without_the_compiler(copy: Path, tmp_path: Path) -> None:
    """A fresh interpreter that sees torch and safetensors only, with the artifact as its only other code."""
    package = json.loads((copy / "pmkvq.json").read_text())["package"]
    program = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"transformers", "pmkvq_compiler", "accelerate", "jinja2", "pulp", "rich"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, {str(copy)!r})
import {package}
model = {package}.load()
import torch
from safetensors.torch import load_file, save_file
print(model.generate(torch.arange(3, 23).unsqueeze(0), 8, eos_token_id=()).tolist()[0])
assert not {{"transformers", "pmkvq_compiler"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    here = runtime.load(copy).generate(torch.arange(3, 23).unsqueeze(0), 8, eos_token_id=()).tolist()[0]
    assert json.loads(done.stdout) == here


def test_what_a_model_keeps_in_float32_stays_so(compile_tiny: CompileTiny) -> None:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    shape = {"moe_intermediate_size": 32, "first_k_dense_replace": 1, **experts}
    artifact = compile_tiny("glm4_moe", shape, recipe="none", dtype="bfloat16")
    stored = load_file(artifact / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32, torch.bfloat16}
    (weights,) = runtime.load(artifact).logits.args
    assert {name: weights[name].dtype for name in stored} == {name: value.dtype for name, value in stored.items()}


@pytest.mark.parametrize("max_len", [1, 20])
def test_a_cache_shorter_than_a_calibration_text_is_compiled(compile_tiny: CompileTiny, max_len: int) -> None:
    artifact = compile_tiny("llama", recipe="none", max_len=max_len)
    out = runtime.load(artifact)(torch.ones(1, max_len, dtype=torch.long))
    assert torch.isfinite(out).all()
