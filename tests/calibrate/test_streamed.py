"""A model read layer by layer measures what it measures in one piece, in less memory, and goes on after a stop."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate import opened as module
from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.measure import calibrate
from pmkvq_compiler.calibrate.storage import load_or_calibrate
from pmkvq_compiler.calibrate.streamed_model import StreamedModel
from pmkvq_compiler.compile import captured, compile_model
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.plan.rerank import best_plans
from pmkvq_compiler.problem import Problem, resolve
from pmkvq_compiler.progress import Steps
from pmkvq_compiler.source.source import Source
from tests.conftest import silent, token_lines
from tests.devices import two_gpus
from tests.fuzz import LONG
from tests.models import tiny_folder

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("gpt_oss", {"sliding_window": 160, "num_local_experts": 4, "num_experts_per_tok": 2}),
]
if os.environ.get(LONG):
    KINDS += [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gemma2", {"sliding_window": 160, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0}),
        ("phi3", {}),
        ("cohere", {}),
    ]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(module, "free_bytes", lambda device: 0)


def request_of(folder: Path, model_type: str, overrides: dict[str, Any], **chosen: Any) -> tuple[Source, Problem]:
    """A tiny model, and a request for it with two texts of different lengths."""
    tiny_folder(folder / "model", model_type, max_shard_size="100KB", **overrides)
    calib = token_lines(folder / "calib.jsonl", lines=2, count=170)
    small = {"budget": "75%", "calib_samples": 3, "calib_len": 100, "block": 32, "device": "cpu", "max_len": 400}
    options = CompileOptions(str(folder / "model"), folder / "artifact", calib=str(calib), **{**small, **chosen})
    source, program, max_len = captured(options, Steps(silent))
    return source, resolve(options, program.sites, max_len, source.dtype)


def numbers(value: Any) -> list[float]:
    """All numbers of a part of a calibration."""
    if isinstance(value, dict):
        return list(itertools.chain.from_iterable(numbers(each) for each in value.values()))
    if isinstance(value, Tensor):
        return value.double().flatten().tolist()
    return [float(value)]


def assert_close(one: Calibration, other: Calibration) -> None:
    for field in fields(Calibration):
        first, second = getattr(one, field.name), getattr(other, field.name)
        if field.name == "fingerprint":
            assert first == second
        elif field.name == "check_layers":
            torch.testing.assert_close(vars(first), vars(second), rtol=1e-4, atol=1e-5)
        else:
            assert numbers(first) == pytest.approx(numbers(second), rel=1e-4, abs=1e-7), field.name


@pytest.mark.parametrize(("model_type", "overrides"), KINDS)
def test_a_streamed_model_has_the_calibration_and_the_plan_of_the_whole_one(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], little_memory: Callable[[], None]
) -> None:
    source, problem = request_of(tmp_path, model_type, overrides)
    whole = calibrate(source, problem, silent)
    (plan,) = best_plans(source, [problem], whole, silent)
    little_memory()
    assert isinstance(module.opened(source, problem), StreamedModel)
    streamed = calibrate(source, problem, silent)
    assert_close(streamed, whole)
    (found,) = best_plans(source, [problem], streamed, silent)
    assert found.solution == plan.solution
    assert found.loss == pytest.approx(plan.loss, rel=1e-4)


class Stopped(Exception):
    """What ends a calibration in these tests."""


def test_a_calibration_that_was_stopped_at_any_layer_goes_on_there(
    tmp_path: Path, little_memory: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, problem = request_of(tmp_path, "qwen2", {"num_hidden_layers": 2, "tie_word_embeddings": True})
    little_memory()
    expected = calibrate(source, problem, silent)
    ran: list[int] = []
    run = StreamedModel.run

    def counted(streamed: StreamedModel, number: int, text: Any, hidden: Tensor) -> Tensor:
        ran.append(number)
        return run(streamed, number, text, hidden)

    finished: list[int] = []
    finish = StreamedModel.finish

    def counted_head(streamed: StreamedModel, text: Any, hidden: Tensor) -> Any:
        finished.append(len(hidden))
        return finish(streamed, text, hidden)

    monkeypatch.setattr(StreamedModel, "run", counted)
    monkeypatch.setattr(StreamedModel, "finish", counted_head)
    output, stops = tmp_path / "artifact", 0
    while True:
        ran.clear()

        def stop_after_a_layer(step: str, done: int, total: int) -> None:
            if ran:
                raise Stopped

        try:
            found = load_or_calibrate(source, problem, output, stop_after_a_layer)
            break
        except Stopped:
            stops += 1
            assert len(ran) == len(range(3)), "one layer for each of three texts, and none that was done before"
            assert not list(tmp_path.glob("*.calibration.safetensors"))
            gradients = [path.name for path in tmp_path.glob(".*/*-gradients.safetensors")]
            assert len(gradients) <= 1, "those of the layers behind are not kept"
    assert stops == 2 + 2 * 2, "forward, and backward for each of two measures"
    assert len(finished) == 3, "the head of each text, once for both measures and all stops"
    assert_close(found, expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_layer_is_read_once_for_all_texts_that_a_single_plan_is_tried_on(
    tmp_path: Path, little_memory: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, problem = request_of(tmp_path, "llama", {}, recipe="uniform", budget="90%")
    calibration = calibrate(source, problem, silent)
    (whole,) = best_plans(source, [problem], calibration, silent)
    little_memory()
    read: list[int] = []
    reading = StreamedModel.reading
    monkeypatch.setattr(StreamedModel, "reading", lambda own, number: read.append(number) or reading(own, number))
    (found,) = best_plans(source, [problem], calibration, silent)
    assert read == [0, 1, 2]
    assert found.loss == pytest.approx(whole.loss, rel=1e-4)


def test_a_model_is_gone_when_the_next_one_is_opened(tmp_path: Path, little_memory: Callable[[], None]) -> None:
    source, problem = request_of(tmp_path, "llama", {})
    little_memory()
    calibrate(source, problem, silent)
    first = weakref.ref(module.opened(source, problem))
    second = module.opened(source, problem)
    assert isinstance(second, StreamedModel)
    assert first() is None
    assert [one for one in gc.get_objects() if isinstance(one, StreamedModel)] == [second]


def test_a_damaged_note_is_named(tmp_path: Path, little_memory: Callable[[], None]) -> None:
    source, problem = request_of(tmp_path, "llama", {})
    little_memory()

    def stop_late(step: str, done: int, total: int) -> None:
        if done > 3:
            raise Stopped

    with pytest.raises(Stopped):
        load_or_calibrate(source, problem, tmp_path / "artifact", stop_late)
    (note,) = tmp_path.glob(".*/hidden-2.safetensors")
    note.write_bytes(note.read_bytes()[:100])
    with pytest.raises(CompileError, match=r"hidden-2\.safetensors is damaged .*; remove its folder"):
        load_or_calibrate(source, problem, tmp_path / "artifact", silent)


def test_a_recipe_that_compares_distant_layers_is_refused(tmp_path: Path, little_memory: Callable[[], None]) -> None:
    source, problem = request_of(tmp_path, "llama", {}, recipe="pm-kvq")
    little_memory()
    with pytest.raises(CompileError, match="'pm-kvq' compares layers that are far apart"):
        calibrate(source, problem, silent)


def test_tensors_that_transformers_converts_are_not_read_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = request_of(tmp_path, "llama", {})
    name = "model.layers.1.self_attn.k_proj.weight"
    load = Source._from_pretrained

    def converted(own: Source, dtype: torch.dtype, **others: Any) -> Any:
        model = load(own, dtype, **others)
        weight = model.get_parameter(name)
        weight.data = weight.data[torch.arange(len(weight)).roll(1)]
        return model

    monkeypatch.setattr(Source, "_from_pretrained", converted)
    with pytest.raises(CompileError, match=f"transformers converts {name}"):
        source.unread_model("eager")


PEAKS = """
import gc, json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pmkvq_compiler.calibrate import opened
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from tests.conftest import silent

