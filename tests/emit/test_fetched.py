"""An artifact runs on a device that has no room for it, and computes the same there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.calibrate.storage import load_calibration
from pmkvq_compiler.emit.check import LAYER_TOLERANCE, check_artifact
from pmkvq_compiler.emit.fetched import LARGEST_COPIES, RESERVE, Fetched, load_anyhow, placed
from pmkvq_compiler.emit.layer_errors import layer_errors

from ..conftest import CompileTiny


@pytest.mark.parametrize(
    ("rooms", "expected"),
    [
        ({"cpu": 0}, ["cpu", "cpu", "cpu"]),
        ({"meta": 0}, ["cpu", "cpu", "cpu"]),
        ({"meta": -1}, ["cpu", "cpu", "cpu"]),
        ({"meta": 48}, ["meta", "cpu", "meta"]),
        ({"meta": 120}, ["meta", "meta", "meta"]),
        ({"cpu": 40, "meta": 80}, ["cpu", "meta", "cpu"]),
    ],
)
def test_each_weight_lies_on_the_first_device_with_room(rooms: dict[str, int], expected: list[str]) -> None:
    weights = {"one": torch.zeros(8), "two": torch.zeros(18), "three": torch.zeros(2, 2, dtype=torch.bfloat16)}
    assert [tensor.device.type for tensor in placed(weights, rooms).values()] == expected


def test_weights_are_brought_to_a_device_and_a_dtype_when_they_are_read() -> None:
    stored = {"weight": torch.ones(2, dtype=torch.bfloat16), "places": torch.ones(2, dtype=torch.int64)}
    fetched = Fetched(stored, torch.device("meta"), torch.float32)
    assert {name: (tensor.device.type, tensor.dtype) for name, tensor in fetched.items()} == {
        "weight": ("meta", torch.float32),
        "places": ("meta", torch.int64),
    }
    assert Fetched(stored, torch.device("cpu"))["weight"] is stored["weight"]


def test_a_model_computes_the_same_wherever_its_weights_are(compile_tiny: CompileTiny) -> None:
    artifact = compile_tiny("llama", recipe="none")
    ids = torch.arange(3, 67).unsqueeze(0)
    assert torch.equal(load_anyhow(artifact, {"cpu": 0})(ids), runtime.load(artifact)(ids))


def check(artifact: Path, scratch: Path, rooms: Mapping[str, int]) -> dict[str, float]:
    (path,) = artifact.parent.glob("*.calibration.safetensors")
    found = load_calibration(path)
    return check_artifact(artifact, scratch, "bfloat16", rooms, found.check_ids, found.check_logits, found.check_layers)


@pytest.mark.gpu
def test_gpus_check_an_artifact_that_does_not_fit_them(compile_tiny: CompileTiny, tmp_path: Path) -> None:
    artifact = compile_tiny("qwen2", {"num_hidden_layers": 3}, budget="60%", dtype="bfloat16", device="cuda")
    weights = runtime.load(artifact).weights.values()
    total = sum(weight.nbytes for weight in weights)
    least = RESERVE + LARGEST_COPIES * max(weight.numel() for weight in weights)
    half = {"cuda:0": least + total // 2}
    assert {weight.device.type for weight in load_anyhow(artifact, half).weights.values()} == {"cpu", "cuda"}
    whole = check(artifact, tmp_path, {"cuda:0": least + total})
    every = {f"cuda:{index}": least + total // 3 for index in range(torch.cuda.device_count())}
    for rooms in ({"cuda:0": 0}, half, every):
        assert check(artifact, tmp_path, rooms) == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_wrong_head_is_found_in_weights_that_are_fetched(compile_tiny: CompileTiny, device: str) -> None:
    artifact = compile_tiny("qwen2", {"num_hidden_layers": 3}, budget="60%", dtype="bfloat16", calib_samples=1)
    (path,) = artifact.parent.glob("*.calibration.safetensors")
    found, model = load_calibration(path), load_anyhow(artifact, {device: 0})

    def largest() -> float:
        return max(one.error for one in layer_errors(model, found.check_ids, found.check_layers))

    assert largest() < LAYER_TOLERANCE["bfloat16"]
    name = "model.layers.1.self_attn.k_proj.weight"
    model.weights[name] = torch.cat([-model.weights[name][:8], model.weights[name][8:]])
    assert largest() > LAYER_TOLERANCE["bfloat16"]
