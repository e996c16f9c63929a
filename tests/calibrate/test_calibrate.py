"""Calibration measures the real model, whatever its architecture, and is not repeated without need."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, AttentionCall, observed, run
from pmkvq_compiler.calibrate.calibration import Calibration, effective_length
from pmkvq_compiler.calibrate.layer_outputs import LayerOutputs
from pmkvq_compiler.calibrate.measure import calibrate
from pmkvq_compiler.calibrate.output_loss import OutputLoss
from pmkvq_compiler.calibrate.storage import calibration_path, load_calibration, load_or_calibrate, save_calibration
from pmkvq_compiler.calibrate.texts import read_samples
from pmkvq_compiler.calibrate.walk import reference_logits, stretched_positions
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.formats import Format
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.problem import Problem, pick_device, resolve
from pmkvq_compiler.recipes import RECIPES
from pmkvq_compiler.runtime.plan import FINAL_BITS
from pmkvq_compiler.source.source import Source, open_source
from tests.folders import TEXT, model_folder
from tests.models import tiny_folder, tiny_model
from tests.plan.test_planner import site

MAX_LEN = 400


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def options(folder: Path, **chosen: Any) -> CompileOptions:
    small = {"budget": "60%", "calib_samples": 2, "calib_len": 80, "block": 32, "window": 64, "device": "cpu"}
    return CompileOptions(model="model", output=folder / "artifact", **{**small, **chosen})


def sites(count: int = 3) -> list[AttentionSite]:
    return [site(layer, num_key_value_heads=2, key_head_dim=16, value_head_dim=16) for layer in range(count)]


def problem(chosen: CompileOptions, some: list[AttentionSite] | None = None, max_len: int = MAX_LEN) -> Problem:
    """What these options ask for of a tiny model."""
    return resolve(chosen, sites() if some is None else some, max_len, torch.float32)


def token_file(path: Path, rows: list[list[int]]) -> str:
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(str(model_folder(tmp_path / "model")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 24}),
        ("gemma2", {"sliding_window": 24, "attn_logit_softcapping": 5.0}),
        ("gpt_oss", {"sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2}),
        ("gpt_neox", {}),
    ],
)
def test_an_observed_model_computes_what_the_model_computes(model_type: str, overrides: dict[str, Any]) -> None:
    model = tiny_model(model_type, **overrides)
    input_ids, positions = torch.randint(3, 128, (1, 90)), stretched_positions(90, 450)
    calls: list[AttentionCall] = []

    def collect(call: AttentionCall) -> None:
        calls.append(call)

    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = run(model, input_ids, positions)
        model.set_attn_implementation(ATTENTION)
        with observed(collect):
            logits = run(model, input_ids, positions)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert [call.layer for call in calls] == [0, 1, 2]
        some = torch.tensor([0, 30, 89])
        for call in calls:
            torch.testing.assert_close(call.at(some).output(), call.output()[..., some, :], rtol=1e-4, atol=1e-5)


def test_the_measured_keys_are_the_ones_that_a_cache_would_hold(source: Source, text: str, tmp_path: Path) -> None:
    chosen = options(tmp_path, calib=text)
    calibration = calibrate(source, problem(chosen), silent)
    model, samples = source.load_model("eager"), torch.stack(read_samples(source, problem(chosen)))
    with torch.no_grad():
        positions = stretched_positions(80, MAX_LEN).expand(2, -1)
        cache = model(samples, position_ids=positions, attention_mask=torch.ones_like(samples)).past_key_values
    for layer, measured in calibration.key_maxima.items():
        torch.testing.assert_close(measured, cache.layers[layer].keys.abs().amax(dim=(0, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 3])
def test_a_short_document_is_stretched_as_much_as_a_whole_sample(source: Source, tmp_path: Path, factor: int) -> None:
    documents = [torch.randint(3, 128, (length,)) for length in (70, 80)]
    calib = tmp_path / "documents.jsonl"
    calib.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in documents))
    chosen = options(tmp_path, calib=str(calib), effective_len=80 * factor)
    calibration = calibrate(source, problem(chosen), silent)
    model, samples = source.load_model("eager"), read_samples(source, problem(chosen))
    assert sorted(map(len, samples)) == [len(samples[0]), 80]
    maxima: dict[int, Tensor] = {}
    with torch.no_grad():
        for sample in samples:
            ids = sample.unsqueeze(0)
            positions = torch.arange(len(sample)).unsqueeze(0) * factor
            cache = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).past_key_values
            for layer in range(3):
                found = cache.layers[layer].keys.abs().amax(dim=(0, 2))
                maxima[layer] = torch.maximum(maxima.get(layer, found), found)
    for layer, measured in calibration.key_maxima.items():
        torch.testing.assert_close(measured, maxima[layer], rtol=1e-4, atol=1e-5)


def total(calibration: Calibration, window: int) -> float:
    """The losses of all layers in all formats of one window."""
    by_layer = [*calibration.key_loss.values(), *calibration.value_loss.values()]
    return sum(loss for losses in by_layer for kept, loss in losses.items() if kept.window == window)


def test_losses_fall_with_the_bits_and_with_the_window(source: Source, text: str, tmp_path: Path) -> None:
    chosen = options(tmp_path, calib=text, calib_len=400, window=None)
    calibration = calibrate(source, problem(chosen), silent)
    for layer in range(3):
        for losses in (calibration.key_loss[layer], calibration.value_loss[layer]):
            kinds = {(kept.axis, kept.transform) for kept in losses}
            for axis, transform in kinds:
                by_bits = [losses[Format(bits, axis, transform, 64)] for bits in (2, 4, 8)]
                assert by_bits[0] > by_bits[1] > by_bits[2] > 0
    assert total(calibration, window=96) < total(calibration, window=64)


def test_each_recipe_measures_what_it_can_choose(source: Source, text: str, tmp_path: Path) -> None:
    for recipe in (name for name, one in RECIPES.items() if one.quantizes):
        calibration = calibrate(source, problem(options(tmp_path, calib=text, recipe=recipe)), silent)
        assert bool(calibration.scales) == ("scale" in RECIPES[recipe].key_transforms)
        assert bool(calibration.key_gradient) == (RECIPES[recipe].measure == "gradient")
        assert {kept.axis for kept in calibration.key_loss[0]} == set(RECIPES[recipe].key_axes)
        assert {kept.bits for kept in calibration.value_loss[2]} == {*FINAL_BITS}


def test_positions_are_spread_over_the_effective_length() -> None:
    positions = stretched_positions(512, 4096)[0]
    assert positions[0] == 0
    assert set(positions.diff().tolist()) == {8}
    assert stretched_positions(100, 250)[0].unique().numel() == 100
    assert stretched_positions(64, 64)[0].tolist() == list(range(64))


def test_the_effective_length_is_max_len_unless_told_and_must_hold_a_text(source: Source, tmp_path: Path) -> None:
    assert effective_length(source, problem(options(tmp_path), max_len=300)) == 300
    assert effective_length(source, problem(options(tmp_path), max_len=10)) == 80
    assert effective_length(source, problem(options(tmp_path, effective_len=128), max_len=300)) == 128
    with pytest.raises(UsageError, match="effective length 60"):
        effective_length(source, problem(options(tmp_path, effective_len=60), max_len=300))
    with pytest.raises(UsageError, match="513 of model, which has 512"):
        effective_length(source, problem(options(tmp_path, effective_len=513), max_len=300))


def test_the_check_logits_are_the_source_models_own(source: Source, text: str, tmp_path: Path) -> None:
    calibration = calibrate(source, problem(options(tmp_path, calib=text)), silent)
    expected = reference_logits(source.load_model("eager"), calibration.check_ids)[-16:]
    assert calibration.check_ids.shape == (1, 80)
    torch.testing.assert_close(calibration.check_logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_with_a_reason_not_to_fold_get_no_scale(source: Source, text: str, tmp_path: Path) -> None:
    some = [replace(one, reason="no RoPE" if one.layer == 1 else None) for one in sites()]
    calibration = calibrate(source, problem(options(tmp_path, calib=text, recipe="pm-kvq"), some), silent)
    assert set(calibration.scales) == set(calibration.alphas) == {0, 2}
    transforms = [
        {kept.transform for kept in calibration.key_loss[layer] if kept.axis == "token"} for layer in range(3)
    ]
    assert transforms == [{"scale"}, {"none"}, {"scale"}]


def test_recipe_none_runs_the_model_for_the_check_alone(source: Source, text: str, tmp_path: Path) -> None:
    stages: list[str] = []
    chosen = options(tmp_path, calib=text, recipe="none")
    calibration = calibrate(source, problem(chosen), lambda stage, done, total: stages.append(stage))
    assert not stages
    assert not calibration.scales
    assert calibration.check_logits.shape == (16, 128)


def test_builtin_text_is_long_enough_and_apart_from_the_heldout_one(source: Source, tmp_path: Path) -> None:
    samples = read_samples(source, problem(options(tmp_path, calib_samples=64, calib_len=2048)))
    assert [sample.shape for sample in samples] == [(2048,)] * 64
    data = Path(__file__).parent.parent.parent / "pmkvq_compiler" / "data"
    calibration, heldout = (
        {line for line in (data / name).read_text().splitlines() if len(line) > 60}
        for name in ("calibration.txt", "heldout.txt")
    )
    assert len(heldout) > 500
    assert len(calibration & heldout) < 0.01 * len(heldout)  # stock phrases of the mathematics


def test_json_lines_may_hold_text_or_tokens(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "' + "a" * 90 + '"}\n\n{"input_ids": ' + str([98] * 85) + "}\n")
    samples = read_samples(source, problem(options(tmp_path, calib=str(path))))
    assert [sample.tolist() for sample in samples] == [[97] * 80, [98] * 80]


def test_json_lines_end_where_lines_end(source: Source, tmp_path: Path) -> None:
    """A byte order mark, carriage returns, and characters that only Python's splitlines takes for line ends."""
    path = tmp_path / "lines.jsonl"
    body = "a" * 30 + "\u2028" + "b" * 30 + "\x85" + "c" * 30
    path.write_bytes(b"\xef\xbb\xbf" + (json.dumps({"text": body}, ensure_ascii=False) + "\r\n").encode() * 2)
    assert len(read_samples(source, problem(options(tmp_path, calib=str(path))))) == 2