def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def growth(model, free, dry_run=True):
    # the bytes by which a compile grows, before it writes weights and while it does
    opened.free_bytes = lambda device: free
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
    before, peaks, step = resident("VmRSS"), [0, 0], None
    folder = Path(sys.argv[1])
    options = dict(budget="90%", recipe="uniform", max_len=512, block=32, calib_samples=1, calib_len=64)
    options |= dict(calib=str(folder / "ids.jsonl"), dry_run=dry_run)

    def note(following, done, total):  # what has grown until now was done by the step before
        nonlocal step
        writes, step = step in ("emit", "weights"), following
        peaks[writes] = max(peaks[writes], resident("VmHWM") - before)
        Path("/proc/self/clear_refs").write_text("5")

    compile_model(CompileOptions(str(folder / model), folder / "out", **options), note)
    return max(peaks[0], resident("VmHWM") - before), peaks[1]

growth("small", 1 << 40)  # imports what a compile needs
found = {"streamed": growth("large", 0), "loaded": growth("large", 1 << 40)}
if Path(sys.argv[1], "wide").exists():
    found["wide"] = growth("wide", 0, dry_run=False)
print(json.dumps(found))
"""


def test_a_streamed_model_takes_the_memory_of_some_layers(tmp_path: Path) -> None:
    """8 layers of 28 MB. `make fuzz` also takes a model with an embedding and a head of 134 MB each, which stay in
    memory until weights are written."""
    shape = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    folder = tiny_folder(tmp_path / "large", "llama", **shape)
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    tiny_folder(tmp_path / "small", "llama")
    vocab_size, hidden_size = 1 << 17, 256
    if os.environ.get(LONG):
        tiny_folder(tmp_path / "wide", "llama", vocab_size=vocab_size, hidden_size=hidden_size)
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": torch.randint(3, 128, (64,)).tolist()}) + "\n")
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print({name: [f"{peak / 1e6:.0f} MB" for peak in peaks] for name, peaks in found.items()}, whole)
    assert found["loaded"][0] > 0.8 * whole
    assert found["streamed"][0] < 0.4 * whole
    if "wide" in found:
        head = vocab_size * hidden_size * torch.float32.itemsize
        assert found["wide"][0] < 3.5 * head, "the embedding, the head, and logits of the text at a few steps"
        assert found["wide"][1] < 1.5 * head, "a tensor at a time"


@pytest.mark.parametrize(
    ("needed", "free", "where"),
    [
        (10, [10], "one device"),
        (11, [10], "layer by layer"),
        (10, [12, 80], "one device"),
        (20, [12, 12, 12], "all GPUs"),
        (35, [12, 12, 12], "layer by layer"),
    ],
)
def test_a_model_is_on_one_device_or_on_all_or_read_layer_by_layer(needed: int, free: list[int], where: str) -> None:
    assert module.placement(needed, free) == where


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize(("model_type", "overrides"), KINDS)
def test_a_model_on_two_gpus_has_the_calibration_and_the_plan_of_one(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, problem = request_of(tmp_path, model_type, {"num_hidden_layers": 6, **overrides}, device="cuda")
    one = calibrate(source, problem, silent)
    (plan,) = best_plans(source, [problem], one, silent)
    monkeypatch.setattr(module, "placement", lambda needed, free: "all GPUs")
    spread = module.opened(source, problem)
    assert isinstance(spread, PreTrainedModel)
    assert len({parameter.device for parameter in spread.parameters()}) > 1
    assert_close(calibrate(source, problem, silent), one)
    (found,) = best_plans(source, [problem], one, silent)
    assert found.solution == plan.solution


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_compiled_on_two_gpus(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model", "llama", num_hidden_layers=6)
    calib = token_lines(tmp_path / "calib.jsonl", lines=2, count=170)
    options: dict[str, Any] = {"budget": "60%", "block": 32, "max_len": 400, "calib_len": 100, "device": "cuda"}
    options |= {"calib": str(calib), "dtype": dtype}
    one = compile_model(CompileOptions(str(folder), tmp_path / "one" / "artifact", **options), silent)
    monkeypatch.setattr(module, "placement", lambda needed, free: "all GPUs")
    two = compile_model(CompileOptions(str(folder), tmp_path / "two" / "artifact", **options), silent)
    assert two.plan == one.plan
    assert two.report.check is not None


@pytest.mark.gpu
def test_a_streamed_model_on_a_gpu_has_the_calibration_of_the_whole_one(
    tmp_path: Path, little_memory: Callable[[], None]
) -> None:
    source, problem = request_of(tmp_path, "qwen2", {}, device="cuda")
    whole = calibrate(source, problem, silent)
    little_memory()
    assert_close(calibrate(source, problem, silent), whole)
