"""Chooses one candidate for each layer, with the least total sensitivity that fits the budget to the byte.

This is PM-KVQ's allocation, but it counts all bytes instead of the bits of codes. It is a multiple-choice knapsack,
which CBC solves as an integer program through PuLP.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pulp

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.plan.candidates import Candidate
from pmkvq_compiler.plan.joint_choices import Group, joined

SOLVER_SECONDS, GAP = 20, 1e-7
OBJECTIVE_SCALE = 1e6


def choose(
    layers: Sequence[Sequence[Candidate]], budget: int, taken: Callable[[Sequence[Candidate]], int]
) -> list[Candidate]:
    """Choose one candidate for each layer, of least total sensitivity, that have `taken` at most `budget` bytes.

    The program adds up sizes, divided by their common divisor, so that it has small exact integers. The solver has a
    tolerance, and what is taken need not be the sum. So the choice is counted afterwards; while it is over the
    budget, the program is solved again for less, by half of what was too much.

    Raises `CompileError` if the solver is missing or finds no solution.
    """
    unit = math.gcd(*(candidate.size for layer in layers for candidate in layer))
    alone = [
        Group(
            np.array([candidate.size // unit for candidate in layer]),
            np.array([candidate.sensitivity for candidate in layer]),
            np.arange(len(layer), dtype=np.int32)[:, None],
        ).undominated()
        for layer in layers
    ]
    smallest = sum(int(one.units.min()) for one in alone)
    capacity = max(smallest, budget // unit)
    while (found := taken(chosen := _chosen(layers, _solve_program(joined(alone, capacity), capacity)))) > budget:
        if capacity <= smallest:
            raise CompileError(f"no plan was found that takes {budget:,} bytes or less; give a larger --budget")
        capacity = max(smallest, capacity - max(1, (found - budget) // 2 // unit))
    return chosen


def _chosen(layers: Sequence[Sequence[Candidate]], picks: Iterable[int]) -> list[Candidate]:
    return [layer[pick] for layer, pick in zip(layers, picks, strict=True)]


def _solve_program(groups: Sequence[Group], capacity: int) -> list[int]:
    """The best picks for all layers, by CBC. A variable is 1 if its choice is taken; each group has one such choice,
    and together they take at most `capacity` units of bytes."""
    largest = max(float(one.sensitivity.max()) for one in groups) or 1.0
    program = pulp.LpProblem("plan", pulp.LpMinimize)
    taken = [
        [pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary) for j in range(len(one))] for i, one in enumerate(groups)
    ]
    objective: list[tuple[pulp.LpVariable, float]] = []
    size: list[tuple[pulp.LpVariable, int]] = []
    for one, variables in zip(groups, taken, strict=True):
        objective += zip(variables, (one.sensitivity / largest * OBJECTIVE_SCALE).tolist(), strict=True)
        size += zip(variables, one.units.tolist(), strict=True)
    program += pulp.LpAffineExpression(objective)
    program += pulp.LpAffineExpression(size) <= capacity
    for variables in taken:
        program += pulp.lpSum(variables) == 1

    solver = pulp.PULP_CBC_CMD(msg=False, gapRel=GAP, timeLimit=SOLVER_SECONDS)
    if not solver.available():
        raise CompileError(
            "the CBC solver of PuLP is missing; install it again with `pip install --force-reinstall pulp`"
        )
    try:
        with tempfile.TemporaryDirectory(prefix="pmkvq-") as solver.tmpDir:  # PuLP itself only removes files at the end
            program.solve(solver)
    except pulp.PulpSolverError as error:
        raise CompileError(
            f"the CBC solver of PuLP did not run ({error}); see whether the machine has memory and room for temporary "
            f"files, or install it again with `pip install --force-reinstall pulp`"
        ) from error
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise CompileError(f"the CBC solver ended with {pulp.LpSolution[program.sol_status]!r}; try another budget")
    picks: list[int] = []
    for one, variables in zip(groups, taken, strict=True):
        (choice,) = (j for j, variable in enumerate(variables) if variable.value() > 0.5)
        picks += one.picks[choice].tolist()
    return picks


def undominated(layer: Sequence[Candidate]) -> list[Candidate]:
    """The candidates for which no other one is at most as large and at most as sensitive, smallest first."""
    kept: list[Candidate] = []
    for candidate in sorted(layer, key=lambda c: (c.size, c.sensitivity)):
        if not kept or candidate.sensitivity < kept[-1].sensitivity:
            kept.append(candidate)
    return kept


def total_bytes(chosen: Iterable[Candidate]) -> int:
    return sum(candidate.size for candidate in chosen)
