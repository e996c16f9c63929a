"""Generation by an artifact against `transformers`: the same tokens without quantization, sane behaviour with it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from pmkvq_compiler import runtime
from tests.conftest import CompileTiny
from tests.fuzz import chosen

ARCHITECTURES = ["llama", "qwen2", "mistral", "gemma2", "qwen3", "gpt_neox"]
SLIDING = {"mistral": {"sliding_window": 24}, "gemma2": {"sliding_window": 24}}


def ragged_batch(lengths: tuple[int, ...] = (37, 20, 5), left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        own = slice(width - length, width) if left else slice(0, length)
        ids[row, own] = torch.randint(3, 128, (length,))
        mask[row, own] = 1
    return ids, mask


def source_of(artifact: Path) -> torch.nn.Module:
    """Its attention is the eager one: in some releases of transformers sdpa leaves out Gemma 2's soft cap."""
    folder = artifact.parent / "source"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("model_type", chosen(ARCHITECTURES, "llama", "gemma2", "gpt_neox"))
def test_unquantized_artifact_equals_transformers(compile_tiny: CompileTiny, model_type: str) -> None:
    artifact = compile_tiny(model_type, SLIDING.get(model_type), recipe="none", max_len=200, batch_size=3)
    model, source = runtime.load(artifact), source_of(artifact)
    ids = torch.randint(3, 128, (2, 150))
    with torch.no_grad():
        expected = source(ids).logits
    assert (model(ids) - expected).norm() / expected.norm() < 1e-5
    cache = model.new_cache(batch_size=2)
    steps = torch.cat([model(piece, cache) for piece in ids.split([40, 1, 1, 30, 78], dim=1)], dim=1)
    assert (steps - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("model_type", chosen(ARCHITECTURES, "llama", "gemma2", "gpt_neox"))
def test_greedy_tokens_equal_transformers_for_a_left_padded_batch(compile_tiny: CompileTiny, model_type: str) -> None:
    artifact = compile_tiny(model_type, SLIDING.get(model_type), recipe="none", max_len=200, batch_size=3)
    model, source = runtime.load(artifact), source_of(artifact)
    torch.manual_seed(1)
    ids, mask = ragged_batch()
    expected = source.generate(
        ids, attention_mask=mask, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    together = model.generate(ids, 60, attention_mask=mask, eos_token_id=())
    assert torch.equal(together[:, -60:], expected[:, -60:])


def test_padding_side_does_not_matter(compile_tiny: CompileTiny) -> None:
    artifact = compile_tiny("llama", recipe="none", max_len=120, batch_size=3)
    model = runtime.load(artifact)
    torch.manual_seed(2)
    left, left_mask = ragged_batch()
    torch.manual_seed(2)
    right, right_mask = ragged_batch(left=False)
    expected = source_of(artifact).generate(
        left, attention_mask=left_mask, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[:, -40:]
    for ids, mask in ((left, left_mask), (right, right_mask)):
        assert torch.equal(model.generate(ids, 40, attention_mask=mask, eos_token_id=())[:, -40:], expected)


@pytest.mark.parametrize("model_type", chosen(["llama", "qwen2", "mistral"], "qwen2"))
def test_quantized_batch_lowers_and_finishes(compile_tiny: CompileTiny, model_type: str) -> None:
    artifact = compile_tiny(model_type, budget="70%", batch_size=2)
    model = runtime.load(artifact)
    cache = model.new_cache(batch_size=2)
    seen = []
    ids, mask = ragged_batch((60, 20))
    out = model.generate(
        ids,
        341,
        attention_mask=mask,
        cache=cache,
        eos_token_id=(),
        streamer=lambda tokens: seen.append((tokens, cache.bits, cache.bytes_used)),
    )
    assert out.shape == (2, 401)
    assert torch.equal(torch.stack([tokens for tokens, _, _ in seen], dim=1), out[:, 60:])
    assert cache.length == [400, 360]
    assert cache.bits == [(layer.key_bits, layer.value_bits) for layer in model.plan.layers]
    assert max(used for _, _, used in seen) <= cache.bytes_reserved <= model.plan.budget
    with pytest.raises(runtime.CacheFull):
        model(torch.ones(2, 1, dtype=torch.long), cache)


def test_turns_continue_a_cache(compile_tiny: CompileTiny) -> None:
    model = runtime.load(compile_tiny("llama", budget="70%"))
    prompt = torch.randint(3, 128, (1, 50))
    whole = model.generate(prompt, 30, eos_token_id=())
    cache = model.new_cache()
    first = model.generate(prompt, 10, eos_token_id=(), cache=cache)
    rest = model.generate(first[:, -1:], 20, eos_token_id=(), cache=cache)
    assert torch.equal(torch.cat([first, rest[:, 1:]], dim=1), whole)


def test_sampling_is_repeatable_and_keeps_to_its_limits(compile_tiny: CompileTiny) -> None:
    model = runtime.load(compile_tiny("llama", budget="70%"))
    prompt = torch.randint(3, 128, (1, 20))

    def sample(**options: float) -> list[int]:
        return model.generate(prompt, 40, do_sample=True, eos_token_id=(), **options)[0, 20:].tolist()

    greedy = model.generate(prompt, 40, eos_token_id=())[0, 20:].tolist()
    assert sample(seed=3) == sample(seed=3)
    assert sample(seed=3) != sample(seed=4)
    assert sample(seed=3, top_k=1) == greedy
    assert sample(seed=3, top_p=1e-6) == greedy
    assert sample(seed=3, temperature=1e-4) == greedy
    first = model(prompt)[0, -1]
    allowed = set(first.topk(5).indices.tolist())
    drawn = {
        model.generate(prompt, 1, do_sample=True, top_k=5, temperature=9.0, seed=seed)[0, -1] for seed in range(40)
    }
    assert {int(token) for token in drawn} <= allowed
    assert len(drawn) > 1


def test_end_of_sequence_stops_each_row_by_itself(compile_tiny: CompileTiny) -> None:
    model = runtime.load(compile_tiny("llama", budget="70%", batch_size=2))
    ids = torch.randint(3, 128, (2, 20))
    free = model.generate(ids, 30, eos_token_id=())
    end = int(free[0, 25])
    stopped = model.generate(ids, 30, eos_token_id=end)
    position = free[0, 20:].tolist().index(end)
    assert torch.equal(stopped[0, : 20 + position + 1], free[0, : 20 + position + 1])
    assert set(stopped[0, 20 + position + 1 :].tolist()) <= {0}, "after its end a row is padding"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "prompt is empty"),
        ({"input_ids": torch.tensor([[5, 128]])}, "token id 128 is outside the vocabulary of 128"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "token id -1 is outside"),
        ({"input_ids": torch.tensor([5, 6])}, "must be integers"),
        ({"input_ids": torch.tensor([[0.5]])}, "must be integers"),
        ({"input_ids": torch.ones(1, 401, dtype=torch.long)}, "401 tokens and max_new_tokens 5 do not fit"),
        ({"input_ids": torch.ones(1, 398, dtype=torch.long)}, "do not fit a cache of 400"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4)}, "a prompt is empty"),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 1, 1]])},
            "padding between tokens",
        ),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 5)}, "has shape"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "max_new_tokens": 0}, "generates nothing"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "temperature": 0.0}, "temperature 0.0"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "top_p": 1.5}, "top_p 1.5"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "top_k": -1}, "top_k -1"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(
    compile_tiny: CompileTiny, arguments: dict[str, object], message: str
) -> None:
    model = runtime.load(compile_tiny("llama", budget="70%"))
    cache = model.new_cache()
    with pytest.raises(runtime.InputError, match=message):
        model.generate(**{"max_new_tokens": 5, "cache": cache, **arguments})
    assert cache.length == [0]
    assert cache.bytes_used == 0


