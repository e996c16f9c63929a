"""A model works on its own device, whichever is torch's current one, and there as fast as anywhere: by its kernels, by
captured graphs and by the library."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime import prefill

from ..conftest import CompileTiny
from ..devices import two_gpus
from .test_graph import OPTIONS, SHAPE, by_calls, run_all, waiting

pytestmark = [
    pytest.mark.gpu,
    two_gpus,
    pytest.mark.filterwarnings("error::RuntimeWarning", "error:The CUDA Graph is empty"),
]


@pytest.fixture
def artifact(compile_tiny: CompileTiny) -> Path:
    return compile_tiny("gemma2", SHAPE, **OPTIONS)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """The graphs that were replayed, one for each time."""
    replay, replayed = torch.cuda.CUDAGraph.replay, list[torch.cuda.CUDAGraph]()

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", noted)
    return replayed


def prompts(batch: int = 2, length: int = 150) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))


def check_text(model: runtime.CompiledModel, device: str, replays: list[Any]) -> None:
    """The text that a model on `device` generates is that of its calls, and each step is a graph's replay."""
    replays.clear()
    cache = model.new_cache(2)
    text = model.generate(prompts(), 60, cache=cache, eos_token_id=())
    assert len(replays) == 59, "the prompt brings the first token"
    tensors = [*model.weights.values(), text, cache.state, *(layer.arena for layer in cache.layers)]
    assert {str(one.device) for one in tensors} == {device} == {str(model.device)}
    assert torch.equal(text, by_calls(model, prompts(), 60))


@pytest.mark.parametrize("current", [0, 1])
def test_a_model_decodes_by_graphs_of_its_device_whichever_is_the_current_one(
    artifact: Path, replays: list[Any], current: int
) -> None:
    with torch.cuda.device(current):
        for device in ("cuda:0", "cuda:1", "cuda:0"):
            check_text(runtime.load(artifact, device, torch.float32), device, replays)
        assert torch.cuda.current_device() == current


def test_a_model_stays_on_the_device_that_was_current_when_it_was_loaded(artifact: Path, replays: list[Any]) -> None:
    with torch.cuda.device(1):
        model = runtime.load(artifact, "cuda", torch.float32)
    check_text(model, "cuda:1", replays)
    check_text(copy.deepcopy(model), "cuda:1", replays)


def test_threads_decode_on_devices_of_their_own(artifact: Path) -> None:
    """A thread begins with the first device as its current one."""
    models = [runtime.load(artifact, device, torch.float32) for device in ("cuda:0", "cuda:1")] * 3
    expected, found = models[1].generate(prompts(), 60, eos_token_id=()).cpu(), []

    def write(model: runtime.CompiledModel) -> None:
        cache = model.new_cache(2)
        text = model.generate(prompts(), 60, cache=cache, eos_token_id=())
        found.append((text.cpu(), cache.graph))

    threads = [threading.Thread(target=write, args=(model,)) for model in models]
    run_all(threads)
    assert len(found) == len(models)
    assert all(torch.equal(text, expected) and graph is not None for text, graph in found)


def test_a_step_that_no_graph_can_hold_changes_nothing_on_any_device(artifact: Path, replays: list[Any]) -> None:
    models = {device: runtime.load(artifact, device, torch.float32) for device in ("cuda:0", "cuda:1")}
    model = models["cuda:1"]
    with pytest.warns(RuntimeWarning, match="no CUDA graph can hold this model's decode step"):
        text = waiting(model).generate(prompts(), 60, eos_token_id=())
    assert torch.equal(text, by_calls(model, prompts(), 60))
    assert torch.cuda.current_device() == 0
    assert all(torch.cuda.current_stream(index) == torch.cuda.default_stream(index) for index in (0, 1))
    for device, one in models.items():
        check_text(one, device, replays)


def test_a_cache_is_used_where_it_was_moved(artifact: Path) -> None:
    models = [runtime.load(artifact, device, torch.float32) for device in ("cuda:0", "cuda:1")]
    cache = models[0].new_cache(2)
    text = models[0].generate(prompts(), 20, cache=cache, eos_token_id=())
    moved = cache.to("cuda:1")
    texts = [
        model.generate(text[:, -1:], 40, cache=own, eos_token_id=())
        for model, own in zip(models, (cache, moved), strict=True)
    ]
    assert moved.graph is not None
    assert torch.equal(*(text.cpu() for text in texts))


def test_the_library_reads_a_long_prompt_on_the_models_device(
    compile_tiny: CompileTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"head_dim": 64, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    artifact = compile_tiny("llama", shape, recipe="none", dtype="bfloat16", max_len=2400)
    called, library = list[str](), prefill.library_attention

    def noted(q: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
        called.append(str(q.device))
        return library(q, *others, **options)

    monkeypatch.setattr(prefill, "library_attention", noted)
    logits = []
    for device in ("cuda:0", "cuda:1"):
        model = runtime.load(artifact, device)
        cache = model.new_cache(1)
        called.clear()
        logits.append([model(prompts(1, count), cache).double().cpu() for count in (1100, 1050, 1)])
        if model.attention[0].tuning.library_unit:  # type: ignore[attr-defined]
            assert {*called} == {device}
    for one, other in zip(*logits, strict=True):
        assert (one - other).norm() <= 1e-2 * one.norm()


def test_compiled_kernels_are_launched_on_the_models_device(compile_tiny: CompileTiny, replays: list[Any]) -> None:
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    shape = {"head_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    artifact = compile_tiny("llama", shape, bits=(8,), aot=(target,), **{**OPTIONS, "budget": "46KiB"})
    for device in ("cuda:0", "cuda:1"):
        model = runtime.load(artifact, device)
        assert model.kernels_from == target
        check_text(model, device, replays)
