"""Writes the report of a compile: `report.json` for programs, and `report.html`, a self-contained page for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pmkvq_compiler.report.charts import (
    NAMES,
    comparison_chart,
    filling_chart,
    layers_chart,
    plan_chart,
    readable_bytes,
)
from pmkvq_compiler.report.contents import Report, ReportRow

CHECKS = {
    "largest_layer_error": (
        "largest error of a layer",
        "relative norm of the difference from the source model's layer, each layer on its own and in float32; folds "
        "and generated code cause it",
    ),
    "full_precision_error": (
        "error before quantization",
        "relative norm of the logits' difference in one call, in which K and V are not yet quantized; folds, generated "
        "code and rounding cause it",
    ),
    "planned_precision_error": (
        "error at the final bits",
        "the same for a text that goes through the cache piece by piece, with all layers at their final bits",
    ),
    "planned_precision_kl": (
        "nats of divergence at the final bits",
        "mean KL divergence of the next token's distribution from the source model's; 0 means no difference",
    ),
}
"""The names and meanings of the check's figures, in the order in which they are shown."""

FOLDS = {
    "fold": (
        "Scales of K",
        "The key projection divides each channel by a scale, and the query projection multiplies by it.",
    ),
    "value_fold": (
        "Map of V",
        "The value projection multiplies each head by a matrix, and the output projection multiplies by its inverse.",
    ),
}
"""The names and meanings of the folds, by the field of `ReportRow` that says whether they were made."""


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.json` and `report.html` into `folder`; returns the files."""
    templates = Environment(
        loader=PackageLoader("pmkvq_compiler.templates", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = templates.get_template("report.html.j2").render(
        report=report,
        facts=facts(report),
        checks=checks(report.check or {}),
        folds=folds(report.rows),
        plan_chart=Markup(plan_chart(report.rows)),
        comparison_chart=Markup(comparison_chart(report.original_bytes, report.arena_bytes)),
        layers_chart=Markup(layers_chart(report.rows, report.bytes_over_tokens)),
        filling_chart=Markup(filling_chart(report.bytes_over_tokens, report.budget)),
        names=NAMES,
        readable_bytes=readable_bytes,
        figure=figure,
    )
    pages = {folder / "report.json": json.dumps(report.to_json()) + "\n", folder / "report.html": page}
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return list(pages)


def facts(report: Report) -> list[tuple[str, str, str]]:
    """The most important figures, as (name, value, remark)."""
    reserved, budget, original = report.arena_bytes, report.budget, report.original_bytes
    tokens = f"{report.batch_size} x {report.max_len:,} tokens"
    found = [
        ("reserved", readable_bytes(reserved), f"{reserved / budget:.1%} of a budget of {readable_bytes(budget)}"),
        ("16-bit cache", readable_bytes(original), f"for {tokens}, {original / reserved:.1f} times as much"),
        ("dtype", report.dtype, "of the weights, and of the tokens in sink and window"),
        ("true bits a number", f"{report.true_bits:.2f}", "on average, with parameters, sink and window"),
        (
            "predicted loss",
            figure(report.predicted_loss),
            "nats a token at the final bits, with errors doubled; use it to compare budgets",
        ),
    ]
    if report.state_bytes:
        states = f"for {report.batch_size} sequence(s) of any length, beside the budget"
        found.append(("recurrent states", readable_bytes(report.state_bytes), states))
    if report.serving is not None:
        found.append(("vLLM's cache", readable_bytes(report.serving.cache_bytes), f"for {tokens}, in whole blocks"))
        sequences = f"{report.serving.sequences_per_gib:,.1f} sequences of {report.max_len:,}, at the final bits"
        found.append(("tokens in a GiB of vLLM", f"{report.serving.tokens_per_gib:,}", sequences))
    return found


def folds(rows: Sequence[ReportRow]) -> list[tuple[str, str, str, dict[str, str]]]:
    """The folds as (name, meaning, layers that have it, {reason why not: layers})."""
    return [
        (*text, layer_ranges([row.layer for row in rows if getattr(row, key) == "folded"]), grouped_reasons(rows, key))
        for key, text in FOLDS.items()
    ]


def checks(figures: dict[str, float]) -> list[tuple[str, str, str]]:
    """The figures of the check as (value, name, meaning). Figures that `CHECKS` does not explain come last."""
    known = [(figure(figures[key]), *text) for key, text in CHECKS.items() if key in figures]
    others = [(figure(value), key.replace("_", " "), "") for key, value in figures.items() if key not in CHECKS]
    return known + others


def figure(value: Any) -> str:
    """A figure of the check as text, with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def grouped_reasons(rows: Sequence[ReportRow], key: str = "fold") -> dict[str, str]:
    """The reasons why K (`fold`) or V (`value_fold`) was not folded, each with its layers (`0-3, 7`)."""
    layers: dict[str, list[int]] = {}
    for row in rows:
        reason = getattr(row, key)
        if reason != "folded":
            layers.setdefault(reason, []).append(row.layer)
    return {reason: layer_ranges(numbers) for reason, numbers in layers.items()}


def layer_ranges(layers: list[int]) -> str:
    """`0-3, 7` for [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
