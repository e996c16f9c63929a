"""The contents of a compile's report."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from typing import Any

import torch

from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.matrices import NO_VALUE_PROJECTION
from pmkvq_compiler.emit.model_source import span
from pmkvq_compiler.formats import Transform
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.plan.charged import FED_AT_ONCE
from pmkvq_compiler.plan.rerank import Tried
from pmkvq_compiler.plan.solution import Folds, PlanRow, plan_table
from pmkvq_compiler.problem import Problem, unserved_feature
from pmkvq_compiler.report.charts import Sample, readable_bytes
from pmkvq_compiler.runtime.layer_cache import LayerCache
from pmkvq_compiler.runtime.plan import CachePlan, original_bytes
from pmkvq_compiler.runtime.vllm.layout import paged_layers, pool_of
from pmkvq_compiler.source.rope import fixed_frequencies
from pmkvq_compiler.source.source import Source
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits


@dataclass(frozen=True)
class ReportRow(PlanRow):
    """A layer of the plan. `fold` (of K) and `value_fold` are "folded", or say why the weights contain no transform."""

    fold: str
    value_fold: str


@dataclass(frozen=True)
class Serving:
    """What sequences of the longest length take in vLLM on one device, at the final bits: the bytes of a cache that
    holds the plan's sequences, those of a block, blocks a sequence, and how much of that a GiB holds."""

    cache_bytes: int
    block_bytes: int
    blocks_per_sequence: int
    tokens_per_gib: int
    sequences_per_gib: float


@dataclass(frozen=True)
class Report:
    """The contents of `report.json`, in this order.

    Sizes are in bytes and `predicted_loss` is in nats a token. `check` and `seconds` are None after a dry run.
    """

    model: str
    """The model as the user named it."""
    name: str
    recipe: str
    budget: int
    max_len: int
    batch_size: int
    dtype: str
    aot: list[str]
    versions: dict[str, str]
    command: str
    """The command that makes the artifact again."""
    rows: list[ReportRow]
    arena_bytes: int
    original_bytes: int
    true_bits: float
    predicted_loss: float
    serving: Serving | None
    """None where vLLM would keep the cache in its own way."""
    bytes_over_tokens: list[Sample]
    state_bytes: int = 0
    """What recurrent states of fixed size take beside the budget."""
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    """What else is to be known about this model, as (name, value, remark)."""
    check: dict[str, float] | None = None
    """The figures of the check, by name."""
    seconds: dict[str, float] | None = None
    """How long each step took."""

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object, without fields that are None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["rows"] = [asdict(row) for row in self.rows]
        values["serving"] = None if self.serving is None else asdict(self.serving)
        return {name: value for name, value in values.items() if value is not None}


def report_contents(
    source: Source, problem: Problem, calibration: Calibration, options: CompileOptions, tried: Tried
) -> Report:
    """The report without check and times, which come after the artifact is written."""
    solution, plan = tried.solution, tried.solution.plan
    folded = Folds.of(solution, calibration).values
    unserved = unserved_feature(source.config, (*problem.sites, *problem.readers), problem.states)
    rows = [
        ReportRow(
            **asdict(row),
            fold=_folded(site, row.key_transform),
            value_fold=_value_folded(site, site.layer in folded),
        )
        for row, site in zip(plan_table(solution, problem.sites, calibration), problem.sites, strict=True)
    ]
    return Report(
        model=options.model,
        name=source.base_model or source.name,
        recipe=plan.recipe,
        budget=plan.budget,
        max_len=plan.max_len,
        batch_size=plan.batch_size,
        dtype=plan.dtype,
        aot=list(options.aot),
        versions={name: version(name) for name in ("pmkvq-compiler", "torch", "transformers")},
        command=reproduction_command(options),
        rows=rows,
        arena_bytes=plan.arena_bytes,
        original_bytes=problem.original_bytes,
        true_bits=16 * plan.arena_bytes / problem.original_bytes,
        predicted_loss=tried.loss,
        serving=serving(plan) if unserved is None else None,
        bytes_over_tokens=bytes_over_tokens(plan),
        state_bytes=plan.state_bytes(problem.dtype.itemsize),
        notes=_notes(source, problem, options.whole),
    )


