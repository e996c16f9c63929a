"""Break off what uses a cache, in any place, and see what is left: all of it, nothing of it, or a cache that refuses.

A trial fills a cache, notes what a call, a generation or a change of the cache does to a copy, breaks the same off at a
random operator or a random line of the runtime, and asks the cache for logits. In Triton's interpreter, as

    TRITON_INTERPRET=1 python -m tests.fuzz.interrupts TRIALS SEED

the kernels attend, and a decoder replays steps.
"""

from __future__ import annotations

import copy
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime import cache as cache_module
from pmkvq_compiler.runtime.attention import cached_attention
from pmkvq_compiler.runtime.backend import Attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.fused import Ops
from pmkvq_compiler.runtime.graph import GraphDecoder
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.model import CompiledModel
from pmkvq_compiler.runtime.plan import CachePlan
from pmkvq_compiler.runtime.reference import REFERENCE

from ..runtime.plans import cache_plan, layer_plan

CPU = torch.device("cpu")
VOCABULARY = 50
SHAPE = {"num_key_value_heads": 2, "key_head_dim": 32, "value_head_dim": 32, "block": 32}
RUNTIME = str(Path(cache_module.__file__).parent)
ERRORS: list[type[BaseException]] = [KeyboardInterrupt, MemoryError, RuntimeError, torch.OutOfMemoryError, SystemExit]
PROBE = 2
"""Tokens by whose logits caches are compared."""

PLANS: list[list[dict[str, Any]]] = [
    [
        {"key_axis": "channel", "key_bits": 2, "window": 32},
        {"sliding_window": 90, "sink": 0, "window": 64},
        {"key_bits": 8, "window": 64},
    ],
    [{"window": 32}, {"window": 50, "key_axis": "channel"}],
    [{"stages": (), "key_bits": 32, "value_bits": 32, "sink": 0, "window": 330}, {"window": 32, "stages": ((4, 2),)}],
    [{"stages": (), "key_bits": 32, "value_bits": 32, "sink": 0, "window": 330}],
]


class Broken(TorchDispatchMode):
    """Raises `error` at an operator, before it or after it is done; counts operators."""

    def __init__(self, at: int = 0, error: type[BaseException] = KeyboardInterrupt, after: bool = False) -> None:
        super().__init__()
        self.at, self.error, self.after, self.count = at, error, after, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        here = self.count == self.at
        if here and not self.after:
            raise self.error("broken off")
        result = func(*args, **(kwargs or {}))
        if here:
            raise self.error("broken off")
        return result


class Traced(AbstractContextManager["Traced"]):
    """Raises `KeyboardInterrupt` at a line, a call or a return of the runtime's code; counts them."""

    def __init__(self, at: int = 0, **ignored: Any) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> Traced:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(RUNTIME) or code.co_name == "<genexpr>":  # one that is let go raises nothing
            return None
        if event == "exception":
            return self.trace
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt("broken off")
        return self.trace


def tiny_model(plan: CachePlan, max_len: int, attention: Sequence[Attention] | None = None) -> CompiledModel:
    """A language model of attentions with random projections, as many as the plan has layers."""
    generator = torch.Generator().manual_seed(0)
    heads, dim = plan.layers[0].num_key_value_heads, plan.layers[0].key_head_dim
    size = heads * dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / size**0.5

    weights = {"embedding": draw(VOCABULARY, size) * 4, "positions": draw(max_len, size)}
    weights |= {f"{index}.{name}": draw(size, size) for index in range(len(plan.layers)) for name in "qkvo"}

    def hidden_states(ids: Tensor, positions: Tensor, cache: Cache, ops: Ops) -> Tensor:
        x = weights["embedding"][ids] + weights["positions"][positions]
        for index in range(len(plan.layers)):
            q, k, v = ((x @ weights[f"{index}.{n}"]).unflatten(-1, (heads, dim)).transpose(1, 2) for n in "qkv")
            out = cached_attention(q, k, v, cache, index, dim**-0.5)
            x = x + out.transpose(1, 2).flatten(2) @ weights[f"{index}.o"]
        return x

    def logits(hidden: Tensor) -> Tensor:
        return hidden @ weights["embedding"].T

    return CompiledModel(
        plan=plan,
        weights=weights,
        hidden_states=hidden_states,
        logits=logits,
        vocab_size=VOCABULARY,
        eos_token_ids=frozenset(),
        pad_token_id=0,
        dtype=torch.float32,
        device=CPU,
        attention=[REFERENCE] * len(plan.layers) if attention is None else attention,
    )