def test_a_tokenizer_of_another_model_is_named(source: Source, text: str, tmp_path: Path) -> None:
    source.config.vocab_size = 100
    with pytest.raises(CompileError, match=r"tokenizer of model makes token 119 .* has 100 tokens"):
        read_samples(source, problem(options(tmp_path, calib=text)))


@pytest.mark.parametrize("name", ["meta", "cpu:-1", "gpu", "", "mps", "privateuseone", "cuda:99", "cuda:" + "9" * 30])
def test_a_device_that_cannot_run_a_model_is_named(name: str) -> None:
    with pytest.raises(UsageError, match=f"device '{name}' cannot .*choose auto, cpu or cuda"):
        pick_device(name)


def test_documents_of_half_a_sample_stand_alone_and_shorter_ones_are_joined(source: Source, tmp_path: Path) -> None:
    calib = token_file(tmp_path / "lines.jsonl", [[7] * 50, [8] * 30, [9] * 30, [10] * 30])
    samples = read_samples(source, problem(options(tmp_path, calib=calib)))
    assert [sample.tolist() for sample in samples] == [[7] * 50, [8] * 30 + [9] * 30 + [10] * 20]


def test_every_sample_begins_as_the_tokenizer_begins_a_text(source: Source, text: str, tmp_path: Path) -> None:
    assert source.tokenizer is not None
    source.tokenizer.add_special_tokens({"bos_token": "<"})
    source.tokenizer._tokenizer.post_processor = TemplateProcessing(  # type: ignore[attr-defined]
        single="< $A", special_tokens=[("<", ord("<"))]
    )
    samples = read_samples(source, problem(options(tmp_path, calib=text)))
    assert [sample[0].item() for sample in samples] == [ord("<")] * 2
    assert all(ord("<") not in sample[1:] for sample in samples)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("short.txt", b"too short", "9 tokens, and 2 samples of 80 need 160"),
        ("latin.txt", b"caf\xe9" * 100, "not UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\nnonsense\n', "line 2, is not JSON"),
        ("other.jsonl", b'{"title": "a"}\n', 'line 1, has no "text"'),
        ("ids.jsonl", b'{"input_ids": [1, 128]}\n', "whole numbers below 128"),
        ("words.jsonl", b'{"input_ids": ["a"]}\n', "whole numbers below 128"),
        ("chat.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', "chat template"),
        ("deep.jsonl", b"[" * 100_000, "line 1, is not JSON"),
        ("truths.jsonl", b'{"input_ids": [true, false]}\n', "whole numbers below 128"),
        ("digits.jsonl", b'{"input_ids": [' + b"9" * 5000 + b"]}\n", "line 1, is not JSON"),
        ("half.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2, has text that is not Unicode"),
    ],
)
def test_bad_calibration_data_is_named(source: Source, tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompileError, match=reason) as caught:
        read_samples(source, problem(options(tmp_path, calib=str(tmp_path / name))))
    assert name in str(caught.value)


