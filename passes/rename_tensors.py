"""Call the tensors of a language model as the multimodal model around it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import Graph

from .base import Pass
from .program import Program
from .verify import Stage


class RenameTensors(Pass):
    """Replace the beginnings of names.

    `beginnings` maps how names begin in a language model of its own to how they begin in the checkpoint of the model
    around it, such as "model." to "model.language_model.".

    1. Weights, constants and edits get the new names, each by the first beginning that fits. Other names stay.
    2. The names that outlined layers give to their tensors change alike.
    """

    takes = Stage.OUTLINED
    leaves = Stage.OUTLINED

    def __init__(self, beginnings: Mapping[str, str]) -> None:
        self.beginnings = beginnings

    def run(self, program: Program) -> bool:
        program.weights = {node: self._renamed(name) for node, name in program.weights.items()}
        program.constants = {
            node: replace(one, name=self._renamed(one.name)) for node, one in program.constants.items()
        }
        program.edits = [replace(edit, tensor=self._renamed(edit.tensor)) for edit in program.edits]
        for call in {node.target for node in program.graph.find_nodes(op="call_module")}:
            self._rename_in(program.graph_module.get_submodule(call).graph)
        return True

    def _rename_in(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="placeholder"):
            if "tensor" in node.meta:
                node.meta["tensor"] = self._renamed(node.meta["tensor"])

    def _renamed(self, name: str) -> str:
        old = next((one for one in self.beginnings if name.startswith(one)), None)
        return name if old is None else self.beginnings[old] + name[len(old) :]