@dataclass(frozen=True)
class Work:
    """What is broken off: `run`, which leaves what its `parts` leave, one after another. Two caches that are alike are
    alike afterwards."""

    name: str
    run: Callable[[Cache], object]
    parts: list[Callable[[Cache], object]]


@dataclass
class Trials:
    """Breaks off what uses caches of the models, and counts what came of it."""

    models: list[CompiledModel]
    rng: random.Random
    longest: int
    """Tokens that a cache is filled with at most."""
    outcomes: Counter[str] = field(default_factory=Counter)

    def run(self, count: int) -> None:
        for _ in range(count):
            self.trial(self.rng.choice(self.models))

    def trial(self, model: CompiledModel) -> None:
        rng, before = self.rng, self.filled(model)
        work = self.work(model, before)
        for breaking in rng.sample([Broken, Traced], 2):  # some work has no operators
            cache = copy.deepcopy(before)
            with breaking() as counted:
                work.run(cache)
            if counted.count:
                break
        at = rng.randint(1, counted.count)
        options: dict[str, Any] = {"error": rng.choice(ERRORS), "after": rng.random() < 0.5}
        what = (
            f"{work.name} on {before.length} tokens, broken off at {at} of {counted.count} by {breaking(at)} {options}"
        )
        kept = [before]
        for part in work.parts:
            kept.append(copy.deepcopy(kept[-1]))
            part(kept[-1])
        overwrites = work.name == "steps" or any(
            (one.flushed, one.stage) != (other.flushed, other.stage) or work.name == "reorder"
            for one, other in zip(before.layers, kept[-1].layers, strict=True)
        )
        if len(work.parts) == 1 and breaking is Broken:
            kept = [before]  # the call is made after its last operator
        cache = copy.deepcopy(before)
        with pytest.raises(BaseException, match="broken off"), breaking(at, **options):
            work.run(cache)
        self.judge(model, cache, kept, overwrites, what)

    def judge(self, model: CompiledModel, cache: Cache, kept: list[Cache], may_refuse: bool, what: str) -> None:
        """The cache is one of `kept`, or refuses whatever is done with it until it is reset."""
        token = torch.zeros(cache.batch_size, 1, dtype=torch.long)
        uses: list[Callable[[], object]] = [
            lambda: model(token, cache),
            lambda: model.generate(token, 1, cache=cache),
            lambda: cache.reorder(range(cache.batch_size)),
            lambda: cache.select([0]),
            lambda: cache.crop(0),
            lambda: pickle.dumps(cache),
            lambda: copy.deepcopy(cache),
        ]
        if refuses(uses[-1]):
            assert may_refuse, f"nothing was lost, and yet it refuses: {what}"
            assert all(refuses(use) for use in uses), what
            cache.reset()
            kept = [model.new_cache(cache.batch_size, cache.max_len)]
            self.outcomes["refused"] += 1
        else:
            self.outcomes["kept"] += 1
        assert any(alike(model, cache, one) for one in kept), what

    def filled(self, model: CompiledModel) -> Cache:
        """A cache after some calls: near to where blocks leave a window or a layer is lowered, or anywhere."""
        rng = self.rng
        cache = model.new_cache(rng.randint(1, 2))
        most = min(self.longest, cache.max_len) - PROBE - 8
        for _ in range(rng.randint(0, 3)):
            feed(model, cache, rng.randint(0, most - max(cache.length)), rng)
        edges = [limit for layer in cache.layers if (limit := layer.longest_at_stage) is not None]
        edges += [layer.plan.sink + layer.plan.window + layer.plan.block * rng.randint(0, 1) for layer in cache.layers]
        if rng.random() < 0.7:
            feed(model, cache, min(most, rng.choice(edges) - rng.randint(0, 2)) - max(cache.length), rng)
        return cache

    def work(self, model: CompiledModel, cache: Cache) -> Work:
        rng, batch = self.rng, cache.batch_size
        room = min(self.longest, cache.max_len) - max(cache.length) - PROBE
        ids, mask = prompt(batch, rng.choice([1, 1, 1, 2, rng.randint(1, min(90, room - 3))]), rng)
        order = [rng.randrange(batch) for _ in range(batch)]
        count = min(2, *(layer.croppable(row) for layer in cache.layers for row in range(batch)))

        def one(name: str, run: Callable[[Cache], object]) -> Work:
            return Work(name, run, [run])

        match rng.choice(["call"] * 5 + ["generate"] * 2 + ["steps"] * 2 + ["reorder", "crop", "reset", "copies"]):
            case "reorder":
                return one("reorder", lambda cache: cache.reorder(order))
            case "crop":
                return one("crop", lambda cache: cache.crop(count))
            case "reset":
                return one("reset", lambda cache: cache.reset())
            case "copies":
                return one("copies", lambda cache: (cache.select(order), copy.deepcopy(cache), pickle.dumps(cache)))
            case "generate":
                return generation(model, cache, ids, mask, 3)
            case "steps" if cache.replayable:
                return steps(model, [torch.full((batch,), rng.randrange(VOCABULARY)) for _ in range(2)])
        return one("call", lambda cache: model(ids, cache, attention_mask=mask))