IDS = [[5, 6, 7], [8, 9, 10]]


@pytest.fixture(scope="module")
def small(compile_tiny: CompileTiny) -> runtime.CompiledModel:
    return runtime.load(compile_tiny("llama", budget="70%", batch_size=2))


@pytest.mark.parametrize(
    "ids",
    [
        IDS,
        tuple(map(tuple, IDS)),
        np.array(IDS),
        np.array(IDS, dtype=np.uint16),
        *(torch.tensor(IDS, dtype=dtype) for dtype in (torch.int32, torch.uint8, torch.int16, torch.uint64)),
        torch.tensor(IDS).repeat(1, 2)[:, ::2],
    ],
)
def test_whole_numbers_of_any_kind_are_token_ids(small: runtime.CompiledModel, ids: Any) -> None:
    expected = torch.as_tensor(np.array(ids).astype(np.int64))
    assert torch.equal(small(ids), small(expected))
    out = small.generate(ids, 4, eos_token_id=())
    assert out.dtype == torch.int64
    assert torch.equal(out, small.generate(expected, 4, eos_token_id=()))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda mask: torch.tensor(mask).bool()])
@pytest.mark.parametrize("one", [1, 1.0])
def test_ones_and_zeros_of_any_kind_are_a_mask(small: runtime.CompiledModel, kind: Any, one: float) -> None:
    mask = [[one, one, one], [0, one, one]]
    assert torch.equal(small(IDS, attention_mask=kind(mask)), small(IDS, attention_mask=torch.tensor(mask).bool()))


