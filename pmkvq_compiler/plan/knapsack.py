"""Chooses one candidate for each layer, with the least total sensitivity that fits the budget to the byte.

This is PM-KVQ's allocation, but it counts all bytes instead of the bits of codes. It is a multiple-choice knapsack,
which CBC solves as an integer program through PuLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import pulp

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.plan.candidates import Candidate

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
    smallest = sum(min(candidate.size for candidate in layer) for layer in layers) // unit
    capacity = max(smallest, budget // unit)
    while (found := taken(chosen := _solve_program(layers, unit, capacity))) > budget:
        if capacity <= smallest:
            raise CompileError(f"no plan was found that takes {budget:,} bytes or less; give a larger --budget")
        capacity = max(smallest, capacity - max(1, (found - budget) // 2 // unit))
    return chosen


def _solve_program(layers: Sequence[Sequence[Candidate]], unit: int, capacity: int) -> list[Candidate]:
    """`choose` by CBC. A variable is 1 if its candidate is chosen; each layer has one such candidate, and together they
    take at most `capacity` units of bytes."""
    largest = max(candidate.sensitivity for layer in layers for candidate in layer) or 1.0
    program = pulp.LpProblem("plan", pulp.LpMinimize)
    taken = {
        (i, j): pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary)
        for i, layer in enumerate(layers)
        for j in range(len(layer))
    }
    program += pulp.lpSum(layers[i][j].sensitivity / largest * OBJECTIVE_SCALE * x for (i, j), x in taken.items())
    program += pulp.lpSum(layers[i][j].size // unit * x for (i, j), x in taken.items()) <= capacity
    for i, layer in enumerate(layers):
        program += pulp.lpSum(taken[i, j] for j in range(len(layer))) == 1

    solver = pulp.PULP_CBC_CMD(msg=False, gapRel=GAP, timeLimit=SOLVER_SECONDS)
    if not solver.available():
        raise CompileError(
            "the CBC solver of PuLP is missing; install it again with `pip install --force-reinstall pulp`"
        )
    try:
        program.solve(solver)
    except pulp.PulpSolverError as error:
        raise CompileError(
            f"the CBC solver of PuLP did not run ({error}); see whether the machine has memory and room for temporary "
            f"files, or install it again with `pip install --force-reinstall pulp`"
        ) from error
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise CompileError(f"the CBC solver ended with {pulp.LpSolution[program.sol_status]!r}; try another budget")
    return [next(c for j, c in enumerate(layer) if taken[i, j].value() > 0.5) for i, layer in enumerate(layers)]


def undominated(layer: Sequence[Candidate]) -> list[Candidate]:
    """The candidates for which no other one is at most as large and at most as sensitive, smallest first."""
    kept: list[Candidate] = []
    for candidate in sorted(layer, key=lambda c: (c.size, c.sensitivity)):
        if not kept or candidate.sensitivity < kept[-1].sensitivity:
            kept.append(candidate)
    return kept


def total_bytes(chosen: Iterable[Candidate]) -> int:
    return sum(candidate.size for candidate in chosen)
