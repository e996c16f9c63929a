"""Put the bit plan into the graph."""

from __future__ import annotations

from torch.fx import Node

from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan

from .base import Pass
from .ops import cached_attention
from .program import AttentionSite, Program
from .verify import Stage


class BakePlan(Pass):
    """Give every cached attention its layer's plan as the constant `plan`, and store the whole plan in the program.

    1. The plan must have one entry for each layer of the graph that has a cache. A layer that reads another layer's
       cache has none.
    2. The heads, head dimensions and sliding window of each entry must be those that LocateAttention found.
    3. The plan's layers with attention, and its states, must be those of the graph.
    """

    takes = Stage.REWRITTEN
    leaves = Stage.REWRITTEN

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan

    def requires(self, program: Program) -> None:
        sites = program.cached_sites
        if len(self.plan.layers) != len(sites):
            raise ValueError(f"the plan has {len(self.plan.layers)} layers, but the graph has {len(sites)}")
        if [*self.plan.places] != [site.layer for site in sites] or self.plan.states != program.states:
            raise ValueError("the plan has attention or states in other layers than the graph")
        for site, layer in zip(sites, self.plan.layers, strict=True):
            _check(site, layer)

    def run(self, program: Program) -> bool:
        before = program.plan
        for node in filter(has_cache, cached_attentions(program)):
            node.update_kwarg("plan", self.plan.layers[self.plan.places[node.args[4]]])
        program.plan = self.plan
        return program.plan != before


def cached_attentions(program: Program) -> list[Node]:
    found: list[Node] = program.graph.find_nodes(op="call_function", target=cached_attention)
    return found


def has_cache(attention: Node) -> bool:
    """Whether a cached attention takes keys and values of its own. Otherwise it reads the cache of another layer."""
    return attention.args[1] is not None


def layer_plans(program: Program) -> list[LayerPlan]:
    """The plan of each layer, read from the graph, whether its layers are outlined or not."""
    plans = {node.args[4]: node.kwargs["plan"] for node in cached_attentions(program) if has_cache(node)}
    calls = program.graph.find_nodes(op="call_module")
    plans |= {call.args[0]: call.args[1] for call in calls if call.args[1] is not None}
    return [plans[layer] for layer in sorted(plans)]


def _check(site: AttentionSite, plan: LayerPlan) -> None:
    """Raises `ValueError` if the plan does not fit the layer's shape."""
    for name in ("num_key_value_heads", "key_head_dim", "value_head_dim", "sliding_window", "chunked"):
        planned, found = getattr(plan, name), getattr(site, name)
        if planned != found:
            raise ValueError(f"the plan of layer {site.layer} has {name} {planned}, but the graph has {found}")
