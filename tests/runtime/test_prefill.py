"""Prefill: which part of a cache the library reads, in which pieces, and what it returns."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.library import library_attention

from .plans import cache_plan

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from pmkvq_compiler.emit import launches
from pmkvq_compiler.emit.launches import RecordedKernel, Recorder
from pmkvq_compiler.runtime import prefill
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.vllm.kernels import KernelPages
from pmkvq_compiler.runtime.vllm.layout import PagedLayer
from pmkvq_compiler.runtime.vllm.pages import Batch
from pmkvq_compiler.runtime.warm_up import NOWHERE

from ..kernel_checks import CONSERVATIVE, Case, render_module


@dataclasses.dataclass
class Noting(Recorder):
    """Notes launches in their order. None is made."""

    noted: list[Any] = dataclasses.field(default_factory=list)

    def __getattr__(self, name: str) -> object:
        found = super().__getattr__(name)
        if isinstance(found, RecordedKernel):
            self.noted.append(name)
        return found


def launched(
    case: Case,
    stored: list[int],
    columns: list[slice],
    pieces: list[int],
    module: Noting | None = None,
    appended: bool = False,
) -> Counter[str]:
    """Launches of a prefill of `columns` by sequences that have `stored` tokens, to which they may be `appended`. What
    the library attends to is added to `pieces`: the tokens of a piece, and below zero the new tokens with their
    padding."""
    plan = dataclasses.replace(case.plan(), arena_bytes=1 << 40)
    whole = cache_plan(plan, max_len=1 << 17, batch_size=len(stored))
    module = module or Noting(render_module(case))
    cache = Cache(whole, len(stored), 1 << 17, case.dtype, NOWHERE, [LayerKernels(module, case.tuning)])  # type: ignore[arg-type]
    cache.begin(columns)
    store = cache.layers[0]
    store.seek(stored)
    width = max(own.stop for own in columns)
    q = torch.empty(len(stored), case.heads * case.group, width, case.head_dim, dtype=case.dtype, device=NOWHERE)
    k, v = (q[:, : case.heads] for _ in range(2))
    real = prefill.library_attention

    def noted(q, k, v, scale, causal=False):
        assert k.shape[2] == v.shape[2]
        assert q.shape[1] == case.heads * case.group
        pieces.append(-k.shape[2] if causal else k.shape[2])
        return real(q, k, v, scale, causal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "library_attention", noted)
        if appended:
            cache.attention[0].attend(q, k, v, store, cache.new_tokens, 0.1, case.softcap, None)
        else:
            cache.attention[0].read(q, (k, v), store, cache.new_tokens, 0.1, case.softcap, None)
    return Counter(module.noted)


WHOLE = dataclasses.replace(CONSERVATIVE, library_unit=1024)


def test_the_library_reads_new_tokens_and_the_oldest_blocks_in_few_lengths() -> None:
    pieces: list[int] = []
    found = launched(Case(tuning=WHOLE), [40000], [slice(0, 4096)], pieces)
    assert pieces == [32768, -4096, 7168]
    assert found == {"halve": 1, "unpack": 2 + 1, "join": 1, "prefill": 1}
    pieces.clear()
    launched(Case(block=128, window=128, tuning=WHOLE), [8000], [slice(0, 1100)], pieces)
    assert pieces == [7680, -2048]


@pytest.mark.parametrize(
    ("stored", "expected"),
    [(0, []), (512, [512]), (4096, [4096]), (32768, [32768]), (36864, [32768, 4096]), (69632, [32768] * 2 + [4096])],
)
def test_the_library_reads_sink_and_window_of_a_history_of_whole_pieces(stored: int, expected: list[int]) -> None:
    """Prompts that are fed in chunks have such histories: nothing remains for the generated kernel but to finish."""
    pieces: list[int] = []
    for case in (Case(tuning=WHOLE), Case(block=128, window=200, tuning=WHOLE), Case(sink=0, window=256, tuning=WHOLE)):
        module = Noting(render_module(case))
        found = launched(case, [stored], [slice(0, 4096)], pieces, module)
        assert pieces == [*expected[:1], -4096, *expected[1:]]
        assert found == Counter(halve=1, unpack=len(expected), join=max(0, len(expected) - 1), prefill=1)
        assert ['"REST": false' in key for key, one in module.launches.items() if one.kernel == "prefill"] == [True]
        pieces.clear()
    launched(Case(tuning=WHOLE), [stored + 16], [slice(0, 4096)], pieces)
    assert sum(pieces[1:]) <= stored, "there are no lengths but multiples of 512"


def note_streams(found: list[Any], patch: pytest.MonkeyPatch) -> None:
    """Add to `found` what is done side by side."""

    def noted(device: torch.device, first: Callable[[], object], second: Callable[[], object]) -> tuple[object, object]:
        assert device == NOWHERE
        found.append("side")
        one = first()
        found.append("by side")
        other = second()
        found.append("both")
        return one, other

    patch.setattr(prefill, "side_by_side", noted)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (0, [-4096]),
        (4096, ["side", 4096, "by side", -4096, "both"]),
        (69632, ["side", 32768, "by side", -4096, "both", 32768, 4096]),
    ],
)
def test_new_tokens_are_read_beside_the_oldest_piece(
    stored: int, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs over history take long, so they are launched first. What the second stream allocated is kept until all
    that reads it has been launched."""
    found: list[Any] = []
    note_streams(found, monkeypatch)
    launched(Case(tuning=WHOLE), [stored], [slice(0, 4096)], found)
    assert found == [*expected, "side", "by side", "both"]


