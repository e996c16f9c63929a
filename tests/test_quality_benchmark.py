"""The quality benchmark measures what it says, with a model that takes no time."""

from __future__ import annotations

import csv
import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pmkvq_compiler.source.source import open_source

from .folders import TEXT, model_folder

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quality")


@pytest.mark.parametrize(
    ("measured", "tau"), [([1, 2, 3, 4], 1), ([4, 3, 2, 1], -1), ([1, 2, 4, 3], 4 / 6), ([1, 1, 2, 3], 5 / 6)]
)
def test_kendalls_tau_is_pairs_in_order_less_pairs_out_of_it(
    quality: ModuleType, measured: list[float], tau: float
) -> None:
    pairs = list(enumerate(measured))
    random.Random(0).shuffle(pairs)
    assert quality.kendall_tau(pairs) == pytest.approx(tau)


def test_the_interval_of_paired_differences_is_narrower_than_that_of_either(quality: ModuleType) -> None:
    first = [index % 2 for index in range(48)]
    second = [value if index else 1 - value for index, value in enumerate(first)]
    low, high = quality.paired_interval([a - b for a, b in zip(first, second, strict=True)])
    assert -0.1 < low <= -1 / 48 <= high < 0.05
    low, high = quality.paired_interval(first)
    assert high - low > 0.2


def test_chains_are_right_or_wrong_and_the_artifact_decodes_them_as_scored(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, own_continuations(folder))))
    quality.main(
        [
            *("--model", str(folder), "--problems", str(tmp_path / "problems.jsonl"), "--dtype", "float32"),
            *("--calib", str(tmp_path / "text.txt"), "--calib-len", "256", "--calib-samples", "2"),
            *("--recipes", "best,uniform", "--budgets", "17bits", "--decode", "2"),
            *("--output", str(tmp_path / "out")),
        ]
    )
    printed = capsys.readouterr().out
    assert printed.count("agree\n") == 2, "an artifact does not have the format that baselines are scored in"
    assert "differ" not in printed
    with (tmp_path / "out" / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == ["full precision", "best", "uniform"]
    full, *quantized = rows
    assert (float(full["exact"]), float(full["divergence"])) == (1, 0)
    for row in quantized:
        assert float(row["true_bits"]) <= 17
        assert float(row["divergence"]) > 0
        assert (float(row["exact"]) == 1) == (row["first_error"] == "nan")
    assert "Kendall's tau" in (tmp_path / "out" / "quality.md").read_text()
    assert (tmp_path / "out" / "quality.svg").is_file()


def test_the_own_problems_are_drawn_whatever_the_calibration_is(quality: ModuleType, tmp_path: Path) -> None:
    arguments = quality._arguments(["--calib", str(tmp_path / "text.txt"), "--count", "3"])
    bench = quality.Bench.__new__(quality.Bench)
    bench.arguments, bench.source = arguments, open_source(arguments.model, "auto")
    assert len(bench._items()) == 3


@torch.no_grad()
def own_continuations(folder: Path) -> list[dict[str, str]]:
    """Prompts and the chains that the model at full precision goes on with, one character a token."""
    model, problems = open_source(str(folder), "float32").load_model("sdpa"), []
    for prompt in ("The whale swam on, ", "fog and "):
        ids = torch.tensor([[ord(character) for character in prompt]])
        found = model.generate(ids, max_new_tokens=300 - ids.shape[1], do_sample=False, eos_token_id=None)
        problems.append({"prompt": prompt, "chain": "".join(map(chr, found[0, ids.shape[1] :].tolist()))})
    return problems
