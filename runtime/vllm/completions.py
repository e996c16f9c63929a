"""Which requests may complete a block in a step, so that the others need not be asked.

A request that writes gets at most one token in a step, so it cannot complete a block in fewer steps than the block
lacks tokens. It is noted for the first step that may do so, and looked at again only then, or when a step gives it
several tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class Completions:
    """The requests of a scheduler by the step that may complete a block of theirs; blocks have `block` tokens and begin
    behind one of these `sinks`."""

    def __init__(self, block: int, sinks: Iterable[int]) -> None:
        self.block, self.sinks = block, tuple(sorted({*sinks}))
        self._step = 0
        self._due: dict[int, dict[str, None]] = {}

    def of(self, output: SchedulerOutput, requests: Mapping[str, Request]) -> list[tuple[str, int, int]]:
        """The requests that may complete a block in the next step, which has tokens, and how many tokens each has
        before and after it."""
        self._step += 1
        names = self._due.pop(self._step, {})
        new = output.num_scheduled_tokens
        if output.total_num_scheduled_tokens > len(new):
            names.update((name, None) for name, count in new.items() if count > 1)
        for request in output.scheduled_new_reqs:
            names[request.req_id] = None
        for name in output.scheduled_cached_reqs.resumed_req_ids:
            names[name] = None
        return self._noted(names, new, requests) if names else []

    def _noted(
        self, names: Iterable[str], new: Mapping[str, int], requests: Mapping[str, Request]
    ) -> list[tuple[str, int, int]]:
        """Note these requests for the next step that may complete a block of theirs."""
        step, block, found = self._step, self.block, []
        for name in names:
            request = requests.get(name)
            if request is not None:
                end = request.num_computed_tokens
                lacking = min([block - (end - sink) % block for sink in self.sinks])
                self._due.setdefault(step + lacking, {})[name] = None
                if name in new:
                    found.append((name, end - new[name], end))
        return found
