"""What is made of a cache by copying, pickling, saving or sending it goes on as the cache would, in its own memory."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler  # into which torch puts its own

import pytest
import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.model import CompiledModel

from ..fuzz.interrupts import PLANS, alike, plans, tiny_model

MAX_LEN = 330


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return tiny_model(plans(MAX_LEN, PLANS[:1])[0], MAX_LEN)


@pytest.fixture
def cache(model: CompiledModel) -> Cache:
    cache = model.new_cache(2)
    model(tokens(150), cache, attention_mask=torch.tensor([[1] * 150, [0] * 30 + [1] * 120]))
    return cache


def tokens(width: int, seed: int = 0) -> Tensor:
    return torch.randint(50, (2, width), generator=torch.Generator().manual_seed(seed))


def saved(cache: Cache) -> Cache:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False, map_location="cpu")


def sent(cache: Cache) -> Cache:
    """By the pickler of processes, which sends tensors as shared memory."""
    return pickle.loads(ForkingPickler.dumps(cache))


COPIES: dict[str, Callable[[Cache], Cache]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "in a structure": lambda cache: copy.deepcopy({"one": [cache], "same": cache})["one"][0],
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "pickle, protocol 2": lambda cache: pickle.loads(pickle.dumps(cache, protocol=2)),
    "torch.save": saved,
    "sent to a process": sent,
    "select": lambda cache: cache.select([0, 1]),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_as_the_cache_would(model: CompiledModel, cache: Cache, how: str) -> None:
    """Through a new order, a crop, flushes and lowerings; what is done to one is not done to the other."""
    twin = COPIES[how](cache)
    assert owned_bytes(twin) == owned_bytes(cache) == cache.bytes_reserved
    assert alike(model, twin, cache)
    untouched = copy.deepcopy(cache)
    for one in (twin, cache):
        model(tokens(60, seed=1), one)
        one.reorder([1, 1])
        one.crop(2)
        model.generate(tokens(3, seed=2), 70, cache=one, eos_token_id=())
    assert alike(model, twin, cache)
    assert twin.bits != untouched.bits, "the run was to lower a layer"
    assert cache.length == [250, 250]
    again = COPIES[how](untouched)
    model(tokens(60, seed=1), again)
    assert untouched.length == [150, 120]


def owned_bytes(cache: Cache) -> int:
    """Of all distinct storages that the cache's layers reach."""
    tensors = [value for store in cache.layers for value in vars(store).values() if isinstance(value, Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_a_pickle_takes_the_bytes_of_the_arenas(cache: Cache) -> None:
    assert len(pickle.dumps(cache)) < 1.05 * cache.bytes_reserved + 8192


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_layer_alone_is_copied_whole_too(cache: Cache, protocol: int) -> None:
    layer = cache.layers[0]
    for twin in (pickle.loads(pickle.dumps(layer, protocol)), copy.deepcopy(layer), copy.copy(layer)):
        assert torch.equal(twin.arena, layer.arena)
        assert twin.rows == layer.rows
        twin.arena.zero_()
        assert not bool(twin.keys.any() or twin.pool.any() or twin.words.any()), "views of one arena"
        assert bool(layer.keys.any())


def test_a_device_that_is_not_there_is_told_in_a_sentence(cache: Cache) -> None:
    assert cache.to("cpu") is cache.cpu() is cache.to(torch.device("cpu")) is cache
    for device in ("cuda:99", "nowhere", torch.float16, 1.5, None if torch.cuda.is_available() else "cuda"):
        if device is not None:
            with pytest.raises(runtime.InputError, match=r"a cache cannot be moved to .*; name a device"):
                cache.to(device)  # type: ignore[arg-type]
    with pytest.raises(runtime.InputError, match="cannot be shared between processes; send it to one process"):
        cache.share_memory_()


def test_a_cache_dies_when_nobody_refers_to_it(model: CompiledModel) -> None:
    cache = model.new_cache()
    model(tokens(5)[:1], cache)
    gone = weakref.ref(cache)
    del cache
    assert gone() is None, "no cycle keeps its memory"


def _send_logits(model: CompiledModel, cache: Cache, pipe: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    pipe.send(model(tokens(60, seed=1), cache)[:, -1].tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_goes_on_with_a_copy(model: CompiledModel, cache: Cache) -> None:
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=_send_logits, args=(model, cache, theirs))
    process.start()
    assert ours.poll(60)
    forked = ours.recv()
    process.join(60)
    assert cache.length == [150, 120]
    assert forked == model(tokens(60, seed=1), cache)[:, -1].tolist()


def test_a_model_is_copied_with_weights_of_its_own(model: CompiledModel) -> None:
    expected = model(tokens(20))
    twin, shallow = copy.deepcopy(model), copy.copy(model)
    assert torch.equal(twin(tokens(20)), expected)
    assert torch.equal(shallow(tokens(20)), expected)
    assert all(twin.weights[name].data_ptr() != value.data_ptr() for name, value in model.weights.items())
    assert len({model, twin, shallow}) == 3
    assert model != twin


def test_a_model_is_not_pickled_and_says_what_to_do(model: CompiledModel) -> None:
    for refused in (
        lambda: pickle.dumps(model),
        lambda: torch.save(model, io.BytesIO()),
        lambda: pickle.dumps([model]),
    ):
        with pytest.raises(
            runtime.InputError, match=r"a loaded model cannot be pickled or saved, .* artifact's folder"
        ):
            refused()


def test_a_broken_cache_is_not_copied(model: CompiledModel, cache: Cache) -> None:
    cache.begin_change()
    cache.layers[0].lower()
    for name in ("copy", "deepcopy", "pickle", "torch.save", "select"):
        with pytest.raises(runtime.InputError, match=r"was interrupted in the middle of a call .*; reset\(\) it"):
            COPIES[name](cache)
    cache.reset()
    assert alike(model, cache, model.new_cache(2))
