"""`runtime.load(trust_code=False)`: no code of the artifact is run that the installed compiler would not write."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.manifest import file_digest

from .conftest import CompileTiny
from .fuzz import LONG_ONLY

IDS = torch.arange(3, 43).unsqueeze(0)
ARTIFACTS = [
    ("llama", {"budget": "70%"}),
    ("gpt_oss", {"budget": "80%"}),
    pytest.param("llama", {"recipe": "rotation", "budget": "60%"}, marks=LONG_ONLY),
]


@pytest.mark.parametrize(("model_type", "options"), ARTIFACTS)
def test_what_the_compiler_wrote_it_writes_again(
    compile_tiny: CompileTiny, model_type: str, options: dict[str, Any]
) -> None:
    artifact = compile_tiny(model_type, None, **options)
    assert torch.equal(runtime.load(artifact, trust_code=False)(IDS), runtime.load(artifact)(IDS))
    rotated = json.loads((artifact / "pmkvq.json").read_text())["key_rotations"]
    assert rotated == [0, 1, 2] or options.get("recipe") != "rotation"


@pytest.fixture
def copy(compile_tiny: CompileTiny, tmp_path: Path) -> Path:
    """An artifact some of whose keys are rotated at run time."""
    artifact = compile_tiny("llama", None, recipe="rotation", budget="60%")
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def listed(folder: Path, name: str, text: str | None) -> None:
    """Write a file, or take it away, and list it so."""
    manifest = json.loads((folder / "pmkvq.json").read_text())
    if text is None:
        (folder / name).unlink()
        del manifest["files"][name]
    else:
        (folder / name).write_text(text)
        manifest["files"][name] = file_digest(folder / name)
    (folder / "pmkvq.json").write_text(json.dumps(manifest))


CHANGED = ["model.py", "__init__.py", "runtime/attention.py", "kernels/tuning.json", "../modeling_pmkvq.py"]


@pytest.mark.parametrize("name", CHANGED)
def test_changed_code_is_not_run_though_its_digest_is_right(copy: Path, tmp_path: Path, name: str) -> None:
    (package,) = (path.name for path in copy.iterdir() if path.is_dir())
    file = f"{package}/{name}" if not name.startswith("..") else name[3:]
    marker = tmp_path / "ran"
    text = (copy / file).read_text()
    payload = f"open({str(marker)!r}, 'w').close()\n"
    listed(copy, file, text + (payload if file.endswith(".py") else "\n"))
    if name == "model.py":
        runtime.load(copy)
        assert marker.exists(), "a digest tells nothing of who wrote the code"
        marker.unlink()
    with pytest.raises(runtime.ArtifactError, match=re.escape(file) + " .* is not what this version of pmkvq-compiler"):
        runtime.load(copy, trust_code=False)
    assert not marker.exists()


def test_code_that_the_compiler_does_not_write_is_refused(copy: Path) -> None:
    (package,) = (path.name for path in copy.iterdir() if path.is_dir())
    listed(copy, f"{package}/kernels/more.py", "")
    with pytest.raises(runtime.ArtifactError, match=r"kernels/more\.py .* is not what this version"):
        runtime.load(copy, trust_code=False)
    listed(copy, f"{package}/kernels/more.py", None)
    listed(copy, f"{package}/chat.py", None)
    with pytest.raises(runtime.ArtifactError, match=r"chat\.py .* is not what this version"):
        runtime.load(copy, trust_code=False)


def test_a_manifest_that_asks_for_other_code_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "pmkvq.json").read_text())
    (copy / "pmkvq.json").write_text(json.dumps({**manifest, "key_rotations": [1]}))
    runtime.load(copy)
    with pytest.raises(runtime.ArtifactError, match=r"model\.py .* is not what this version"):
        runtime.load(copy, trust_code=False)
    listed(copy, "config.json", json.dumps({**json.loads((copy / "config.json").read_text()), "model_type": "owl"}))
    with pytest.raises(runtime.ArtifactError, match="cannot be written anew") as caught:
        runtime.load(copy, trust_code=False)
    assert "\n" not in str(caught.value)


def test_a_config_that_names_code_runs_none(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    listed(copy, "configuration_owl.py", f"open({str(marker)!r}, 'w').close()\nclass OwlConfig: ...\n")
    config = json.loads((copy / "config.json").read_text())
    for model_type in ("owl", config["model_type"]):
        named = {"AutoConfig": "configuration_owl.OwlConfig", "AutoModelForCausalLM": "configuration_owl.OwlConfig"}
        listed(copy, "config.json", json.dumps({**config, "model_type": model_type, "auto_map": named}))
        with pytest.raises(runtime.ArtifactError, match=r"cannot be written anew|is not what this version") as caught:
            runtime.load(copy, trust_code=False)
        assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_machine_code_is_not_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be written anew in a few seconds; Triton compiles its kernels instead."""
    loading = sys.modules[runtime.load.__module__]
    asked = []
    monkeypatch.setattr(loading, "_fitting_archive", lambda *_: asked.append("archive"))
    monkeypatch.setattr(loading, "_check_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    monkeypatch.setattr(loading, "unreadable", lambda layer: None)
    artifact = runtime.open_artifact(copy)
    for compiled in (True, False):
        attention = runtime.choose_attention(
            artifact.package, artifact.manifest.plan, torch.device("cuda:0"), compiled=compiled
        )
        assert isinstance(attention[0], LayerKernels)
        assert attention[0].module.__name__.endswith("attention_0")
        assert asked == ["archive"], "asked for once, where code is trusted"


def test_a_copy_of_the_runtime_cannot_vouch_for_itself(copy: Path, tmp_path: Path) -> None:
    (package,) = (path.name for path in copy.iterdir() if path.is_dir())
    program = f"""
import sys
sys.path.insert(0, {str(copy)!r})
import {package}
try:
    {package}.runtime.load({str(copy)!r}, trust_code=False)
except {package}.runtime.ArtifactError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.startswith("trust_code=False needs the compiler, which writes the code anew"), done.stderr
    assert done.stdout.count("\n") == 1
