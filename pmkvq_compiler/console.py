"""What the command line shows: progress, tables, JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from pmkvq_compiler.compile import CompileResult
    from pmkvq_compiler.explore import Explored
    from pmkvq_compiler.progress import Progress
    from pmkvq_compiler.report.contents import ReportRow


BAR = 30
"""Characters of the longest bar."""


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """One bar a step on stderr, in the order in which steps first report."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers has bars of its own, which would mix with ours
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step)
            bars.update(tasks[step], completed=done, total=total)

        yield progress


def print_json(result: CompileResult | list[Explored]) -> None:
    if isinstance(result, list):
        print(json.dumps([asdict(explored) for explored in result], indent=2))
        return
    report = result.report.to_json()
    del report["bytes_over_tokens"]
    print(json.dumps({"path": None if result.path is None else str(result.path), **report}, indent=2))


def print_text(result: CompileResult | list[Explored]) -> None:
    if isinstance(result, list):
        _print_comparison(result)
    else:
        _print_summary(result)


def _print_comparison(explored: list[Explored]) -> None:
    """A row a budget; the bars are as long as the logarithm of the predicted loss."""
    from rich.console import Console
    from rich.table import Table

    from pmkvq_compiler.explore import log_shares

    table = Table("budget", "bytes", "true bits", "predicted loss", "", box=None, header_style="bold")
    for column in table.columns[:4]:
        column.justify = "right"
    for one, share in zip(explored, log_shares(explored), strict=True):
        if one.predicted_loss is None:
            table.add_row(one.budget, "", "", "", "no plan fits")
        else:
            cells = (f"{one.arena_bytes:,}", f"{one.true_bits:.2f}", f"{one.predicted_loss:.3g}")
            table.add_row(one.budget, *cells, "\u2588" * max(1, round(BAR * share)))
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print(
        "predicted loss: how far the distribution of the next token moves on the calibration texts, in nats a token, "
        "with errors doubled; use it to rank budgets, it is not the loss that you will see; bars are logarithmic"
    )


def _print_summary(result: CompileResult) -> None:
    from rich.console import Console

    from pmkvq_compiler.report.page import facts, grouped_reasons

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(_table(result.report.rows), soft_wrap=False)
    for reason, layers in grouped_reasons(result.report.rows).items():
        console.print(f"K scales not folded in layers {layers}: {reason}")
    for name, value, remark in facts(result.report):
        console.print(f"{name:<20} {value:<10} {remark}")
    if result.path is not None:
        console.print(f"{'artifact':<20} {result.path}")
        console.print(f"{'report':<20} {result.path / 'report.html'}")


def _table(rows: Sequence[ReportRow]) -> Table:
    from rich.table import Table

    names = ("layer", "K bits", "V bits", "K axis", "window", "bytes", "loss", "K map", "V map")
    table = Table(*names, box=None, header_style="bold")
    for column in table.columns[:3] + table.columns[4:7]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            str(row.layer),
            str(row.key_bits),
            str(row.value_bits),
            row.key_axis,
            str(row.window),
            f"{row.arena_bytes:,}",
            f"{row.sensitivity:.3g}",
            row.key_transform,
            row.value_transform,
        )
    return table
