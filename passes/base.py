"""The base class of passes, modelled on onnx's ir-py: callables with preconditions, postconditions and exact errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pmkvq_compiler.errors import Defect

from .dump import write_dump
from .program import Program
from .verify import Stage, verify


class PassError(Defect):
    """A pass failed. `__cause__` is the exception that it raised."""


class PreconditionError(PassError):
    """The program that a pass was given does not meet the pass's preconditions."""


class PostconditionError(PassError):
    """The program that a pass left behind does not meet the pass's postconditions."""


@dataclass(frozen=True)
class PassResult:
    """`modified` says whether the pass changed the graph, the sites or the edits."""

    modified: bool


class Pass(ABC):
    """One rewrite or analysis of a program, in place."""

    takes: ClassVar[Stage]
    """The stage that the program must have reached before the pass runs."""
    leaves: ClassVar[Stage]
    """The stage that the program has reached afterwards."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def requires(self, program: Program) -> None:  # noqa: B027
        """Raises `ValueError` if `program` lacks something that this pass needs besides the stage `takes`."""

    def ensures(self, program: Program) -> None:  # noqa: B027
        """Raises `ValueError` if `program` lacks something that this pass promises besides the stage `leaves`."""

    @abstractmethod
    def run(self, program: Program) -> bool:
        """Transform `program`; returns whether anything changed."""

    def __call__(self, program: Program) -> PassResult:
        """Verify the program, run the pass, and verify again.

        Raises `PreconditionError`, `PassError` or `PostconditionError`. The message names the passes that ran before.
        """
        before = f"; before it ran: {', '.join(program.history) or 'no pass'}"
        try:
            verify(program, self.takes)
            self.requires(program)
        except ValueError as error:
            raise PreconditionError(f"{self.name} cannot start: {error}{before}") from error
        try:
            modified = self.run(program)
        except Exception as error:
            raise PassError(f"{self.name} failed: {type(error).__name__}: {error}{before}") from error
        try:
            verify(program, self.leaves)
            self.ensures(program)
        except ValueError as error:
            raise PostconditionError(f"{self.name} left an invalid program: {error}{before}") from error
        program.history.append(self.name)
        return PassResult(modified)


def run_passes(program: Program, passes: Sequence[Pass], dump: Path | None = None) -> dict[str, PassResult]:
    """Run `passes` in order, each verified before and after; returns the results by the names of the passes.

    If a folder `dump` is given, the program after each pass is written into it as a readable file.
    """
    results = {}
    for one in passes:
        results[one.name] = one(program)
        if dump is not None:
            write_dump(program, dump)
    return results
