"""Bad input ends in one sentence that says what is wrong, and leaves the folder as it was. So does an interrupt."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from pmkvq_compiler.cli import main
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from tests.folders import TEXT, model_folder, tree
from tests.fuzz import LONG_ONLY

SMALL = ["--max-len", "256", "--window", "64", "--sink", "4", "--calib-samples", "2", "--calib-len", "96"]
BUDGET = ["--budget", "70%"]

Complaint = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def interruptible() -> None:
    """A shell that runs tests in the background has SIGINT ignored, and a child inherits that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def complaint(place: Path, capsys: pytest.CaptureFixture[str]) -> Complaint:
    """Run a command that must fail; its one sentence, after a check that the current folder is as it was."""

    def run(*arguments: str | Path, code: int) -> str:
        before = tree(place)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        shown = capsys.readouterr()
        assert tree(place) == before
        assert shown.out == ""
        assert "Traceback" not in shown.err
        (sentence,) = [line for line in shown.err.splitlines() if line.startswith("pmkvq-compile: ")]
        return sentence

    return run


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "tiny-llama", num_hidden_layers=1)


@pytest.mark.parametrize("name", ["./no-such-folder", "/no/such/model.gguf"])
def test_unknown_model(complaint: Complaint, name: str) -> None:
    assert f"model {name!r} does not exist" in complaint(name, *BUDGET, code=1)


