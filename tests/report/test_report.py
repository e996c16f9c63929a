"""The report: self-contained, complete, and its curve is what the runtime's cache does."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pmkvq_compiler.cli import parse
from pmkvq_compiler.formats import Transform
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.report.charts import filling_chart, plan_chart, readable_bytes
from pmkvq_compiler.report.contents import Report, ReportRow, bytes_over_tokens, reproduction_command, serving
from pmkvq_compiler.report.page import grouped_reasons, layer_ranges, write_report
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.plan import CachePlan, original_bytes
from tests.runtime.plans import cache_plan, layer_plan

REASON = "no <RoPE> between key projection and attention"


def sample_plan(batch_size: int = 1) -> CachePlan:
    """Layers that end at different bits, one with a sliding window, one whose keys are grouped by channel."""
    layers = [
        layer_plan(batch_size=batch_size),
        layer_plan(batch_size=batch_size, key_bits=8, value_bits=4, key_axis="channel"),
        layer_plan(batch_size=batch_size, key_bits=2, value_bits=2, sliding_window=256),
    ]
    return cache_plan(*layers, batch_size=batch_size)


def sample_rows(plan: CachePlan) -> list[ReportRow]:
    folds: list[tuple[str, Transform]] = [("folded", "scale"), (REASON, "none"), (REASON, "none")]
    return [
        ReportRow(
            layer=index,
            key_bits=layer.key_bits,
            value_bits=layer.value_bits,
            key_axis=layer.key_axis,
            key_transform=transform,
            value_transform="rotate",
            window=layer.window,
            arena_bytes=layer.arena_bytes,
            sensitivity=0.1 * (index + 1),
            fold=fold,
            value_fold="folded",
        )
        for index, (layer, (fold, transform)) in enumerate(zip(plan.layers, folds, strict=True))
    ]


def sample_report(plan: CachePlan) -> Report:
    return Report(
        model="some.gguf",
        name="some/<model>",
        recipe=plan.recipe,
        budget=plan.budget,
        max_len=plan.max_len,
        batch_size=plan.batch_size,
        dtype=plan.dtype,
        aot=[],
        versions={"torch": "2.13.0"},
        command="pmkvq-compile some/model --budget 1MiB",
        rows=sample_rows(plan),
        arena_bytes=plan.arena_bytes,
        original_bytes=sum(original_bytes(layer, plan.max_len) for layer in plan.layers),
        true_bits=4.5,
        predicted_loss=0.6,
        serving=serving(plan),
        bytes_over_tokens=bytes_over_tokens(plan),
        check={"full_precision_error": 1.23456e-7, "planned_precision_kl": 0.0123},
        seconds={"capture": 1.25},
    )


@pytest.mark.parametrize("batch_size", [1, 2])
def test_curve_is_what_the_cache_does(batch_size: int) -> None:
    plan = sample_plan(batch_size)
    expected = {sample["tokens"]: sample for sample in bytes_over_tokens(plan, samples=plan.max_len)}
    cache = Cache(plan, batch_size, plan.max_len, torch.float32, torch.device("cpu"))
    token = torch.randn(3, 1, 64)
    assert sorted(expected) == list(range(plan.max_len + 1))
    for tokens in range(1, plan.max_len + 1):
        for layer in cache.layers:
            for sequence in range(batch_size):
                layer.append(sequence, token, token)
        assert cache.bytes_used == expected[tokens]["used"]
        assert [list(bits) for bits in cache.bits] == expected[tokens]["bits"]
    assert cache.bits == [(layer.key_bits, layer.value_bits) for layer in plan.layers]


def test_curve_of_a_long_plan_is_sampled_from_nothing_to_max_len() -> None:
    plan = sample_plan()
    tokens = [sample["tokens"] for sample in bytes_over_tokens(plan, samples=16)]
    assert tokens[0] == 0
    assert tokens[-1] == plan.max_len
    assert len(tokens) == 17


def test_report_json_holds_the_report(tmp_path: Path) -> None:
    report = sample_report(sample_plan())
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))


def test_report_json_has_the_fields_of_the_report_in_their_order_and_none_that_is_empty() -> None:
    report = sample_report(sample_plan())
    names = [field.name for field in fields(Report)]
    assert list(report.to_json()) == names
    assert list(report.to_json()["rows"][0]) == [field.name for field in fields(ReportRow)]
    assert list(replace(report, check=None, seconds=None).to_json()) == names[:-2]


def test_html_needs_nothing_from_the_network(tmp_path: Path) -> None:
    write_report(sample_report(sample_plan()), tmp_path)
    page = (tmp_path / "report.html").read_text()
    addresses = set(re.findall(r"https?://[^\"' )]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}, "the name of the SVG namespace is the only address"
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page


def test_html_shows_layers_reasons_figures_and_command(tmp_path: Path) -> None:
    report = sample_report(sample_plan())
    write_report(report, tmp_path)
    text = _Text()
    text.feed((tmp_path / "report.html").read_text())
    shown = " ".join(" ".join(text.content).split())
    assert shown.count("some/<model>") == 2, "in the title and above the page"
    assert f"multiplied by it in the query's. folded layers 0 not folded layers 1-2: {REASON}" in shown
    assert "its inverse in the output projection. folded layers 0-2" in shown
    assert "1.23e-07" in shown
    assert report.command in shown
    assert f"{report.rows[0].arena_bytes:,}" in shown


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.content: list[str] = []

    def handle_data(self, data: str) -> None:
        self.content.append(data)


def test_charts_are_well_formed_and_name_every_layer() -> None:
    report = sample_report(sample_plan())
    plan = ElementTree.fromstring(plan_chart(report.rows))
    filling = ElementTree.fromstring(filling_chart(report.bytes_over_tokens, report.budget))
    titles = [title.text or "" for title in plan.iter("{http://www.w3.org/2000/svg}title")]
    assert "layer 1: K 8 bits" in titles
    assert "layer 2: V 2 bits" in titles
    falls = [title.text or "" for title in filling.iter("{http://www.w3.org/2000/svg}title")]
    assert any(re.fullmatch(r"layer 0: V 2 bits from \d+ to 600 tokens", title) for title in falls)


def test_reasons_are_said_once() -> None:
    one, *_ = sample_rows(sample_plan())
    rows = [replace(one, layer=layer, fold=fold) for layer, fold in enumerate(["a", "folded", "a", "a", "b"])]
    assert grouped_reasons(rows) == {"a": "0, 2-3", "b": "4"}
    assert layer_ranges([]) == ""


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (22 << 20, "22.0 MiB"), (5 << 40, "5.0 TiB")]
)
def test_readable_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    "options",
    [
        CompileOptions("demo", Path("out"), budget="22MiB"),
        CompileOptions("a b", Path("x y"), budget="25%", max_len=64, bits=(4, 2), sink=0, window=64, force=True),
        CompileOptions("m", Path("o"), recipe="none", calib="my text.jsonl", dtype="float32", device="cuda:1"),
    ],
)
def test_reproduction_command_gives_the_same_options(options: CompileOptions) -> None:
    name, *arguments = shlex.split(reproduction_command(options))
    assert name == "pmkvq-compile"
    assert parse(arguments).options == options
