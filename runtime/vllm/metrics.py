"""How precise the pages of a progressive server are, among vLLM's own Prometheus metrics.

The scheduler's counts travel to whoever exports metrics in the place of a KV connector's, of which there is none.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import SchedulerStats

    from .tiers import Tiers

STATS = "pmkvq"
"""The key of the counts in `SchedulerStats.kv_connector_stats`, and the attribute of whoever exports them."""


def counted(tiers: Tiers, bits: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    """The pages that somebody owns by their tier; how often some fell since this was last asked; and the bits of a
    number in them, where pages of a group have `bits[group][tier]`."""
    pages = {1 << height: 0 for height in range(tiers.most.bit_length() + 1)}
    total = 0.0
    for counts, widths in zip(tiers.counts, bits, strict=True):
        for height, count in enumerate(counts):
            pages[1 << height] += count
            total += count * widths[1 << height] if count else 0.0
    every = sum(pages.values())
    lowered, tiers.lowered = tiers.lowered, 0
    return {"pages": pages, "lowered": lowered, "bits": total / every if every else 0.0}


def export() -> None:
    """Make the process that exports vLLM's metrics export these."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager

    original = StatLoggerManager.record
    if hasattr(original, STATS):
        return
    _, *names = inspect.signature(original).parameters

    @functools.wraps(original)
    def record(self: StatLoggerManager, *args: Any, **kwargs: Any) -> None:
        told = {**dict(zip(names, args, strict=False)), **kwargs}
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
        self._labelled: dict[int, tuple[dict[int, Any], Any, Any]] = {}
        """The metrics of each engine, pages by tier: to look them up takes longer than to set them."""
        names = ["model_name", "engine"]
        shared = {"multiprocess_mode": "mostrecent"}
        self._pages = logger._gauge_cls(
            name="vllm:pmkvq_pages",
            documentation="Quantized pages of running requests by their tier: in how many blocks a page lies.",
            labelnames=[*names, "tier"],
            **shared,
        )
        self._lowered = logger._counter_cls(
            name="vllm:pmkvq_lowered",
            documentation="How often pages of running requests fell to half of their tier.",
            labelnames=names,
        )
        self._bits = logger._gauge_cls(
            name="vllm:pmkvq_bits",
            documentation="Bits of a number of K and V in the quantized pages of running requests, on average.",
            labelnames=names,
            **shared,
        )

    def record(self, counts: dict[str, Any], engine: int) -> None:
        if engine not in self._labelled:
            labels = self._labels[engine]
            by_tier = {tier: self._pages.labels(*labels, str(tier)) for tier in counts["pages"]}
            self._labelled[engine] = by_tier, self._lowered.labels(*labels), self._bits.labels(*labels)
        by_tier, lowered, bits = self._labelled[engine]
        for tier, pages in counts["pages"].items():
            by_tier[tier].set(pages)
        lowered.inc(counts["lowered"])
        bits.set(counts["bits"])
