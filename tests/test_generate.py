"""Generation by an artifact against `transformers`: the same tokens without quantization, sane behaviour with it."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pmkvq_compiler import runtime

from .conftest import CompileTiny

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


@pytest.mark.parametrize("model_type", ARCHITECTURES)
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


@pytest.mark.parametrize("model_type", ARCHITECTURES)
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


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral"])
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
