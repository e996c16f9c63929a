"""The artifact through transformers: what `generate` can do with any model it can do with a compiled one."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline, set_seed

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.manifest import file_digest

from .conftest import CompileTiny, silent
from .devices import EACH_GPU
from .folders import TEXT, model_folder
from .fuzz import chosen
from .models import SHAPE

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = ["llama", "qwen3", "gemma2", "mixtral", "gpt_oss"]


def load(artifact: Path | str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def artifact(compile_tiny: CompileTiny) -> Path:
    """Four sequences of 300 tokens, whose layers have to give up bits before that."""
    return compile_tiny("qwen2", budget="50%", max_len=300, batch_size=4, window=32)


@pytest.fixture(scope="module")
def model(artifact: Path) -> Any:
    return load(artifact)


@pytest.fixture(scope="module")
def unquantized(compile_tiny: CompileTiny) -> Path:
    return compile_tiny("llama", recipe="none", max_len=200, batch_size=6)


def prompt(length: int = 150, seed: int = 0, batch_size: int = 1) -> Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (batch_size, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, input_ids: Tensor, **options: Any) -> Any:
    return model.generate(input_ids, **{"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, **options})


def test_greedy_tokens_are_those_of_the_runtime(artifact: Path, model: Any) -> None:
    own = runtime.load(artifact)
    cache = own.new_cache(batch_size=4)
    ids = prompt(200, batch_size=4)
    expected = own.generate(ids, 64, eos_token_id=(), cache=cache)
    out = greedy(model, ids, return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected)
    assert out.past_key_values.cache.bits == cache.bits
    assert max(bits for pair in cache.bits for bits in pair) < 16, "the cache had to give up bits"
    assert out.past_key_values.cache.bytes_reserved == cache.bytes_reserved <= own.plan.budget


def test_padding_does_not_matter(model: Any) -> None:
    """Left padding, more of it than needed, a batch of different lengths: the tokens of each prompt alone."""
    prompts = [prompt(length, seed) for seed, length in enumerate((90, 61, 7))]
    width = 100
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, one in enumerate(prompts):
        ids[row, width - one.shape[1] :], mask[row, width - one.shape[1] :] = one, 1
    together = greedy(model, ids, attention_mask=mask)[:, width:]
    cache = model.new_cache(4)
    for row, one in enumerate(prompts):
        past = copy.deepcopy(cache)
        past.batch_select_indices(torch.tensor([0]))
        assert torch.equal(greedy(model, one, past_key_values=past)[0, one.shape[1] :], together[row])


@pytest.mark.parametrize(("model_type", "options"), [("llama", {}), ("mistral", {"sliding_window": 24})])
def test_beam_search_and_sampling_are_those_of_transformers(
    compile_tiny: CompileTiny, model_type: str, options: dict[str, Any]
) -> None:
    folder = compile_tiny(model_type, options or None, recipe="none", max_len=200, batch_size=6)
    compiled, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder.parent / "source").eval()
    ids = prompt(40, batch_size=2)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 30, "return_dict_in_generate": True}
    out, expected = greedy(compiled, ids, **beams), greedy(plain, ids, **beams)
    assert torch.equal(out.sequences, expected.sequences)
    assert any(len(set(indices) - {-1}) > 1 for indices in out.beam_indices.tolist()), "beams changed places"
    sampled = []
    for each in (compiled, plain):
        set_seed(4)
        sampled.append(each.generate(ids, do_sample=True, top_p=0.9, temperature=0.8, max_new_tokens=30))
    assert torch.equal(*sampled)


def test_beam_search_reorders_packed_codes(artifact: Path, model: Any) -> None:
    """Beams of a quantized cache against a search that feeds every beam anew, token by token as it came."""

    class Replayed(type(model.new_cache())):  # type: ignore[misc]
        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.history = self.history[beam_idx]
            self.cache = model.compiled.new_cache(len(beam_idx))
            for piece in self.history.split([150, *[1] * (self.history.shape[1] - 150)], dim=1):
                model.compiled(piece, self.cache)

    def forward(input_ids: Tensor, cache: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        past = past_key_values if cache is None else cache  # its name depends on the version of transformers
        if isinstance(past, Replayed):
            past.history = torch.cat([past.history, input_ids], dim=1)
        return type(model).forward(model, input_ids, past_key_values=past, **kwargs)

    ids = prompt(150)
    replayed = Replayed(model.compiled.new_cache(4))
    replayed.history = torch.zeros(4, 0, dtype=torch.long)
    options = {"num_beams": 4, "max_new_tokens": 25, "return_dict_in_generate": True, "output_scores": True}
    out = greedy(model, ids, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", forward)
        expected = greedy(model, ids, past_key_values=replayed, **options)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.sequences_scores, expected.sequences_scores)
    assert any(len(set(indices) - {-1}) > 1 for indices in out.beam_indices.tolist())


def test_a_cache_serves_turn_after_turn(artifact: Path, model: Any) -> None:
    own = runtime.load(artifact)
    cache, past = own.new_cache(), model.new_cache()
    conversation = prompt(80)
    fed = 0
    for turn in range(3):
        expected = own.generate(conversation[:, fed:], 10, eos_token_id=(), cache=cache)[:, -10:]
        out = greedy(model, conversation, past_key_values=past, max_new_tokens=10)
        assert torch.equal(out[:, -10:], expected)
        fed = past.get_seq_length()
        assert fed == cache.length[0] == out.shape[1] - 1
        conversation = torch.cat([out, prompt(30, seed=turn + 1)], dim=1)


def test_a_prompt_is_cached_once_and_copied(model: Any) -> None:
    """One deep copy of the cache a continuation; the original stays as it is."""
    shared = model(prompt(120), past_key_values=model.new_cache()).past_key_values
    for seed in (1, 2):
        ids = torch.cat([prompt(120), prompt(20, seed)], dim=1)
        alone = model.new_cache()
        model(ids[:, :120], past_key_values=alone)
        past = copy.deepcopy(shared)
        assert torch.equal(greedy(model, ids, past_key_values=past), greedy(model, ids, past_key_values=alone))
    assert shared.get_seq_length() == 120


def test_prefill_in_chunks(artifact: Path, model: Any) -> None:
    own = runtime.load(artifact)
    cache, ids = own.new_cache(), prompt(150)
    for piece in ids[:, :128].split(32, dim=1):
        own(piece, cache)
    expected = own.generate(ids[:, 128:], 64, eos_token_id=(), cache=cache)[:, -64:]
    assert torch.equal(greedy(model, ids, prefill_chunk_size=32)[:, -64:], expected)


def test_long_input_is_taken_in_the_chunks_of_the_runtime(artifact: Path, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(model, "prefill_chunk", 64)
    own = runtime.load(artifact)
    cache, ids = own.new_cache(2), prompt(150, batch_size=2)
    mask = torch.ones_like(ids)
    mask[1, :80] = 0
    pieces = zip(ids.split(64, 1), mask.split(64, 1), strict=True)
    expected = torch.cat([own(part, cache, attention_mask=own_mask) for part, own_mask in pieces], 1)
    out = model(ids, attention_mask=mask, past_key_values=model.new_cache(2))
    torch.testing.assert_close(out.logits, expected)
    for keep, columns in ((1, slice(149, 150)), (30, slice(120, 150)), (torch.tensor([3, 70, 149]), [3, 70, 149])):
        out = model(ids, attention_mask=mask, past_key_values=model.new_cache(2), logits_to_keep=keep)
        torch.testing.assert_close(out.logits, expected[:, columns])


def test_tokens_are_streamed(model: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    out = greedy(model, prompt(), streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == out[0].tolist()


def test_drafted_tokens_that_are_wrong_are_taken_back(unquantized: Path) -> None:
    """Prompt lookup guesses tokens and crops the cache by the wrong ones."""
    compiled = load(unquantized)
    ids = prompt(20).repeat(1, 4)
    out = greedy(compiled, ids, prompt_lookup_num_tokens=4, max_new_tokens=40)
    assert torch.equal(out, greedy(compiled, ids, max_new_tokens=40))


def test_drafts_are_refused_where_they_would_leave_a_trace(model: Any) -> None:
    """At the start, whatever drafts them, before a token is made or a cache changed."""
    assert not model.new_cache().is_croppable
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", lambda *_, **__: seen.append("called"))
        for drafts in (
            {"prompt_lookup_num_tokens": 4},
            {"assistant_model": model},
            {"assistant_early_exit": 1},
            {"prompt_lookup_num_tokens": 4, "past_key_values": model.new_cache()},
            {"prompt_lookup_num_tokens": 4, "do_sample": True},
            {"prompt_lookup_num_tokens": 4, "use_cache": False},
        ):
            with pytest.raises(
                ValueError, match=r"assisted generation \(.*\) requires a cache that can be cropped|use_cache"
            ):
                greedy(model, prompt(20).repeat(1, 4), **drafts)
    assert not seen


def test_strategies_and_caches_of_others_are_refused_at_the_start(model: Any) -> None:
    for options, words in (
        ({"custom_generate": "somebody/dola"}, "custom_generate='somebody/dola' is not supported"),
        ({"custom_generate": ".", "trust_remote_code": True}, "custom_generate='.' is not supported"),
        *(
            ({"cache_implementation": name}, "is not supported")
            for name in ("static", "quantized", "offloaded", "paged")
        ),
        ({"pad_token_id": -1}, "pad_token_id=-1 is not in the vocabulary of 128 tokens"),
        ({"pad_token_id": 128}, "pad_token_id=128 is not in the vocabulary"),
        ({"eos_token_id": [2, 500]}, "eos_token_id=500 is not in the vocabulary"),
    ):
        with pytest.raises(ValueError, match=words):
            greedy(model, prompt(20, batch_size=2), **options)


def test_defaults_that_speak_of_other_caches_mean_nothing(artifact: Path, model: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "copy"))
    defaults = json.loads((folder / "generation_config.json").read_text())
    defaults |= {"cache_implementation": "static", "use_cache": False, "pad_token_id": -1, "eos_token_id": [2, 10**6]}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    manifest = json.loads((folder / "pmkvq.json").read_text())
    manifest["files"]["generation_config.json"] = file_digest(folder / "generation_config.json")
    (folder / "pmkvq.json").write_text(json.dumps(manifest))
    loaded, ids = load(folder), prompt(60, batch_size=2)
    out = greedy(loaded, ids, return_dict_in_generate=True)
    assert torch.equal(out.sequences, greedy(model, ids))
    assert type(out.past_key_values).__name__ == "PmkvqCache"
    loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
    assert (loaded.generation_config.pad_token_id, loaded.generation_config.eos_token_id) == (None, [2])


def test_crop_goes_back_or_refuses(model: Any) -> None:
    past, other = model.new_cache(2), model.new_cache(2)
    ids = prompt(60, batch_size=2)
    model(ids, past_key_values=past)
    model(ids[:, :55], past_key_values=other)
    past.crop(-5)
    assert past.get_seq_length() == 55
    tail = prompt(4, seed=9, batch_size=2)
    assert torch.equal(model(tail, past_key_values=past).logits, model(tail, past_key_values=other).logits)
    with pytest.raises(ValueError, match=r"crop\(3\) is not supported"):
        past.crop(3)
    model(prompt(150, batch_size=2), past_key_values=past)
    with pytest.raises(ValueError, match="140 tokens cannot be taken back"):
        past.crop(-140)
    mask = torch.ones(2, past.get_seq_length() + 8)
    mask[1, -3:] = 0
    model(prompt(8, batch_size=2), past_key_values=past, attention_mask=mask)
    with pytest.raises(ValueError, match="1 columns cannot be taken back: only the last 0 hold a token"):
        past.crop(-1)


def test_rows_are_selected_and_repeated(model: Any) -> None:
    ids, tail = prompt(140, batch_size=2), prompt(1, seed=3)
    past = model(ids, past_key_values=model.new_cache(2)).past_key_values
    past.batch_select_indices(torch.tensor([1]))
    past.batch_repeat_interleave(2)
    assert past.batch_size == 2
    twice = model(tail.repeat(2, 1), past_key_values=past).logits
    alone = model(ids[1:].repeat(2, 1), past_key_values=model.new_cache(2)).past_key_values
    assert torch.equal(twice, model(tail.repeat(2, 1), past_key_values=alone).logits)


@pytest.mark.parametrize("model_type", chosen(PLAIN, "qwen3", "gpt_oss"))
def test_plain_transformers_loads_the_folded_weights(compile_tiny: CompileTiny, model_type: str) -> None:
    """Without remote code: the ordinary class, nothing missing, the logits of the source model."""
    folder = compile_tiny(model_type, None, budget="80%" if model_type == "gpt_oss" else "70%")
    plain, loading = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    source = AutoModelForCausalLM.from_pretrained(folder.parent / "source", attn_implementation="eager")
    assert not any(loading.values()), loading
    assert type(plain) is type(source)
    ids = prompt(40)
    with torch.no_grad():
        logits, expected = plain(ids).logits, source(ids).logits
    assert (logits - expected).norm() / expected.norm() < 1e-5
    assert type(load(folder)).__name__ == type(plain).__name__, "tools look for the architecture's name"


def test_loading_ours_leaves_the_architecture_to_others(artifact: Path, model: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(artifact)
    assert type(plain).__module__.startswith("transformers.")


def test_a_pipeline_and_its_chat_template(tmp_path: Path) -> None:
    from pmkvq_compiler.compile import compile_model
    from pmkvq_compiler.options import CompileOptions

    source, artifact = model_folder(tmp_path / "source", "qwen2"), tmp_path / "artifact"
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "calib.txt").write_text(TEXT)
    calib: dict[str, Any] = {
        "calib": str(tmp_path / "calib.txt"),
        "calib_samples": 2,
        "calib_len": 128,
        "block": 32,
        "window": 32,
    }
    compile_model(CompileOptions(str(source), artifact, budget="70%", max_len=300, **calib), silent)
    messages = [{"role": "user", "content": "Is it a whale?"}]
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<user>Is it a whale?\n<assistant>"
    chat = pipeline("text-generation", model=str(artifact), trust_remote_code=True)
    said = chat(messages, max_new_tokens=12, do_sample=False, eos_token_id=None)[0]["generated_text"][-1]
    assert said["role"] == "assistant"
    own = runtime.load(artifact)
    ids = tokenizer(rendered, return_tensors="pt").input_ids
    assert said["content"] == tokenizer.decode(own.generate(ids, 12, eos_token_id=())[0, ids.shape[1] :])


def test_a_hub_id_is_loaded_from_its_snapshot(artifact: Path, model: Any, tmp_path: Path) -> None:
    """The hub's cache as a download leaves it: a folder of links to blobs, named by commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    for path in filter(Path.is_file, artifact.rglob("*")):
        link = repository / "snapshots" / commit / path.relative_to(artifact)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / str(abs(hash(path)))
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = load("someone/tiny", cache_dir=str(tmp_path), local_files_only=True)
    assert loaded.name_or_path == "someone/tiny"
    assert torch.equal(greedy(loaded, prompt()), greedy(model, prompt()))