def test_positions_are_given_for_all_rows_or_each(small: runtime.CompiledModel) -> None:
    expected = small(IDS)
    for positions in ([0, 1, 2], [[0, 1, 2]], [[0, 1, 2]] * 2, np.arange(3, dtype=np.int32), torch.arange(3).short()):
        assert torch.equal(small(IDS, position_ids=positions), expected)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    padded = torch.tensor([[0, 1, 2], [-1, 0, 1]])
    assert torch.equal(small(IDS, position_ids=padded, attention_mask=mask)[0], expected[0]), "padding has no position"
    torch.testing.assert_close(small(IDS, only=([0, 1], [-1, 2])), expected[[0, 1], [2, 2]])


NAN, INFINITY, HUGE = float("nan"), float("inf"), 10**5000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.bool)}, r"integers \[batch, tokens\], got torch.bool"),
        ({"input_ids": torch.ones(2, 3)}, "got torch.float32"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.complex64)}, "got torch.complex64"),
        ({"input_ids": [5, 6]}, r"got torch.int64 \[2\]"),
        ({"input_ids": [[5, 6], [7]]}, "input_ids cannot be read as numbers"),
        ({"input_ids": "a whale"}, "input_ids cannot be read as numbers"),
        ({"input_ids": None}, "input_ids cannot be read as numbers"),
        ({"input_ids": {"input_ids": IDS}}, "input_ids cannot be read as numbers"),
        ({"input_ids": [[2**70, 1]]}, "input_ids cannot be read as numbers"),
        ({"input_ids": [[]]}, "the prompt is empty"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long).to_sparse()}, "not a dense tensor"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long, device="meta")}, "not a dense tensor"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0.0, 0.5, 1]])}, "attention_mask holds 0.5; give 1 for a token"),
        ({"attention_mask": torch.tensor([[1, 1, NAN]] * 2)}, "attention_mask holds nan"),
        ({"attention_mask": [[1, 1, 2]] * 2}, "attention_mask holds 2"),
        ({"attention_mask": [[0, 0, -INFINITY]] * 2}, "attention_mask holds -inf"),
        ({"attention_mask": torch.ones(2, 1, 3, 3)}, r"attention_mask has shape \[2, 1, 3, 3\]"),
        ({"attention_mask": "all"}, "attention_mask cannot be read as numbers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["call", "generate"])
def test_input_that_is_no_input_is_told_in_a_sentence(
    small: runtime.CompiledModel, arguments: dict[str, Any], words: str, way: str
) -> None:
    given = {"input_ids": torch.tensor(IDS), **arguments}
    refused(small, words, lambda cache: small(cache=cache, **given) if way == "call" else
            small.generate(max_new_tokens=2, cache=cache, **given))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"position_ids": [[0, 1]] * 2}, r"position_ids must be integers \[2, 3\], as input_ids, got .* \[2, 2\]"),
        ({"position_ids": [[[0, 1, 2]]]}, "position_ids must be integers"),
        ({"position_ids": [[0.0, 1, 2]]}, "position_ids must be integers .* got torch.float32"),
        ({"position_ids": torch.ones(2, 3, dtype=torch.bool)}, "position_ids must be integers .* got torch.bool"),
        ({"position_ids": [0, 1, -2]}, "position -2 is outside the 0 to 399"),
        ({"position_ids": [0, 1, 400]}, "position 400 is outside the 0 to 399 .*; compile with a larger --max-len"),
        ({"position_ids": "follow"}, "position_ids cannot be read as numbers"),
        ({"only": ([0, 2], [0, 0])}, "only asks for row 2 of input_ids, which have 2 rows"),
        ({"only": ([0], [3])}, "only asks for column 3 of input_ids, which have 3 columns"),
        ({"only": ([0, 1], [0])}, "only has rows .* give two equally long lists"),
        ({"only": ([0.0], [0])}, "only has rows .* give two equally long lists"),
        ({"only": 3}, r"only must be \(rows, columns\)"),
        ({"cache": DynamicCache()}, r"the cache is a DynamicCache; make one with the model's new_cache\(\)"),
    ],
)
def test_a_call_s_other_arguments_are_checked(
    small: runtime.CompiledModel, arguments: dict[str, Any], words: str
) -> None:
    refused(small, words, lambda cache: small(IDS, **{"cache": cache, **arguments}))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": NAN}, "temperature nan is not a finite number"),
        ({"temperature": INFINITY}, "temperature inf is not a finite number"),
        ({"temperature": "hot"}, "temperature 'hot' is not a finite number"),
        ({"temperature": True}, "temperature True is not a finite number"),
        ({"temperature": None}, "temperature None is not a finite number"),
        ({"temperature": HUGE}, "temperature with thousands of digits is not a finite number"),
        ({"temperature": 1e-320}, "temperature 1e-320 is not above 0"),
        ({"temperature": -1}, "temperature -1.0 is not above 0"),
        ({"top_p": NAN}, "top_p nan is not a finite number"),
        ({"top_p": 0}, r"top_p 0.0 is not in \(0, 1\]"),
        ({"top_k": 5.0}, "top_k 5.0 is not a whole number"),
        ({"top_k": None}, "top_k None is not a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens True is not a whole number"),
        ({"max_new_tokens": 3.0}, "max_new_tokens 3.0 is not a whole number"),
        ({"max_new_tokens": "3"}, "max_new_tokens '3' is not a whole number"),
        ({"max_new_tokens": HUGE}, "max_new_tokens with thousands of digits is not a whole number of at most 64 bits"),
        ({"max_new_tokens": 10**12}, "do not fit a cache of 400 tokens"),
        ({"seed": 2**64}, "seed 18446744073709551616 .*64 bits"),
        ({"seed": -(2**63) - 1}, "seed -9223372036854775809 does not fit 64 bits"),
        ({"seed": 1.5}, "seed 1.5 is not a whole number"),
        ({"seed": True}, "seed True is not a whole number"),
        ({"eos_token_id": 128}, "eos_token_id 128 is outside the vocabulary of 128 tokens"),
        ({"eos_token_id": [2, -1]}, "eos_token_id -1 is outside the vocabulary"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>' is not a whole number"),
        ({"eos_token_id": 2.0}, "eos_token_id 2.0 is not a whole number"),
        ({"eos_token_id": False}, "eos_token_id False is not a whole number"),
        ({"eos_token_id": [[2]]}, r"eos_token_id \[2\] is not a whole number"),
        ({"streamer": "print"}, "the streamer is a str; give a function"),
        ({"cache": "mine"}, "the cache is a str"),
    ],
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_how_to_generate_is_checked_before_anything_runs(
    small: runtime.CompiledModel, arguments: dict[str, Any], words: str, do_sample: bool
) -> None:
    options = {"max_new_tokens": 3, "do_sample": do_sample, **arguments}
    refused(small, words, lambda cache: small.generate(IDS, **{"cache": cache, **options}))


