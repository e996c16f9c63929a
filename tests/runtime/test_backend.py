"""A backend of one's own is asked for attention and for lower widths, and for nothing else."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.backend import Attention, NewTokens, lower_until_fit
from pmkvq_compiler.runtime.graph import Capture, GraphDecoder, NotCapturable, Step
from pmkvq_compiler.runtime.layer_cache import LayerCache
from pmkvq_compiler.runtime.reference import REFERENCE

from ..conftest import CompileTiny
from .test_generate import ragged_batch, source_of


@dataclass
class Exact:
    """Attends over keys and values that it keeps as they came, in lists of its own; the layer only counts them."""

    name: str = "exact"
    replayable: bool = False
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attended: list[list[int]] = field(default_factory=list)
    """New tokens of each sequence, for every time that it was asked to attend."""
    lowered: int = 0

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        store: LayerCache,
        new: NewTokens,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        assert softcap is sinks is None
        assert (new.state is not None) == self.replayable
        lower_until_fit(self, store, new.state, new.counts)
        places = [(store.length(row), own.start, own.stop) for row, own in enumerate(new.columns)]
        if new.state is not None:  # of a replayed step the host knows nothing
            starts, firsts, counts, _ = new.state.tolist()
            places = [(start, first, first + n) for start, first, n in zip(starts, firsts, counts, strict=True)]
        self.attended.append([stop - first for _, first, stop in places])
        out = q.new_zeros(*q.shape[:3], v.shape[-1])
        for row, (start, first, stop) in enumerate(places):
            held = self.kept.get(row, (k[row, :, :0], v[row, :, :0]))
            pairs = zip(held, (k, v), strict=True)
            keys, values = (torch.cat([old[:, :start], one[row, :, first:stop]], dim=1) for old, one in pairs)
            self.kept[row] = keys, values
            group = q.shape[1] // k.shape[1]
            scores = q[row, :, first:stop] @ keys.repeat_interleave(group, 0).transpose(1, 2) * scale
            hidden = torch.ones(stop - first, keys.shape[1], dtype=torch.bool).triu(start + 1)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[row, :, first:stop] = weights @ values.repeat_interleave(group, 0)
        store.grow(new.counts)
        return out

    def lower(self, store: LayerCache, state: Tensor | None) -> None:
        with store.lowering() as (before, after):
            assert before != after
            self.lowered += 1


@pytest.fixture(scope="module")
def artifact(compile_tiny: CompileTiny) -> Path:
    """Two layers, two sequences; both layers are lowered on the way to 400 tokens."""
    return compile_tiny("llama", budget="70%", batch_size=2)


def attended_by(artifact: Path, attention: list[Attention]) -> runtime.CompiledModel:
    return dataclasses.replace(runtime.load(artifact), attention=attention)


def backends(artifact: Path, **options: bool) -> list[Exact]:
    return [Exact(**options) for _ in runtime.load(artifact).plan.layers]  # type: ignore[arg-type]


def test_a_model_generates_with_a_backend_as_that_backend_attends(artifact: Path) -> None:
    """It keeps what the cache quantizes: the text is the one of transformers, not the one of the reference path."""
    exact = backends(artifact)
    model, count = attended_by(artifact, [*exact]), 300
    torch.manual_seed(1)
    ids, mask = ragged_batch((60, 20))
    expected = source_of(artifact).generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    cache, twin = model.new_cache(2), runtime.load(artifact).new_cache(2)
    text = model.generate(ids, count, attention_mask=mask, cache=cache, eos_token_id=())
    assert torch.equal(text[:, 60:], expected[:, 60:])
    quantized = runtime.load(artifact).generate(ids, count, attention_mask=mask, cache=twin, eos_token_id=())
    assert not torch.equal(text, quantized), "the comparison was to tell the two apart"
    assert model.kernels_from == "exact"
    for one, store, reference in zip(exact, cache.layers, twin.layers, strict=True):
        assert one.attended == [[60, 20], *[[1, 1]] * (count - 1)], "asked once for every call of the model"
        assert one.lowered == store.stage == len(store.plan.stages) - 1 > 0
        assert store.counts == reference.counts
    assert cache.length == [359, 319]
    assert cache.state is None, "nobody reads lengths on the device"


def test_each_layer_may_have_another_backend(artifact: Path) -> None:
    last = Exact()
    model = attended_by(artifact, [*[REFERENCE] * (len(runtime.load(artifact).plan.layers) - 1), last])
    ids = torch.randint(3, 128, (1, 40))
    assert (model(ids) - runtime.load(artifact)(ids)).norm() <= 1e-5 * model(ids).norm(), "nothing was quantized yet"
    assert last.attended == [[40], [40]]
    assert model.kernels_from == "reference, exact"


def test_a_replayable_backend_counts_on_the_device_what_calls_count(artifact: Path) -> None:
    """The step is not captured but run again each time."""
    called, replayed = (attended_by(artifact, [*backends(artifact, replayable=True)]) for _ in range(2))
    assert_decoded_as_called(called, replayed, lambda step: step)


def assert_decoded_as_called(called: runtime.CompiledModel, decoded: runtime.CompiledModel, capture: Capture) -> None:
    """Steps of a decoder against calls, with a layer lowered and a sequence that ends in between."""
    caches = [model.new_cache(2) for model in (called, decoded)]
    ids = torch.randint(3, 128, (2, 90))
    for model, cache in zip((called, decoded), caches, strict=True):
        assert cache.replayable
        model(ids, cache)
    decoder = GraphDecoder(decoded, caches[1], capture)
    before = caches[0].bits
    for step in range(120):
        tokens, running = torch.randint(3, 128, (2,)), torch.tensor([True, step < 80])
        expected = called(tokens.unsqueeze(-1), caches[0], attention_mask=running.unsqueeze(-1))[:, -1]
        assert torch.equal(decoder(tokens, running)[running], expected[running])
    assert caches[1].length == caches[0].length == [210, 170]
    assert [store.counts for store in caches[1].layers] == [store.counts for store in caches[0].layers]
    assert caches[1].bits == caches[0].bits != before, "a layer was to be lowered in between"


@pytest.mark.parametrize("held", [0, 1], ids=["never", "until a layer is lowered"])
def test_where_no_graph_holds_a_step_each_is_a_call(artifact: Path, held: int) -> None:
    """From the start, or from a later step on. A model is not tried twice, and one warning gives the reason."""
    called, decoded = (attended_by(artifact, [*backends(artifact, replayable=True)]) for _ in range(2))
    tried: list[Step] = []

    def capture(step: Step) -> Step:
        tried.append(step)
        step()
        if len(tried) > held:
            raise NotCapturable("somebody looks at the clock")
        return step

    with pytest.warns(RuntimeWarning) as caught:
        assert_decoded_as_called(called, decoded, capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_decoded_as_called(called, decoded, capture)
    assert len(tried) == held + 1
    (warning,) = caught
    reason = r"no CUDA graph can hold [^\n]* \(somebody looks at the clock\), [^\n]* several times slower; [^\n]*"
    assert re.fullmatch(reason, str(warning.message))


MOVES: dict[str, Callable[[runtime.Cache], runtime.Cache]] = {
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "deepcopy": copy.deepcopy,
    "select": lambda cache: cache.select([0, 1]),
    "the same": lambda cache: cache,
}


@pytest.mark.parametrize("how", MOVES)
def test_the_model_that_uses_a_cache_says_what_attends(artifact: Path, how: str) -> None:
    """Wherever the cache comes from, and whatever attended over it before."""
    torch.manual_seed(2)
    reference = runtime.load(artifact)
    model = attended_by(artifact, [*backends(artifact, replayable=True)])
    ids, cache = torch.randint(3, 128, (2, 150)), reference.new_cache(2)
    reference(ids, cache)
    expected = reference(ids[:, :1], copy.deepcopy(cache))
    taken = MOVES[how](cache)
    model(ids[:, :1], taken)
    assert taken.attention is model.attention
    assert taken.state is not None
    taken.graph = object()
    taken.crop(1)
    assert torch.equal(reference(ids[:, :1], taken), expected)
    assert taken.attention is reference.attention
    assert taken.state is taken.graph is None, "what served another backend is gone"


def test_what_attends_does_not_change_in_the_middle_of_a_generation(artifact: Path) -> None:
    reference, other = runtime.load(artifact), attended_by(artifact, [*backends(artifact)])
    cache, refused = reference.new_cache(1), []

    def streamer(tokens: Tensor) -> None:
        with pytest.raises(runtime.InputError, match="in use by the generation that calls the streamer"):
            other(tokens.unsqueeze(-1), cache)
        refused.append(cache.attention is reference.attention)

    reference.generate(torch.ones(1, 5, dtype=torch.long), 3, cache=cache, eos_token_id=(), streamer=streamer)
    assert refused == [True] * 3


def test_a_lowering_that_breaks_off_leaves_a_cache_that_refuses(artifact: Path) -> None:
    class Failing(Exact):
        def lower(self, store: LayerCache, state: Tensor | None) -> None:
            with store.lowering():
                raise RuntimeError("no more of this")

    model = attended_by(artifact, [Failing() for _ in runtime.load(artifact).plan.layers])
    cache = model.new_cache(2)
    with pytest.raises(RuntimeError, match="no more of this"):
        model.generate(torch.ones(2, 60, dtype=torch.long), 300, cache=cache, eos_token_id=())
    assert all(store.stage == 0 for store in cache.layers)
    with pytest.raises(runtime.InputError, match=r"was interrupted in the middle of a call .*; reset\(\) it"):
        model(torch.ones(2, 1, dtype=torch.long), cache)