def test_a_missing_calibration_text_is_named(source: Source, tmp_path: Path) -> None:
    for name, reason in (("nowhere.txt", "No such file"), (str(tmp_path), "Is a directory"), ("\0", "null byte")):
        with pytest.raises(CompileError, match=reason):
            read_samples(source, problem(options(tmp_path, calib=name)))


def test_a_model_without_tokenizer_needs_tokens(tmp_path: Path) -> None:
    source = open_source(str(tiny_folder(tmp_path / "model", "llama")))
    with pytest.raises(CompileError, match=r"no tokenizer.*input_ids"):
        read_samples(source, problem(options(tmp_path)))
    calib = token_file(tmp_path / "tokens.jsonl", [[5] * 80, [6] * 80])
    samples = read_samples(source, problem(options(tmp_path, calib=calib)))
    assert [sample.tolist() for sample in samples] == [[5] * 80, [6] * 80]


def test_texts_that_hold_no_block_are_wrong_usage(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="35 tokens hold no block of 32"):
        read_samples(source, problem(options(tmp_path, calib_len=35)))


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    calib = token_file(tmp_path / "tokens.jsonl", [[5] * 80, [6] * 80])
    with pytest.raises(CompileError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        calibrate(open_source(str(tmp_path / "model")), problem(options(tmp_path, calib=calib)), silent)


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        ("layers.1.self_attn.q_proj", "queries of layer 1"),
        ("layers.2.self_attn.k_proj", "keys of layer 2"),
        ("layers.0.self_attn.v_proj", "values of layer 0"),
        ("layers.1.mlp.down_proj", "queries of layer 2"),
        ("layers.2.mlp.down_proj", "logits"),
    ],
)
@pytest.mark.parametrize("recipe", ["best", "pm-kvq", "none"])
def test_numbers_that_overflow_inside_the_model_name_their_layer(
    tmp_path: Path, weight: str, what: str, recipe: str
) -> None:
    model = tiny_model("llama")
    model.model.get_submodule(weight).weight.data.fill_(3e38)  # finite, but no sum of them is
    model.save_pretrained(tmp_path / "model")
    chosen = options(tmp_path, recipe=recipe, calib=token_file(tmp_path / "tokens.jsonl", [[5] * 80, [6] * 80]))
    with pytest.raises(CompileError, match=f"the {what} are not finite in float32.*--dtype"):
        load_or_calibrate(open_source(str(tmp_path / "model")), problem(chosen), chosen.output, silent)
    assert not list(tmp_path.glob("*.calibration.safetensors")), "nothing of it stays on disk"