def refused(model: runtime.CompiledModel, words: str, use: Callable[[runtime.Cache], object]) -> None:
    """In one sentence, and nothing is changed."""
    cache = model.new_cache(2)
    model(IDS, cache)
    with pytest.raises(runtime.InputError, match=words) as error:
        use(cache)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert cache.length == [3, 3]
    alone = model.new_cache(2)
    model(IDS, alone)
    assert torch.equal(model(IDS, cache), model(IDS, alone))


def test_numbers_of_any_kind_say_how_to_generate(small: runtime.CompiledModel) -> None:
    expected = small.generate(IDS, 5, do_sample=True, temperature=0.5, top_k=7, seed=3, eos_token_id=[2, 9])
    given = {"temperature": np.float32(0.5), "top_p": 1, "top_k": np.int64(7), "seed": torch.tensor(3)}
    for ends in (torch.tensor([2, 9]), np.array([9, 2]), {2, 9}, (np.int32(2), 9)):
        assert torch.equal(small.generate(IDS, np.int64(5), do_sample=True, eos_token_id=ends, **given), expected)
    assert small.generate(IDS, 2, eos_token_id=torch.tensor(2)).shape == (2, 5)
    for extreme in (1.2e-38, 1e300):
        assert small.generate(IDS, 5, do_sample=True, temperature=extreme, eos_token_id=()).shape == (2, 8)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, [1], pytest.param(HUGE, id="huge"), 10**12, -1, 0, NAN])
