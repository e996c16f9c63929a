"""What a pass is, after onnx's ir-py: a callable with conditions before and after, and precise errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pmkvq_compiler.errors import Defect

from .program import Program
from .verify import Stage, verify


class PassError(Defect):
    """A pass failed; the cause is chained."""


class PreconditionError(PassError):
    """What a pass was given is not what it works on."""


class PostconditionError(PassError):
    """What a pass left is not what it promises."""


@dataclass(frozen=True)
class PassResult:
    """`modified` says whether the graph, the sites or the edits were changed."""

    modified: bool


class Pass(ABC):
    """One rewrite or analysis of a program, in place. It takes the graph at one stage and leaves it at another."""

    takes: ClassVar[Stage]
    leaves: ClassVar[Stage]

    @property
    def name(self) -> str:
        return type(self).__name__

    def requires(self, program: Program) -> None:  # noqa: B027
        """Raises `ValueError` where `program` lacks what this pass needs beyond its stage."""

    def ensures(self, program: Program) -> None:  # noqa: B027
        """Raises `ValueError` where `program` lacks what this pass promises beyond its stage."""

    @abstractmethod
    def run(self, program: Program) -> bool:
        """Do the work; returns whether anything changed."""

    def __call__(self, program: Program) -> PassResult:
        """Check, run, check. Raises `PreconditionError`, `PassError` or `PostconditionError` from the cause."""
        try:
            verify(program, self.takes)
            self.requires(program)
        except ValueError as error:
            raise PreconditionError(f"{self.name} cannot start: {error}") from error
        try:
            modified = self.run(program)
        except Exception as error:
            raise PassError(f"{self.name} failed: {type(error).__name__}: {error}") from error
        try:
            verify(program, self.leaves)
            self.ensures(program)
        except ValueError as error:
            raise PostconditionError(f"{self.name} left an invalid program: {error}") from error
        return PassResult(modified)


def run_passes(program: Program, passes: Sequence[Pass]) -> dict[str, PassResult]:
    """Run `passes` in order, each verified before and after; the results by name."""
    return {one.name: one(program) for one in passes}