def test_weights_move_and_convert(artifact: Path, model: Any) -> None:
    half = load(artifact, dtype=torch.bfloat16)
    converted = load(artifact).to(torch.bfloat16)
    assert half.dtype == converted.dtype == converted.compiled.dtype == torch.bfloat16
    ids = prompt()
    assert torch.equal(half(ids).logits, converted(ids).logits)
    assert half.num_parameters() == AutoModelForCausalLM.from_pretrained(artifact).num_parameters()
    assert load(artifact, dtype="auto", device_map={"": "cpu"}).dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_backend_that_cannot_run_is_refused(artifact: Path) -> None:
    assert load(artifact, backend="reference").compiled.kernels_from == "reference"
    with pytest.raises(ValueError, match='"triton" needs'):
        load(artifact, backend="triton")


@pytest.mark.gpu
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("device", EACH_GPU)
def test_a_model_that_moves_attends_with_what_is_there(compile_tiny: CompileTiny, device: str) -> None:
    artifact = compile_tiny("qwen2", budget="70%", max_len=300, block=64, calib_len=128)
    expected = greedy(load(artifact), prompt())
    for moved in (load(artifact).to(device), load(artifact, device_map=device)):
        assert moved.compiled.kernels_from == "triton"
        assert torch.equal(greedy(moved, prompt().to(device)).cpu(), expected)
    assert moved.to("cpu").compiled.kernels_from == "reference"
    assert load(artifact, backend="reference").to(device).compiled.kernels_from == "reference"


