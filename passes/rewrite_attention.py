"""Replace the markers by attention over the cache."""

from __future__ import annotations

import dataclasses

from torch.fx import Node

from .base import Pass
from .locate_attention import markers
from .ops import STATE_OPS, cached_attention, state_markers
from .program import Program
from .verify import Stage


class RewriteAttention(Pass):
    """Turn every marker into `cached_attention(q, k, v, cache, layer, scale=, softcap=, sinks=)`.

    1. The graph gets one more input, `cache`, after `position_ids`.
    2. Layer, scale and soft cap stay constants of the node, and sinks stay an operand. The sliding window is dropped,
       because the plan of the cache has it.
    3. The sites refer to the new nodes.
    4. Markers of other ops with a state become calls of the runtime's functions, which take the cache as well.
    """

    takes = Stage.CAPTURED
    leaves = Stage.REWRITTEN

    def run(self, program: Program) -> bool:
        graph = program.graph
        (position_ids,) = (node for node in graph.find_nodes(op="placeholder") if node.name == "position_ids")
        with graph.inserting_after(position_ids):
            cache = graph.placeholder("cache")
        renamed = {marker.name: _rewrite(marker, cache).name for marker in markers(graph)}
        program.sites = [dataclasses.replace(site, node=renamed[site.node]) for site in program.sites]
        for marker in state_markers(graph):
            marker.args = (*marker.args[:-2], cache, *marker.args[-2:])
            marker.target = STATE_OPS[marker.target]
        return bool(renamed)


def _rewrite(marker: Node, cache: Node) -> Node:
    q, k, v, sinks, scale, layer, _, softcap = marker.args
    with marker.graph.inserting_before(marker):
        attention = marker.graph.call_function(
            cached_attention,
            (q, k, v, cache, layer),
            {"scale": scale, "softcap": softcap or None, "sinks": sinks},
        )
    attention.meta = dict(marker.meta)
    marker.replace_all_uses_with(attention)
    marker.graph.erase_node(marker)
    return attention