def test_caches_of_odd_sizes_are_refused(small: runtime.CompiledModel, value: Any) -> None:
    with pytest.raises(runtime.InputError, match="batch_size"):
        small.new_cache(value)
    if value is not None:
        with pytest.raises(runtime.InputError, match="max_len"):
            small.new_cache(1, value)


def test_sizes_and_orders_may_be_numbers_of_other_libraries(small: runtime.CompiledModel) -> None:
    cache = small.new_cache(np.int64(2), torch.tensor(50))
    assert (cache.batch_size, cache.max_len) == (2, 50)
    small(IDS, cache)
    for order in ([1, 0], (1, 0), np.array([1, 0]), torch.tensor([1, 0]), range(1, -1, -1)):
        cache.reorder(order)
        cache.select(order)
    cache.crop(np.int64(1))
    assert cache.length == [2, 2]
    for use in (cache.reorder, cache.select):
        for odd in (
            [0, 2],
            [0, -1],
            [True, False],
            [0.0, 1.0],
            "01",
            0,
            None,
            [[0, 1]],
            torch.ones(2),
            torch.tensor(0),
            [],
        ):
            with pytest.raises(runtime.InputError, match="sequences"):
                use(odd)
    for odd in (True, 1.0, "1", None, -1, 3, HUGE):
        with pytest.raises(runtime.InputError, match=r"count|cannot be taken back"):
            cache.crop(odd)
    assert cache.length == [2, 2]


def test_a_cache_of_another_model_or_size_is_refused(small: runtime.CompiledModel, compile_tiny: CompileTiny) -> None:
    other = runtime.load(compile_tiny("gemma2", SLIDING["gemma2"], recipe="none", max_len=200, batch_size=3))
    for cache, words in ((other.new_cache(2), "another model's"), (small.new_cache(1), "the cache 1 sequences")):
        for use in (lambda cache=cache: small(IDS, cache), lambda cache=cache: small.generate(IDS, 2, cache=cache)):
            with pytest.raises(runtime.InputError, match=words):
                use()
        assert max(cache.length) == 0


@pytest.mark.parametrize("shaping", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5, "temperature": 9.0}])
@pytest.mark.parametrize("odd", [[float("nan")], [float("inf")], [float("-inf")] * 128])
def test_tokens_are_not_drawn_by_logits_that_are_no_numbers(
    small: runtime.CompiledModel, odd: list[float], shaping: dict[str, Any]
) -> None:
    """In one of two sequences, from the second token on."""
    true_logits, calls = small.logits, []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        out: torch.Tensor = true_logits(hidden)
        if len(calls) > 1:
            out[1, ..., : len(odd)] = torch.tensor(odd)
        return out

    with pytest.raises(runtime.ArtifactError, match=r"logits are not finite in float32, so no token can be drawn"):
        replace(small, logits=logits).generate(IDS, 5, do_sample=True, seed=1, eos_token_id=(), **shaping)
    assert len(calls) == 2
