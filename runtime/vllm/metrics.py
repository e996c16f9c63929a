"""How precise the pages of a progressive server are, among vLLM's own Prometheus metrics.

The scheduler's counts travel to whoever exports metrics in the place of a KV connector's, of which there is none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import SchedulerStats

    from .planes import Planes

STATS = "pmkvq"
"""The key of the counts in `SchedulerStats.kv_connector_stats`, and the attribute of whoever exports them."""


def counted(planes: Planes, bits: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The pages that somebody owns by the number of their planes; how many planes they have lost since this was last
    asked; and the bits of a number in them, where pages of a group have `bits[group][planes]`."""
    pages = [
        sum(counts[number] for counts in planes.counts if number < len(counts)) for number in range(planes.most + 1)
    ]
    every = sum(pages)
    total = sum(
        count * width
        for counts, widths in zip(planes.counts, bits, strict=True)
        for count, width in zip(counts, widths, strict=True)
    )
    lowered, planes.lowered = planes.lowered, 0
    return {"pages": pages, "lowered": lowered, "bits": total / every if every else 0.0}


def export() -> None:
    """Make the process that exports vLLM's metrics export these."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    original = StatLoggerManager.record
    if hasattr(original, STATS):
        return
    signature = inspect.signature(original)

    @functools.wraps(original)
    def record(self: StatLoggerManager, *args: Any, **kwargs: Any) -> None:
        told = signature.bind(self, *args, **kwargs).arguments
        counts = _taken_out(told["scheduler_stats"])
        for logger in self.stat_loggers:
            if counts is not None and isinstance(logger, PrometheusStatLogger):
                if not hasattr(logger, STATS):
                    setattr(logger, STATS, Metrics(logger))
                getattr(logger, STATS).record(counts, told.get("engine_idx") or 0)
        original(self, *args, **kwargs)

    setattr(record, STATS, True)
    StatLoggerManager.record = record


def _taken_out(stats: SchedulerStats | None) -> dict[str, Any] | None:
    if stats is None or not stats.kv_connector_stats or STATS not in stats.kv_connector_stats:
        return None
    counts: dict[str, Any] = stats.kv_connector_stats[STATS]
    stats.kv_connector_stats = None
    return counts


class Metrics:
    """The metrics of the engines that a logger of vLLM exports."""

    def __init__(self, logger: PrometheusStatLogger) -> None:
        self._labels = logger.per_engine_labelvalues
        names = ["model_name", "engine"]
        shared = {"multiprocess_mode": "mostrecent"}
        self._pages = logger._gauge_cls(
            name="vllm:pmkvq_pages",
            documentation="Quantized pages of running requests by the planes that refine them.",
            labelnames=[*names, "planes"],
            **shared,
        )
        self._lowered = logger._counter_cls(
            name="vllm:pmkvq_lowered",
            documentation="Planes that running requests have lost to others.",
            labelnames=names,
        )
        self._bits = logger._gauge_cls(
            name="vllm:pmkvq_bits",
            documentation="Bits of a number of K and V in the quantized pages of running requests, on average.",
            labelnames=names,
            **shared,
        )

    def record(self, counts: dict[str, Any], engine: int) -> None:
        labels = self._labels[engine]
        for planes, pages in enumerate(counts["pages"]):
            self._pages.labels(*labels, str(planes)).set(pages)
        self._lowered.labels(*labels).inc(counts["lowered"])
        self._bits.labels(*labels).set(counts["bits"])