def generation(model: CompiledModel, cache: Cache, ids: Tensor, mask: Tensor, count: int) -> Work:
    """Of which a call with the prompt and one with each new token are the parts."""

    def generate(cache: Cache) -> Tensor:
        looks: Callable[[Tensor], object] = lambda tokens: cache.bytes_used  # noqa: E731
        return model.generate(ids, count, cache=cache, attention_mask=mask, eos_token_id=(), streamer=looks)

    text = generate(copy.deepcopy(cache))[:, ids.shape[1] :]
    parts: list[Callable[[Cache], object]] = [lambda cache: model(ids, cache, attention_mask=mask)]
    return Work("generate", generate, [*parts, *(partial(model, text[:, at : at + 1]) for at in range(count - 1))])


def steps(model: CompiledModel, tokens: list[Tensor]) -> Work:
    """A decoder's, of which the same by calls of the model are the parts."""

    def replay(cache: Cache) -> None:
        decoder = GraphDecoder(model, cache, capture=lambda step: step)
        for column in tokens:
            decoder(column, torch.ones(len(column), dtype=torch.bool))
        assert cache.length

    return Work("steps", replay, [partial(model, column.unsqueeze(-1)) for column in tokens])


def feed(model: CompiledModel, cache: Cache, width: int, rng: random.Random) -> None:
    if width > 0:
        ids, mask = prompt(cache.batch_size, width, rng)
        model(ids, cache, attention_mask=mask)


def prompt(batch: int, width: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Random tokens; all rows but the first may have padding at one end, though not to the last token."""
    ids = torch.tensor([[rng.randrange(VOCABULARY) for _ in range(width)] for _ in range(batch)])
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        padding = rng.choice([0, 0, rng.randrange(width)])
        mask[row, :padding] = 0
        mask[row] = rng.choice([mask[row], mask[row].flip(0)])
    return ids, mask


def refuses(use: Callable[[], object]) -> bool:
    try:
        use()
    except runtime.InputError as error:
        return "was interrupted in the middle of a call" in str(error)
    return False


def alike(model: CompiledModel, cache: Cache, other: Cache) -> bool:
    """The same counts, and the same logits of the next tokens, to the last bit."""
    one, other = copy.deepcopy(cache), copy.deepcopy(other)
    counts = [(each.length, [layer.counts for layer in each.layers], each.bytes_used) for each in (one, other)]
    if counts[0] != counts[1]:
        return False
    ids = torch.arange(PROBE).expand(one.batch_size, -1)
    return torch.equal(model(ids, one), model(ids, other))


def plans(max_len: int, kinds: list[list[dict[str, Any]]], batch_size: int = 2) -> list[CachePlan]:
    return [
        cache_plan(
            *(layer_plan(max_len, batch_size, **{**changes, **SHAPE}) for changes in kind),
            max_len=max_len,
            batch_size=batch_size,
        )
        for kind in kinds
    ]


def interpreted(trials: int, seed: int) -> Counter[str]:
    """Trials of the generated kernels, which only run where Triton was imported with TRITON_INTERPRET=1."""
    from ..kernel_checks import CONSERVATIVE, Case, render_module, repair_interpreter

    repair_interpreter()
    case = Case(head_dim=16, group=1, heads=1, dtype=torch.float32, max_len=230, steps=((slice(0, 1),),))
    kernels = [LayerKernels(render_module(case), CONSERVATIVE)] * 2
    plan = cache_plan(*[case.plan()] * 2, max_len=case.max_len)
    done = Trials([tiny_model(plan, case.max_len, kernels)], random.Random(seed), longest=case.max_len)
    done.run(trials)
    return done.outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(dict(interpreted(int(sys.argv[1]), int(sys.argv[2]))))