def test_a_cache_has_two_names_and_no_others(model: Any) -> None:
    ids, tail = prompt(120), prompt(5, seed=1)
    logits = []
    for name in ("cache", "past_key_values"):
        past = model.new_cache()
        model(ids, **{name: past})
        logits.append(model(tail, **{name: past}).logits)
        assert past.get_seq_length() == 125
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(tail, cache=past, past_key_values=past)
    with pytest.raises(ValueError, match="state holds a cache; give it as cache or past_key_values"):
        model(tail, state=past)


def test_generation_without_a_cache(model: Any) -> None:
    ids = prompt(30)
    out = model(ids, use_cache=False)
    assert out.past_key_values is None
    assert torch.equal(out.logits, model(ids).logits)
    assert torch.equal(model(ids, return_dict=False)[0], out.logits)
    assert greedy(model, ids, use_cache=False, max_new_tokens=3).shape == (1, 33)


def test_what_an_artifact_cannot_do_is_refused(artifact: Path, model: Any) -> None:
    ids = prompt(30)
    for refused, words in (
        (lambda: greedy(model, ids, past_key_values=DynamicCache()), "is a DynamicCache; a compiled artifact has its"),
        (lambda: model(ids, past_key_values=DynamicCache()), "is a DynamicCache; a compiled artifact has its own"),
        (lambda: greedy(model, ids, cache_implementation="static"), "cache_implementation='static' is not supported"),
        (
            lambda: greedy(model, ids, max_new_tokens=400),
            "430 tokens, prompt and new ones together, do not fit a cache",
        ),
        (lambda: model(ids, labels=ids), "labels is not supported"),
        (lambda: model(ids, output_attentions=True), "output_attentions is not supported"),
        (lambda: model(ids, attention_mask=torch.ones(1, 29)), r"attention_mask has shape \[1, 29\]; give \[1, 30\]"),
        (lambda: model(), "input_ids are missing"),
        (lambda: load(artifact, device_map={"model": "cpu", "lm_head": "cuda:0"}), "names several devices"),
        (lambda: load(artifact, quantization_config={"load_in_8bit": True}), "quantization_config=.* is not supported"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    with pytest.raises(NotImplementedError, match="saved by copying its folder"):
        model.save_pretrained("elsewhere")
    past = model(prompt(250), past_key_values=model.new_cache()).past_key_values
    with pytest.raises(RuntimeError, match="more do not fit"):
        model(prompt(100), past_key_values=past)
    assert past.get_seq_length() == past.cache.length[0] == 250


def test_config_names_both_classes(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_compiled.Qwen2ForCausalLM"}
    assert config["max_position_embeddings"] == SHAPE["max_position_embeddings"]
    assert load(artifact).config.max_position_embeddings == 300


def test_a_forward_that_breaks_off_leaves_the_cache_as_it_was_or_refusing(artifact: Path, monkeypatch: Any) -> None:
    """In the first piece of a prompt, in a later one, and in what is counted after them."""
    model = load(artifact)
    monkeypatch.setattr(model, "prefill_chunk", 16)
    pieces = {"first": 0, "second": 1}
    tail = prompt(4, seed=5)
    for count in (10, 40):
        for broken in pieces.values():
            past, other = model.new_cache(), model.new_cache()
            for each in (past, other):
                model(prompt(10), past_key_values=each)
            logits, calls = model.compiled.logits, iter(range(10))

            def break_off(hidden: Tensor, at: int = broken) -> Tensor:
                if next(calls) == at:  # noqa: B023
                    raise KeyboardInterrupt
                return logits(hidden)  # noqa: B023

            compiled = model.compiled
            model.compiled = dataclasses.replace(compiled, logits=break_off)
            if count > 16 * broken:
                with pytest.raises(KeyboardInterrupt):
                    model(prompt(count, seed=1), past_key_values=past)
            model.compiled = compiled
            if count > 16 and broken:
                for use in (
                    lambda: model(tail, past_key_values=past),  # noqa: B023
                    lambda: greedy(model, prompt(60), past_key_values=past),  # noqa: B023
                    lambda: past.reorder_cache(torch.tensor([0])),  # noqa: B023
                    lambda: past.crop(0),  # noqa: B023
                ):
                    with pytest.raises(ValueError, match=r"interrupted in the middle of a call.*reset\(\) it"):
                        use()
                past.reset()
                other = model.new_cache()
            expected = model(tail, past_key_values=other).logits
            assert torch.equal(model(tail, past_key_values=past).logits, expected)
            assert past.get_seq_length() == other.get_seq_length()


def test_another_thread_is_refused_while_generate_uses_a_cache(model: Any) -> None:
    past, raised = model.new_cache(), []

    class Asking:
        def put(self, value: Tensor) -> None:
            def ask() -> None:
                for use in (lambda: model(prompt(3), past_key_values=past), lambda: past.crop(0), past.reset):
                    try:
                        use()
                    except ValueError as error:
                        raised.append(str(error))
                assert "some of" in repr(past)

            thread = threading.Thread(target=ask)
            thread.start()
            thread.join(60)

        def end(self) -> None:
            pass

    out = greedy(model, prompt(), past_key_values=past, streamer=Asking(), max_new_tokens=3)
    assert len(raised) == 4 * 3
    assert all(text.startswith("this cache is in use by another thread; give each thread") for text in raised)
    assert torch.equal(out, greedy(model, prompt(), max_new_tokens=3))


def test_eight_threads_generate_as_each_alone(model: Any) -> None:
    prompts = [prompt(60 + seed, seed) for seed in range(8)]
    expected = [greedy(model, ids, max_new_tokens=8) for ids in prompts]
    found: dict[int, Tensor] = {}

    def write(number: int) -> None:
        found[number] = greedy(model, prompts[number], max_new_tokens=8, past_key_values=model.new_cache())

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(torch.equal(found[number], one) for number, one in enumerate(expected))


def test_a_cache_and_a_model_are_copied_or_say_why_not(model: Any) -> None:
    past = model(prompt(120), past_key_values=model.new_cache()).past_key_values
    expected = greedy(model, torch.cat([prompt(120), prompt(5)], 1), past_key_values=copy.deepcopy(past))
    for twin in (copy.copy(past), pickle.loads(pickle.dumps(past))):
        assert torch.equal(greedy(model, torch.cat([prompt(120), prompt(5)], 1), past_key_values=twin), expected)
    assert past.get_seq_length() == 120
    assert torch.equal(copy.copy(model)(prompt(5)).logits, model(prompt(5)).logits)
    other = copy.deepcopy(model)
    assert next(other.parameters()).data_ptr() != next(model.parameters()).data_ptr()
    assert torch.equal(greedy(other, prompt()), greedy(model, prompt()))
    assert torch.equal(greedy(other.share_memory(), prompt()), greedy(model, prompt()))
    with torch.no_grad():
        other.model.norm.weight.zero_()
    assert not torch.equal(other(prompt(5)).logits, model(prompt(5)).logits), "its weights are its own"
    for refused in (lambda: pickle.dumps(model), lambda: torch.save(model, io.BytesIO())):
        with pytest.raises(NotImplementedError, match="a compiled model is not pickled; copy its folder, "):
            refused()
    torch.save(model.state_dict(), io.BytesIO())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"input_ids": torch.ones(1, 5)}, "input_ids must be integers"),
        ({"input_ids": [[5, 6], [7]]}, "input_ids cannot be read as numbers"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0.5, 1]])}, "attention_mask holds 0.5"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"attention_mask has shape \[1, 1, 5, 5\]"),
        ({"attention_mask": "causal"}, "attention_mask cannot be read as numbers"),
        ({"position_ids": torch.zeros(3, 1, 5, dtype=torch.long)}, "position_ids must be integers"),
        ({"position_ids": torch.arange(4)}, "position_ids must be integers"),
        ({"position_ids": torch.arange(5) + 297}, "position 301 is outside the 0 to 299"),
        ({"position_ids": torch.arange(5) - 1}, "position -1 is outside"),
        ({"logits_to_keep": -1}, "logits_to_keep -1 is negative"),
        ({"logits_to_keep": 1.5}, "logits_to_keep 1.5 is not a whole number"),
        ({"logits_to_keep": torch.tensor([5])}, "logits_to_keep does not list columns among the 5"),
    ],
)
def test_odd_input_is_refused_in_a_sentence(model: Any, arguments: dict[str, Any], words: str) -> None:
    past = model.new_cache()
    with pytest.raises(ValueError, match=words):
        model(**{"input_ids": prompt(5), "past_key_values": past, **arguments})
    assert past.get_seq_length() == past.cache.length[0] == 0
    ids = prompt(5)
    logits = model(ids.tolist(), attention_mask=[[1.0] * 5], position_ids=torch.arange(5).int()).logits
    assert torch.equal(logits, model(ids).logits)
