"""`--onnx`: the model is valid, shares the checkpoint's weights and computes what the runtime does."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from examples.deploy.four_ways import as_in_onnx
from pmkvq_compiler import runtime
from pmkvq_compiler.cli import main
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from tests.conftest import CompileTiny, silent
from tests.folders import model_folder, tree
from tests.fuzz import LONG_ONLY
from tests.models import tiny_folder
from tests.programs import relative_error

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ["--max-len", "400", "--window", "64", "--sink", "4", "--calib-samples", "2", "--calib-len", "96"]
PROMPT, STEPS = 150, 64


@pytest.fixture(scope="module")
def token_axis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, compiled by command: K grouped by token, K and V of a layer at the same bits."""
    folder = tmp_path_factory.mktemp("onnx")
    source = model_folder(folder / "tiny-llama")
    arguments = [str(source), "--budget", "70%", *SMALL, "--recipe", "pm-kvq", "--onnx", "-o", str(folder / "artifact")]
    assert main(arguments) == 0
    return folder / "artifact"


@pytest.fixture(scope="module")
def channel_axis(compile_tiny: CompileTiny) -> Path:
    """A tiny Qwen2: K grouped by channel."""
    return compile_tiny("qwen2", budget="60%", bits=(4, 2), onnx=True)


@pytest.fixture(params=["token_axis", "channel_axis"])
def artifact(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    axes = {layer.key_axis for layer in runtime.load(folder).plan.layers if layer.quantized}
    assert request.param.removesuffix("_axis") in axes
    return folder


class Decoder:
    """The ONNX model with the state of its sequences."""

    def __init__(self, folder: Path, batch_size: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
        self.names = [one.name for one in self.session.get_outputs()]
        self.length = 0
        self.state = {
            one.name: np.zeros(
                [batch_size, *(size if isinstance(size, int) else 0 for size in one.shape[1:])], dtypes[one.type]
            )
            for one in self.session.get_inputs()[2:]
        }

    def __call__(self, input_ids: Tensor) -> Tensor:
        positions = self.length + torch.arange(input_ids.shape[1]).expand_as(input_ids)
        feeds = {"input_ids": input_ids.numpy(), "position_ids": positions.numpy(), **self.state}
        results = dict(zip(self.names, self.session.run(None, feeds), strict=True))
        logits = results.pop("logits")
        self.state = {name.replace("present.", "past_key_values."): value for name, value in results.items()}
        self.length += input_ids.shape[1]
        return torch.from_numpy(logits)


def prompt(batch_size: int = 1, count: int = PROMPT) -> Tensor:
    return torch.randint(3, 128, (batch_size, count), generator=torch.Generator().manual_seed(7))


def greedy(step: Any, input_ids: Tensor) -> tuple[list[int], Tensor]:
    """Tokens, and the logits [N, V] that they were chosen from."""
    logits = [step(input_ids)[0, -1]]
    for _ in range(STEPS - 1):
        logits.append(step(logits[-1].argmax().view(1, 1))[0, -1])
    return [int(one.argmax()) for one in logits], torch.stack(logits)


def test_greedy_text_is_the_runtimes(artifact: Path) -> None:
    """Where rounding made another code of a number that lies between two, logits may differ by 1e-3."""
    model, cache = as_in_onnx(artifact)
    expected, logits = greedy(lambda ids: model(ids, cache), prompt())
    found, own_logits = greedy(Decoder(artifact), prompt())
    same = next((n for n in range(STEPS) if expected[n] != found[n]), STEPS)
    assert relative_error(own_logits[:same], logits[:same]) <= 1e-3
    assert same == STEPS or relative_error(own_logits[same], logits[same]) <= 1e-3


def test_pieces_and_batches_are_the_runtimes(channel_axis: Path) -> None:
    model, cache = as_in_onnx(channel_axis, batch_size=2)
    decoder, ids = Decoder(channel_axis, batch_size=2), prompt(2, 180)
    for piece in ids.split([90, 1, 1, 70, 1, 17], dim=1):
        assert relative_error(decoder(piece), model(piece, cache)) <= 1e-3
    assert any("key_codes" in name and value.shape[2] > 1 for name, value in decoder.state.items())


@pytest.mark.parametrize(
    "recipe", ["rotation", *(pytest.param(recipe, marks=LONG_ONLY) for recipe in ("kivi", "best"))]
)
def test_every_recipe_is_the_runtimes(compile_tiny: CompileTiny, recipe: str) -> None:
    folder = compile_tiny("qwen2", recipe=recipe, budget="70%", onnx=True)
    model, cache = as_in_onnx(folder)
    decoder, ids = Decoder(folder), prompt(1, 250)
    for piece in ids.split([200, 1, 49], dim=1):
        assert relative_error(decoder(piece), model(piece, cache)) <= 1e-3


def test_model_passes_the_checker_and_carries_the_plan(artifact: Path) -> None:
    onnx.checker.check_model(artifact / "model.onnx", full_check=True)
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert inferred.graph.output[0].name == "logits"
    assert {node.domain for node in model.graph.node} == {"", "pmkvq"}
    assert {node.domain for function in model.functions for node in function.node} == {""}
    calls = [node for node in model.graph.node if node.domain == "pmkvq"]
    assert {call.op_type for call in calls} == {function.name for function in model.functions}
    plan = runtime.load(artifact).plan
    assert len(calls) == len(plan.layers)
    carried = {entry.key: entry.value for entry in model.metadata_props}
    assert runtime.CachePlan.from_json(json.loads(carried["pmkvq.plan"])) == plan
    assert str(Path(onnx.__file__).parents[1]) not in (artifact / "model.onnx").read_bytes().decode("latin-1")


def test_weights_are_those_of_the_checkpoint(artifact: Path) -> None:
    assert not list(artifact.glob("*.data"))
    weights = load_file(artifact / "model.safetensors")
    model = onnx.load(artifact / "model.onnx")
    initializers = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert set(weights) <= set(initializers)
    assert all(np.array_equal(initializers[name], value.numpy()) for name, value in weights.items())
    own = {name: value for name, value in initializers.items() if name not in weights}
    assert sum(value.nbytes for name, value in own.items() if not name.endswith("key_rotation")) < 1000


def test_session_opens_from_another_folder(channel_axis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert torch.isfinite(Decoder(channel_axis)(prompt())).all()


def test_unquantized_cache_of_a_bfloat16_model(compile_tiny: CompileTiny) -> None:
    folder = compile_tiny("llama", recipe="none", dtype="bfloat16", onnx=True)
    (model, cache), decoder = as_in_onnx(folder), Decoder(folder)
    assert all(name.endswith("_rows") and value.dtype == np.float16 for name, value in decoder.state.items())
    for piece in prompt().split([100, 1, 49], dim=1):
        assert relative_error(decoder(piece), model(piece, cache)) <= 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=LONG_ONLY)])
