"""The kernels of an artifact: a Python file for each kind of layer, with the layer's shape as constants."""

from __future__ import annotations

from collections.abc import Sequence

from pmkvq_compiler.emit.model_source import span
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.runtime import quantize
from pmkvq_compiler.runtime.plan import LayerPlan
from pmkvq_compiler.templates import read, render

TUNING = "tuning.json"


def kernel_source(plan: LayerPlan, group: int, softcap: float | None, has_sinks: bool, layers: str) -> str:
    """The kernels of layers planned alike, `group` query heads to a KV head; `layers` names them."""
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
        softcap=softcap,
        has_sinks=has_sinks,
        quantize=quantize,
    )


def kernel_files(sites: Sequence[AttentionSite], plans: Sequence[LayerPlan]) -> dict[str, str]:
    """Names and texts of the files in `kernels/`; `layers.py` says which file is whose, `tuning.json` how they are
    launched on which device."""
    kinds: dict[str, list[int]] = {}
    for site, plan in zip(sites, plans, strict=True):
        group = site.num_attention_heads // site.num_key_value_heads
        text = kernel_source(plan, group, site.softcap, site.has_sinks, layers="LAYERS")
        kinds.setdefault(text, []).append(site.layer)
    files: dict[str, str] = {}
    names: dict[int, str] = {}
    for number, (text, layers) in enumerate(kinds.items()):
        files[f"attention_{number}.py"] = text.replace("LAYERS", span(layers), 1)
        names |= dict.fromkeys(layers, f"attention_{number}")
    files["layers.py"] = render("kernels/layers.py.j2", names=[names[layer] for layer in sorted(names)])
    files[TUNING] = tuning_table()
    return files


def tuning_table() -> str:
    """The launch parameters that were measured, as JSON; see `runtime.kernels.read_tunings`."""
    return read(f"kernels/{TUNING}")