def test_unknown_hub_model(complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "model 'nobody/no-such-model'" in complaint("nobody/no-such-model", *BUDGET, code=1)


def test_encoder_only_model(complaint: Complaint, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bert")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=64, **shape)).save_pretrained(folder)
    assert "only causal language models have a KV cache" in complaint(folder, *BUDGET, code=1)


def test_model_without_rope_compiles_without_fold(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = model_folder(tmp_path_factory.mktemp("gpt2"), "gpt2")
    options = CompileOptions(
        str(folder), place / "out", "70%", max_len=256, window=64, calib_samples=2, calib_len=96, dry_run=True
    )
    result = compile_model(options, lambda stage, done, total: None)
    assert len(result.report.rows) == 3
    assert all(row.fold != "folded" and row.fold for row in result.report.rows)


def test_infeasible_budget_names_the_smallest_feasible(complaint: Complaint, model: Path) -> None:
    sentence = complaint(model, "--budget", "1KiB", *SMALL, code=1)
    smallest = int(re.findall(r"(\d[\d,]*) bytes", sentence)[-1].replace(",", ""))
    assert main([str(model), "--budget", f"{smallest}bytes", *SMALL, "--dry-run"]) == 0
    complaint(model, "--budget", f"{smallest - 1}bytes", *SMALL, code=1)


def test_max_len_beyond_the_positions(complaint: Complaint, model: Path) -> None:
    sentence = complaint(model, *BUDGET, "--max-len", "4096", code=2)
    assert "4,096" in sentence or "4096" in sentence
    assert "512" in sentence


def test_nan_weights(complaint: Complaint, model: Path) -> None:
    file = model / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.0.self_attn.k_proj.weight has NaN" in complaint(model, *BUDGET, *SMALL, code=1)


def test_truncated_weights(complaint: Complaint, model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert f"{file} cannot be read" in complaint(model, *BUDGET, *SMALL, code=1)


def test_pickled_weights_are_not_loaded(complaint: Complaint, model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "no pickle is ever loaded" in complaint(model, *BUDGET, *SMALL, code=1)


def test_output_that_is_not_empty(complaint: Complaint, model: Path, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "letter.txt").write_text("mine")
    assert "--force" in complaint(model, *BUDGET, *SMALL, "-o", "out", code=2)


def test_output_that_is_a_file(complaint: Complaint, model: Path, place: Path) -> None:
    (place / "out").write_text("mine")
    assert "is a file" in complaint(model, *BUDGET, *SMALL, "-o", "out", "--force", code=2)


@pytest.mark.parametrize("content", ["Too short.", ""])
def test_calibration_text_that_is_too_short(complaint: Complaint, model: Path, place: Path, content: str) -> None:
    (place / "text.txt").write_text(content)
    sentence = complaint(model, *BUDGET, *SMALL, "--calib", "text.txt", code=1)
    assert "text.txt" in sentence


def test_calibration_file_that_is_missing(complaint: Complaint, model: Path) -> None:
    assert "text.txt" in complaint(model, *BUDGET, *SMALL, "--calib", "text.txt", code=1)


def test_calibration_file_that_is_no_text(complaint: Complaint, model: Path, place: Path) -> None:
    (place / "text.txt").write_bytes(b"\xff\xfe\x00" * 2000)
    assert "text.txt" in complaint(model, *BUDGET, *SMALL, "--calib", "text.txt", code=1)


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--window", "32", "a window that holds at least one block of 64"),
        ("--effective-len", "80", "effective length 80 is less than the 96 tokens"),
        ("--calib-len", "32", "calibration texts of 32 tokens hold no block"),
        ("--device", "gpu", "device 'gpu' cannot be used"),
        ("--device", "cuda:99", "device 'cuda:99' cannot be used"),
    ],
)
def test_value_that_does_not_fit_the_rest(complaint: Complaint, model: Path, flag: str, value: str, words: str) -> None:
    assert words in complaint(model, *BUDGET, *SMALL, flag, value, code=2)


def compile_options(model: Path, output: Path, calibration: Path) -> CompileOptions:
    return CompileOptions(
        model=str(model),
        output=output,
        budget="70%",
        max_len=256,
        window=64,
        sink=4,
        calib=str(calibration),
        calib_samples=2,
        calib_len=96,
        force=True,
    )


def test_interrupt_in_every_stage_leaves_the_target_as_it_was(model: Path, place: Path) -> None:
    text = place / "text.txt"
    text.write_text(TEXT)
    stages: dict[str, None] = {}
    compile_model(compile_options(model, place / "first", text), lambda stage, done, total: stages.setdefault(stage))
    assert len(stages) >= 3
    existing = tree(place / "first")
    for number, stage in enumerate(stages):

        def interrupt(now: str, done: int, total: int, at: str = stage) -> None:
            if now == at:
                signal.raise_signal(signal.SIGINT)

        # Another text each time, so that no calibration of an earlier compile spares a stage.
        text.write_text(f"{stage} {TEXT}")
        target = ("absent", "first")[number % 2]
        with pytest.raises(KeyboardInterrupt):
            compile_model(compile_options(model, place / target, text), interrupt)
        assert not (place / "absent").exists(), stage
        assert tree(place / "first") == existing, stage
        assert [path.name for path in place.iterdir() if "partial" in path.name] == [], stage


@pytest.mark.parametrize(
    ("number", "times", "word"),
    [
        (signal.SIGINT, 30, "interrupted"),  # somebody is impatient
        pytest.param(signal.SIGTERM, 1, "terminated", marks=LONG_ONLY),
    ],
)
def test_interrupted_command_says_so_in_one_line(
    model: Path, place: Path, number: signal.Signals, times: int, word: str
) -> None:
    command = [sys.executable, "-m", "pmkvq_compiler.cli", str(model), *BUDGET, *SMALL, "-o", "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not any("partial" in path.name for path in place.iterdir()):
            time.sleep(0.01)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.02)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.splitlines()[-1] == f"pmkvq-compile: {word}; nothing was changed"
    assert "Traceback" not in err
    assert out == ""
    assert tree(place) == {}


MARK = "from pathlib import Path\nPath({!r}).write_text('it ran')\n"


def plant_code(folder: Path, mark: Path) -> None:
    """Put code that would leave a mark into every place of a model's folder from which code has been run."""
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "torch.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(MARK.format(str(mark)))
    names = {
        "config.json": {
            "AutoConfig": "configuration_x.XConfig",
            "AutoModelForCausalLM": "modeling_x.XForCausalLM",
            "AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizerFast"],
        },
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_x.XTokenizer", "tokenization_x.XTokenizerFast"]},
        "generation_config.json": {"custom_generate": "."},
    }
    for name, auto_map in names.items():
        values = json.loads((folder / name).read_text())
        values |= {"auto_map": auto_map, "attn_implementation": "somebody/kernels", "custom_generate": str(folder)}
        (folder / name).write_text(json.dumps(values))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def run_command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The real command with a user's environment, who answers yes to every question."""
    command = [sys.executable, "-m", "pmkvq_compiler.cli", *map(str, arguments)]
    environment = {name: os.environ[name] for name in ("HOME", "PATH")} | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, input="y\n" * 50, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False
    )


def test_a_model_that_transformers_knows_is_compiled_without_its_own_code(model: Path, place: Path) -> None:
    plant_code(model, place / "mark")
    done = run_command(model, "--recipe", "none", *SMALL, "-o", place / "out", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(place / "out")
    assert "code" not in done.stderr
    assert not (place / "mark").exists()
    assert "auto_map" not in json.loads((place / "out" / "tokenizer_config.json").read_text())
    assert "custom_generate" not in json.loads((place / "out" / "generation_config.json").read_text())
    assert not any((place / "out" / name).exists() for name in ("modeling_x.py", "custom_generate"))


def test_a_model_that_needs_its_own_code_is_refused_without_a_question(model: Path, place: Path) -> None:
    plant_code(model, place / "mark")
    edit_json(model / "config.json", model_type="x")
    done = run_command(model, *BUDGET, *SMALL, "-o", place / "out", "--json", cwd=place)
    assert done.returncode == 1
    assert done.stdout == ""
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("pmkvq-compile: ")]
    assert "needs Python code of its own, and code of a checkpoint is never run" in sentence
    assert list(place.iterdir()) == []


def test_a_tokenizer_that_needs_its_own_code_is_refused(complaint: Complaint, model: Path, place: Path) -> None:
    plant_code(model, place / "mark")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    edit_json(model / "tokenizer_config.json", tokenizer_class="XTokenizer")
    sentence = complaint(model, *BUDGET, *SMALL, code=1)
    assert "the tokenizer of tiny-llama" in sentence
    assert "never run" in sentence


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("config.json", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("config.json", {"vocab_size": 10**12}, "vocab_size"),
        ("config.json", {"hidden_size": -64}, "hidden_size"),
        ("config.json", {"model_type": "mamba"}, "mamba"),
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, "stored quantized"),
        ("generation_config.json", {"early_stopping": 3}, "early_stopping"),
        ("tokenizer.json", {"model": {"type": "Whale"}}, "the tokenizer of tiny-llama"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Split"}}, "the tokenizer of tiny-llama"),
    ],
)
def test_damaged_facts_of_a_model(
    complaint: Complaint, model: Path, file: str, changes: dict[str, object], words: str
) -> None:
    edit_json(model / file, **changes)
    assert words in complaint(model, *BUDGET, *SMALL, code=1)


def test_a_tokenizer_of_another_model(complaint: Complaint, model: Path) -> None:
    """Its tokens are beyond the vocabulary, which nothing but a text that has them would show."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["e"] = 4000
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = complaint(model, *BUDGET, *SMALL, code=1)
    assert "token 4,000" in sentence
    assert "128" in sentence


def test_stripped_quantization(complaint: Complaint, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.v_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, model / "model.safetensors")
    assert f"weight {name} is stored in F8_E4M3" in complaint(model, *BUDGET, *SMALL, code=1)


def test_weights_beyond_float16(complaint: Complaint, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(weights, model / "model.safetensors")
    sentence = complaint(model, *BUDGET, *SMALL, "--dtype", "float16", code=1)
    assert "model.layers.0.mlp.down_proj.weight reaches 1e+05, more than float16 holds" in sentence