APPENDED = ["append", "append"]


@pytest.mark.parametrize(
    ("stored", "count", "expected"),
    [
        ([0], 4096, ["side", "prefill", "by side", *APPENDED, "both"]),
        ([4096], 4096, ["side", "prefill", "by side", *APPENDED, "both"]),
        ([0, 0], 4096, ["both", "halve", -4096, "side", "prefill", "by side", *APPENDED, "both"]),
        ([4112], 4096, ["unpack", "prefill", "by side", "both", *APPENDED]),
        ([4096], 100, ["unpack", "prefill", *APPENDED]),
    ],
)
def test_new_tokens_are_added_when_nothing_stored_is_read_any_more(
    stored: list[int], count: int, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are while parts are put together, where only that remains."""
    found: list[Any] = []
    note_streams(found, monkeypatch)
    module = Noting(render_module(Case()), noted=found)
    launched(Case(tuning=WHOLE), stored, [slice(0, count)] * len(stored), found, module, appended=True)
    assert found[-len(expected) :] == expected
    assert found.count("append") == 2


def test_pieces_fit_the_scratch() -> None:
    for scratch, expected in ((9 << 20, [4608, 4096]), (3 << 20, [1536] * 5 + [1024])):
        pieces: list[int] = []
        tuning = dataclasses.replace(WHOLE, prefill_scratch=scratch)
        launched(Case(heads=4, head_dim=128, tuning=tuning), [9100], [slice(0, 1024)], pieces)
        assert pieces == [expected[0], -1024, *expected[1:]]
        assert all(4 * tokens * 2 * 128 * 2 <= scratch for tokens in expected)


def test_every_sequence_has_its_own_history() -> None:
    pieces: list[int] = []
    columns = [slice(0, 1200), slice(88, 1200), slice(1200, 1200), slice(1100, 1200), slice(0, 1200)]
    found = launched(Case(tuning=WHOLE), [2000, 5000, 3000, 3000, 100], columns, pieces)
    assert pieces == [1536, -2048, 4608, -2048, -2048]
    assert found == {"halve": 3, "unpack": 2 + 4, "prefill": 4}


@pytest.mark.parametrize(
    "case",
    [
        Case(tuning=CONSERVATIVE),
        Case(softcap=5.0, tuning=WHOLE),
        Case(sliding_window=1000, window=128, tuning=WHOLE),
        Case(sliding_window=1000, window=128, sink=0, chunked=True, tuning=WHOLE),
        Case(dtype=torch.float32, tuning=WHOLE),
    ],
    ids=["no unit", "softcap", "window", "chunked", "float32"],
)
def test_the_generated_kernel_serves_what_the_library_lacks(case: Case) -> None:
    pieces: list[int] = []
    assert launched(case, [9000], [slice(0, 4096)], pieces) == {"unpack": 1, "prefill": 1}
    assert not pieces


def test_few_tokens_are_not_worth_a_call_of_the_library() -> None:
    pieces: list[int] = []
    assert launched(Case(tuning=WHOLE), [9000], [slice(0, 1023)], pieces) == {"unpack": 1, "prefill": 1}
    assert not pieces


@pytest.mark.parametrize(
    "case", [Case(heads=2, group=3, tuning=WHOLE), Case(softcap=5.0, tuning=WHOLE)], ids=["plain", "softcap"]
)
def test_the_launches_around_the_library_are_foreseen(case: Case) -> None:
    """What is compiled with an artifact is what a long prompt launches."""
    plan = dataclasses.replace(case.plan(), arena_bytes=1 << 40)
    foreseen, made = (Noting(render_module(case)) for _ in range(2))
    q = torch.empty(2, case.heads * case.group, 4096, case.head_dim, dtype=case.dtype, device=NOWHERE)
    few = q[:, :, :3].contiguous()
    calls = [
        launches.Call(one, one[:, : case.heads], one[:, : case.heads], 0.1, case.softcap, None) for one in (few, q)
    ]
    launches._run_layer(
        LayerKernels(foreseen, case.tuning),  # type: ignore[arg-type]
        dataclasses.replace(cache_plan(plan, max_len=1 << 17, batch_size=2), dtype="float16"),
        calls,
    )
    for stored in ([100, 40000], [0, 9]):
        for columns in ([slice(0, 4096), slice(1000, 4096)], [slice(0, 30), slice(7, 30)]):
            launched(case, stored, columns, [], made)
    prompts = {key: one for key, one in made.launches.items() if one.kernel != "unpack" or '"KEY_BITS": 4' in key}
    assert {one.kernel for one in prompts.values()} >= {"prefill"} | (
        {"halve", "join"} if case.softcap is None else set()
    )
    assert prompts.keys() <= foreseen.launches.keys()
    for key, one in prompts.items():
        assert one.divisible >= foreseen.launches[key].divisible, f"{key} relies on more than holds"


def served(case: Case, known: list[tuple[int, int, int]], exact: bool = False) -> tuple[Counter[str], list[int]]:
    """Launches of a step of sequences in pages, whose (start, stop, length) the host knows, and the tokens of each
    piece that the library reads."""
    plan = dataclasses.replace(case.plan(), stages=() if exact else ((case.key_bits, case.value_bits),))
    layer = PagedLayer(plan, case.heads, case.dtype.itemsize)
    module, pieces, lengths = Noting(render_module(case, paged=True)), [], [length for _, _, length in known]
    kernels = LayerKernels(module, case.tuning)  # type: ignore[arg-type]
    blocks = torch.empty(9, 1 << 20, dtype=torch.uint8, device=NOWHERE)
    pages = KernelPages(layer, kernels, case.dtype, max(lengths), blocks, 0, *(() if exact else (blocks, 0, 16)))
    numbers = torch.empty(len(known) + 1, 99, dtype=torch.int32, device=NOWHERE)
    several = range(sum(stop - start == 1 for start, stop, _ in known), len(known))
    news = [stop - start for start, stop, _ in known]
    place = known[several.start :]
    batch = Batch(numbers[:, 0], numbers[1:, 0], numbers, numbers, max(news), max(lengths), several, False, place)
    q = torch.empty(known[-1][1], case.heads * case.group, case.head_dim, dtype=case.dtype, device=NOWHERE)
    k = q[:, : case.heads]

    def noted(q, k, v, scale, causal=False):
        pieces.append(k.shape[2])
        assert not causal
        return library_attention(q, k, v, scale)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "library_attention", noted)
        pages.attend_batch(q, k, k, batch, 0.1, case.softcap, None, q)
    return Counter(module.noted), pieces


def test_a_server_lets_the_library_read_what_all_new_tokens_see_as_codes() -> None:
    known = [(0, 1, 7000), (1, 1201, 7400), (1201, 1300, 9000), (1300, 2400, 1150)]
    found, pieces = served(Case(heads=2, tuning=WHOLE), known)
    assert pieces == [6144], "6,144 of 6,200 earlier tokens; the others bring too few, or have too few"
    assert found["prefill_pages"] == 3
    assert found["unpack_pages"] == len(pieces) + 3
    assert (found["halve"], found["join"]) == (1, 0)


@pytest.mark.parametrize(
    ("case", "exact"),
    [
        (Case(), False),
        (Case(softcap=5.0, tuning=WHOLE), False),
        (Case(sliding_window=1000, window=128, tuning=WHOLE), False),
        (Case(dtype=torch.float32, tuning=WHOLE), False),
        (Case(sink=0, tuning=WHOLE), True),
    ],
    ids=["no unit", "softcap", "window", "float32", "exact"],
)
def test_a_server_uses_the_generated_kernel_where_the_library_lacks_something(case: Case, exact: bool) -> None:
    found, pieces = served(case, [(0, 1200, 7400), (1200, 3000, 9000)], exact)
    assert not pieces
    assert (found["prefill_pages"], found["unpack_pages"], found["halve"]) == (1, 1, 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_the_library_returns_means_and_logarithms_of_sums(head_dim: int, group: int, causal: bool) -> None:
    """Over keys and values that lie in scratch, whose channels are padded with anything."""
    torch.manual_seed(0)
    q = torch.randn(1, 2 * group, 100 if causal else 70, head_dim, dtype=torch.float16)
    k, v = (torch.full((1, 2, 104, 256), float("nan"), dtype=torch.float16) for _ in range(2))
    k, v = (x[:, :, 4:, :head_dim].copy_(torch.randn(1, 2, 100, head_dim)) for x in (k, v))
    means, log_sums = library_attention(q, k, v, 0.2, causal)
    scores = q.double().unflatten(1, (2, group)) @ k.double().unsqueeze(2).transpose(-1, -2) * 0.2
    if causal:
        scores = scores.masked_fill(torch.ones(100, 100).triu(1).bool(), float("-inf"))
    expected = (scores.softmax(-1) @ v.double().unsqueeze(2)).flatten(1, 2)[0]
    assert ((means.double() - expected).norm() / expected.norm()).item() < 1e-3
    torch.testing.assert_close(log_sums.double(), scores.logsumexp(-1).flatten(1, 2)[0], rtol=1e-4, atol=1e-4)
    assert means.is_contiguous(), "kernels go by addresses"
    assert log_sums.is_contiguous()