def _notes(source: Source, problem: Problem, whole: bool) -> list[tuple[str, str, str]]:
    found = []
    if source.whole is not None and whole:
        remark = "not compiled: transformers and vLLM load the whole model with them"
        found.append(("kept", ", ".join(source.whole.modules), remark))
    elif source.whole is not None:
        remark = f"the artifact is the language model ({source.config.model_type}) and takes text alone"
        found.append(("left out", ", ".join(source.whole.modules), remark))
    expanded = _expanded_bytes(problem)
    if expanded:
        remark = "at 16 bits, if the cache held the keys and values of every head instead of the latents"
        found.append(("expanded cache", readable_bytes(expanded), remark))
    fixed = fixed_frequencies(source.config)
    if fixed is not None:
        remark = (
            f"tokens up to which the frequencies of its RoPE ({fixed.rope_type}) stay the same; longer texts do not fit"
        )
        found.append(("longest text", f"{fixed.tokens:,}", remark))
    if problem.readers:
        read = sorted({site.reads for site in problem.readers if site.reads is not None})
        readers = [site.layer for site in problem.readers]
        remark = f"{span(readers)}: the keys and values are those of {span(read)}"
        found.append(("layers without a cache", str(len(readers)), remark))
    return found


def _expanded_bytes(problem: Problem) -> int:
    """Bytes of the cache at 16 bits if latents were expanded to keys and values of every head; 0 without latents."""
    if all(site.latent is None for site in problem.sites):
        return 0
    return cache_bytes_at_16_bits([_expanded(site) for site in problem.sites], problem.max_len, problem.batch_size)


def _expanded(site: AttentionSite) -> AttentionSite:
    if site.latent is None:
        return site
    return replace(
        site,
        num_key_value_heads=site.latent.num_heads,
        key_head_dim=site.latent.key_dim + site.key_head_dim - site.value_head_dim,
        value_head_dim=site.latent.value_dim,
    )


def serving(plan: CachePlan) -> Serving | None:
    """What sequences of `max_len` tokens take in vLLM, on one device; None where vLLM keeps the cache in its own way:
    where nothing is quantized (and `unserved_feature` names the other cases)."""
    layers = paged_layers(plan, getattr(torch, plan.dtype).itemsize)
    if all(layer.exact for layer in layers):
        return None
    pool = pool_of(layers, plan.max_len)
    return Serving(
        cache_bytes=pool.bytes_needed(plan.batch_size, plan.max_len, FED_AT_ONCE),
        block_bytes=pool.block_bytes,
        blocks_per_sequence=pool.blocks_per_sequence(plan.max_len, FED_AT_ONCE),
        tokens_per_gib=pool.tokens(1 << 30, plan.max_len, FED_AT_ONCE),
        sequences_per_gib=pool.sequences(1 << 30, plan.max_len, FED_AT_ONCE),
    )


def _folded(site: AttentionSite, transform: Transform) -> str:
    """ "folded" if the scales of K are in the weights, else the reason why not."""
    if transform == "scale":
        return "folded"
    if transform != "none":
        return "instead, queries and keys are rotated at run time, after RoPE"
    return site.reason or "the plan does better without scales: it groups K by channel, or leaves K as it is"


def _value_folded(site: AttentionSite, folded: bool) -> str:
    """ "folded" if V's matrix is in the weights, else the reason why V is left as it is."""
    if folded:
        return "folded"
    if not can_transform(site):
        return NO_VALUE_PROJECTION
    return "the plan does better without a map of V"


def bytes_over_tokens(plan: CachePlan, samples: int = 256) -> list[Sample]:
    """The bytes and bits of the cache of `plan` while `batch_size` sequences grow together to `max_len` tokens.

    The runtime's layer caches count the bytes. They hold one sequence, because all sequences are alike, and they are on
    the `meta` device, so no memory is allocated.
    """
    dtype, meta = getattr(torch, plan.dtype), torch.device("meta")
    shares = [replace(layer, arena_bytes=layer.arena_bytes // plan.batch_size) for layer in plan.layers]
    caches = [LayerCache(share, 1, plan.max_len, dtype, meta) for share in shares]
    count = min(samples, plan.max_len)
    return [_sample(plan, caches, plan.max_len * step // count) for step in range(count + 1)]


def _sample(plan: CachePlan, caches: list[LayerCache], tokens: int) -> Sample:
    for cache in caches:
        cache.seek([tokens])
    layer_bytes = [plan.batch_size * cache.bytes_used for cache in caches]
    return {
        "tokens": tokens,
        "used": sum(layer_bytes),
        "layer_bytes": layer_bytes,
        "original": plan.batch_size * sum(original_bytes(layer, tokens) for layer in plan.layers),
        "bits": [list(cache.bits) for cache in caches],
    }


def reproduction_command(options: CompileOptions) -> str:
    """The `pmkvq-compile` command with these options, without those that have their default values."""
    defaults = CompileOptions(model=options.model, output=options.output)
    words = ["pmkvq-compile", options.model, "--output", str(options.output)]
    for option in fields(options):
        value = getattr(options, option.name)
        if value == getattr(defaults, option.name):
            continue
        words.append("--" + option.name.replace("_", "-"))
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    return shlex.join(words)
