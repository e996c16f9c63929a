"""The kernels of an artifact: a Python file for each kind of layer, with the layer's shape as constants."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

from pmkvq_compiler.emit.model_source import span
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.runtime import quantize, records
from pmkvq_compiler.runtime.fused_kernels import FUSED
from pmkvq_compiler.runtime.plan import ALIGNMENT, LayerPlan
from pmkvq_compiler.runtime.records import PARAMETER_BITS, Field, row_numbers
from pmkvq_compiler.templates import read, render

TUNING = "tuning.json"

WIDTH_OF = {"parameter": str(PARAMETER_BITS), "key": "key_bits", "value": "value_bits"}
"""The name or number by which kernels give the width of each kind of field."""


def kernel_source(
    plan: LayerPlan, group: int, softcap: float | None, has_sinks: bool, layers: str, paged: bool = False
) -> str:
    """The kernels of layers with equal plans and `group` query heads for each KV head; `layers` names these layers.

    With `paged`, the kernels that read the pages of a server's pool are among them.
    """
    return render(
        "kernels/attention.py.j2",
        layers=layers,
        num_key_value_heads=plan.num_key_value_heads,
        group=group,
        key_head_dim=plan.key_head_dim,
        value_head_dim=plan.value_head_dim,
        sink=plan.sink,
        block=plan.block,
        key_by_channel=plan.key_axis == "channel",
        sliding_window=plan.sliding_window,
        chunked=plan.chunked,
        softcap=softcap,
        has_sinks=has_sinks,
        paged=paged,
        quantize=quantize,
        **layout(plan),
    )


def layout(plan: LayerPlan) -> dict[str, Any]:
    """The layout of `runtime.records` for the kernels of a layer.

    It has the rows of `state`, the offsets of the rows of K and V, and the offsets of a record's fields in bits, as
    expressions of the code widths.
    """
    fields, row = plan.record.fields, row_numbers(plan.key_head_dim, plan.value_head_dim)
    before = itertools.accumulate(row.values(), initial=0)
    return {
        "state": records.STATE,
        "alignment": ALIGNMENT,
        "rows": dict(zip(row, before, strict=False)),
        "key_groups": fields["key_parameters"].numbers,
        "record": {name: bits_of(plan.record.before(name)) for name in fields},
        "record_bits": bits_of(fields.values()),
    }


def bits_of(fields: Collection[Field]) -> str:
    """The bits of fields as an expression of `key_bits` and `value_bits`."""
    kinds = {kind: sum(field.numbers * field.lines for field in fields if field.kind == kind) for kind in WIDTH_OF}
    return " + ".join(f"{count} * {WIDTH_OF[kind]}" for kind, count in kinds.items() if count) or "0"


def kernel_files(sites: Sequence[AttentionSite], plans: Sequence[LayerPlan]) -> dict[str, str]:
    """The names and texts of the files in `kernels/`. `layers.py` says which layer uses which file, `fused.py` has the
    kernels of other ops than attention, and `tuning.json` the launch parameters for each device."""
    kinds: dict[str, list[int]] = {}
    paged = any(plan.quantized for plan in plans)
    for site, plan in zip(sites, plans, strict=True):
        group = site.num_attention_heads // site.num_key_value_heads
        text = kernel_source(plan, group, site.softcap, site.has_sinks, "LAYERS", paged)
        kinds.setdefault(text, []).append(site.layer)
    files: dict[str, str] = {}
    names: dict[int, str] = {}
    for number, (text, layers) in enumerate(kinds.items()):
        files[f"attention_{number}.py"] = text.replace("LAYERS", span(layers), 1)
        names |= dict.fromkeys(layers, f"attention_{number}")
    files["layers.py"] = render("kernels/layers.py.j2", names=[names[layer] for layer in sorted(names)])
    files[f"{FUSED}.py"] = render(f"kernels/{FUSED}.py.j2")
    files[TUNING] = tuning_table()
    return files


def tuning_table() -> str:
    """The measured launch parameters, as JSON; see `runtime.tuning.read_tunings`."""
    return read(f"kernels/{TUNING}")