@pytest.mark.parametrize("measured", [float("nan"), float("inf")])
def test_losses_that_overflow_name_their_layer(
    source: Source, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: float
) -> None:
    def overflow(self: OutputLoss, call: AttentionCall, *_: Tensor) -> None:
        if call.layer == 1:
            self.value[1] = dict.fromkeys(self.value[1], measured)

    monkeypatch.setattr(OutputLoss, "_add", overflow)
    with pytest.raises(CompileError, match="layer 1 would lose with values at 8 bits cannot be measured"):
        calibrate(source, problem(options(tmp_path, calib=text)), silent)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, LayerOutputs):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def equal(one: Calibration, other: Calibration) -> bool:
    return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(Calibration))


def test_a_calibration_survives_its_file(source: Source, text: str, tmp_path: Path) -> None:
    calibration = calibrate(source, problem(options(tmp_path, calib=text)), silent)
    save_calibration(calibration, tmp_path / "new folder" / "file.safetensors")
    assert equal(load_calibration(tmp_path / "new folder" / "file.safetensors"), calibration)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["file.safetensors"]


def test_another_budget_runs_the_model_no_more(source: Source, text: str, tmp_path: Path) -> None:
    stages: list[str] = []

    def watched(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    chosen = options(tmp_path, calib=text, budget="25%")
    first = load_or_calibrate(source, problem(chosen), chosen.output, watched)
    assert stages
    stages.clear()
    other = replace(chosen, budget="30%", batch_size=4)
    again = load_or_calibrate(source, problem(other), other.output, watched)
    assert not stages
    assert equal(again, first)


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": "uniform"},
        {"window": 96},
        {"calib_samples": 3},
        {"calib_len": 96},
        {"bits": (8, 4)},
        {"block": 48},
        {"effective_len": 200},
    ],
)
def test_whatever_a_calibration_depends_on_makes_another_one(
    source: Source, text: str, tmp_path: Path, other: dict[str, Any]
) -> None:
    chosen = options(tmp_path, calib=text)
    for each in (chosen, replace(chosen, **other)):
        load_or_calibrate(source, problem(each), each.output, silent)
    assert len(list(tmp_path.glob("model-*.calibration.safetensors"))) == 2


def test_a_damaged_calibration_file_is_made_again(
    source: Source, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = options(tmp_path, calib=text)
    first = load_or_calibrate(source, problem(chosen), chosen.output, silent)
    path = calibration_path(chosen.output, "model", first.fingerprint)
    path.write_bytes(path.read_bytes()[:-100])
    again = load_or_calibrate(source, problem(chosen), chosen.output, silent)
    assert "damaged" in caplog.text
    assert equal(load_calibration(path), again)


def test_a_dry_run_writes_no_calibration(source: Source, text: str, tmp_path: Path) -> None:
    chosen = options(tmp_path, calib=text)
    load_or_calibrate(source, problem(chosen), chosen.output, silent, dry_run=True)
    assert not list(tmp_path.glob("*.calibration.safetensors"))
