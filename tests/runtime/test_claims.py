"""One thread at a time uses a cache, and says so to others; a streamer looks and does not touch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.model import CompiledModel

from ..fuzz.interrupts import PLANS, plans, tiny_model

MAX_LEN = 330
BUSY = r"^this cache is in use by another thread; give each thread its own cache, or wait until .*$"


@pytest.fixture(scope="module")
def model() -> CompiledModel:
    return tiny_model(plans(MAX_LEN, PLANS[:1])[0], MAX_LEN)


def ids(width: int = 70, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(50, (batch, width), generator=torch.Generator().manual_seed(seed))


def in_a_thread(work: Callable[[], object]) -> BaseException | None:
    """What the work raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "nobody waits"
    return raised[0] if raised else None


USES: dict[str, Callable[[CompiledModel, Cache], object]] = {
    "call": lambda model, cache: model(ids(3), cache),
    "generate": lambda model, cache: model.generate(ids(3), 2, cache=cache),
    "reorder": lambda model, cache: cache.reorder([0]),
    "crop": lambda model, cache: cache.crop(1),
    "reset": lambda model, cache: cache.reset(),
    "select": lambda model, cache: cache.select([0]),
    "deepcopy": lambda model, cache: copy.deepcopy(cache),
    "length": lambda model, cache: cache.length,
    "bytes_used": lambda model, cache: cache.bytes_used,
    "to": lambda model, cache: cache.to("cpu"),
}
CHANGES = ("call", "generate", "reorder", "crop", "reset")


def test_another_thread_is_refused_while_a_cache_is_in_use(model: CompiledModel) -> None:
    cache, raised = model.new_cache(), {}

    def ask(tokens: Tensor) -> None:
        for name, use in USES.items():
            raised[name] = in_a_thread(lambda use=use: use(model, cache))  # type: ignore[misc]

    text = model.generate(ids(), 3, cache=cache, eos_token_id=(), streamer=ask)
    for name, error in raised.items():
        with pytest.raises(runtime.InputError, match=BUSY):
            raise error or AssertionError(f"{name} was not refused")
    assert torch.equal(text, model.generate(ids(), 3, eos_token_id=()))
    assert in_a_thread(lambda: model(ids(3), cache)) is None, "free again"


def test_of_threads_that_race_for_a_cache_each_has_it_alone(model: CompiledModel) -> None:
    """Whoever gets it finishes its text; the others are told; in the end it holds what some order of them leaves."""
    cache, prompt = model.new_cache(), ids(20)
    done: list[str] = []
    start = threading.Barrier(8)

    def race() -> None:
        start.wait()
        for _ in range(4):
            try:
                model.generate(prompt, 2, cache=cache, eos_token_id=())
                done.append("done")
            except runtime.InputError as error:
                done.append("refused" if "in use by another thread" in str(error) else str(error))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(done) == 32
    assert set(done) <= {"done", "refused"}
    alone = model.new_cache()
    for _ in range(done.count("done")):
        model.generate(prompt, 2, cache=alone, eos_token_id=())
    assert cache.length == alone.length
    assert torch.equal(model(prompt, cache), model(prompt, alone))


def test_eight_threads_with_caches_of_their_own_write_what_each_writes_alone(model: CompiledModel) -> None:
    def write(seed: int) -> list[Tensor]:
        sampled = {"do_sample": True, "seed": seed, "top_p": 0.9}
        cache = model.new_cache()
        return [
            model.generate(ids(60 + seed, seed=seed), 30, eos_token_id=(), cache=cache),
            model.generate(ids(4, seed=seed), 30, eos_token_id=(), cache=cache, **sampled),
        ]

    expected = [write(seed) for seed in range(8)]
    written: dict[int, list[Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: written.__setitem__(seed, write(seed)))  # type: ignore[misc]
        for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for seed in range(8):
        assert all(map(torch.equal, written[seed], expected[seed]))


@pytest.mark.parametrize("name", USES)
def test_a_streamer_looks_at_the_cache_and_does_not_change_it(model: CompiledModel, name: str) -> None:
    cache = model.new_cache()

    def streamer(tokens: Tensor) -> None:
        if name not in CHANGES:
            USES[name](model, cache)
            return
        with pytest.raises(runtime.InputError, match="a streamer may look at the cache or copy it, not change it"):
            USES[name](model, cache)

    text = model.generate(ids(), 4, eos_token_id=(), cache=cache, streamer=streamer)
    assert torch.equal(text, model.generate(ids(), 4, eos_token_id=()))
    USES[name](model, cache)


def test_a_streamer_that_raises_leaves_a_cache_that_goes_on(model: CompiledModel) -> None:
    """Its exception is kept, and with it every frame of the generation: the cache is free all the same."""
    cache, seen = model.new_cache(), []

    def enough(tokens: Tensor) -> None:
        seen.append(tokens)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        model.generate(ids(), 20, eos_token_id=(), cache=cache, streamer=enough)
    assert cache.length == [70 + 4], "the fifth token was chosen, not fed"
    rest = model.generate(seen[-1].unsqueeze(-1), 15, eos_token_id=(), cache=cache)
    whole = model.generate(ids(), 20, eos_token_id=())
    assert torch.equal(torch.cat([ids(), *(column.unsqueeze(-1) for column in seen), rest[:, 1:]], dim=1), whole)
    assert kept.tb is not None
    assert in_a_thread(lambda: model(ids(3), cache)) is None


def test_a_thread_that_died_in_a_call_holds_nothing(model: CompiledModel) -> None:
    cache = model.new_cache()
    whole = model(ids(), model.new_cache())

    def die(*args: object) -> Tensor:
        raise SystemExit

    dying = CompiledModel(**{**vars(model), "logits": die})
    assert isinstance(in_a_thread(lambda: dying(ids(20), cache)), SystemExit)
    assert torch.equal(model(ids(), cache), whole)


def test_a_call_within_a_call_is_refused(model: CompiledModel) -> None:
    cache = model.new_cache()
    expected = model(ids(), model.new_cache())

    def twice(hidden: Tensor) -> Tensor:
        assert cache.length == [0], "a call under way is not counted yet"
        for use in (lambda: model(ids(3), cache), cache.reset, lambda: cache.reorder([0]), lambda: cache.select([0])):
            with pytest.raises(runtime.InputError, match="this cache is in the middle of a call"):
                use()
        return model.logits(hidden)

    assert torch.equal(CompiledModel(**{**vars(model), "logits": twice})(ids(), cache), expected)
    assert cache.length == [70]