def test_cache_stays_in_the_budget(compile_tiny: CompileTiny, dtype: str) -> None:
    folder = compile_tiny("qwen2", budget="60%", bits=(4, 2), dtype=dtype, onnx=True)
    (model, cache), decoder = as_in_onnx(folder), Decoder(folder)
    errors = []
    for piece in prompt(1, cache.max_len).split(50, dim=1):
        errors.append(relative_error(decoder(piece), model(piece, cache)))
        assert sum(value.nbytes for value in decoder.state.values()) == cache.bytes_used <= model.plan.budget
    assert statistics.median(errors) <= 1e-3
    assert max(errors) <= 1e-2, "a number between two codes of 2 bits may get the other one, and stays in the cache"


def test_shards_are_read_where_they_are(
    tmp_path: Path, compile_tiny: CompileTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pmkvq_compiler.compile.MAX_SHARD_BYTES", 60_000)
    folder = compile_tiny("llama", overrides={"num_hidden_layers": 1}, recipe="none", onnx=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    logits = runtime.load(folder)(prompt())
    assert relative_error(Decoder(folder)(prompt()), logits) <= 1e-5


def test_example_prints_text(token_axis: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "onnx" / "onnx_generate.py"),
        str(token_axis),
        "The whale",
        "--max-new-tokens",
        "9",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[18 tokens in" in done.stdout


def test_benchmark_prints_a_table(token_axis: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "benchmarks" / "onnx_decode.py"
    options = ["--context", "100", "--steps", "2", "--turns", "1"]
    command = [sys.executable, str(script), str(token_axis), str(token_axis), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]] == [
        "plain float cache",
        "packed cache",
    ]


def test_missing_package_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("pmkvq_compiler.emit.onnx_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["demo", "--budget", "22MiB", "--onnx", "-o", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "--onnx needs the package onnxscript" in message
    assert "pip install 'pmkvq-compiler[onnx]'" in message
    assert tree(tmp_path) == {}


def test_mixture_of_experts_is_refused_before_it_is_measured(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", "mixtral")
    before = tree(tmp_path)
    with pytest.raises(CompileError, match=r"aten::_grouped_mm.* compile it without --onnx"):
        compile_model(CompileOptions(str(source), tmp_path / "out", budget="70%", max_len=256, onnx=True), silent)
    assert tree(tmp_path) == before
