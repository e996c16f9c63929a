"""One candidate for each layer, of least sensitivity in all, within the budget to the byte.

This is PM-KVQ's allocation with true bytes in place of code bits: a multiple-choice knapsack, solved as an integer
program by CBC through PuLP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pulp

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.plan.candidates import Candidate

SOLVER_SECONDS, GAP = 20, 1e-7
OBJECTIVE_SCALE = 1e6


def choose(layers: Sequence[Sequence[Candidate]], budget: int) -> list[Candidate]:
    """One candidate of each layer, of least total sensitivity, with at most `budget` bytes in all.

    Bytes enter the program as exact small integers, divided by their common divisor, and the sum is checked afterwards:
    were a solution over the budget within the solver's tolerance, the next smaller budget would be solved.
    """
    unit = math.gcd(*(candidate.plan.arena_bytes for layer in layers for candidate in layer))
    capacity = budget // unit
    while total_bytes(chosen := _solve_program(layers, unit, capacity)) > budget:
        capacity -= 1
    return chosen


def _solve_program(layers: Sequence[Sequence[Candidate]], unit: int, capacity: int) -> list[Candidate]:
    """`choose` by CBC: x = 1 takes a candidate, each layer takes one, and they have `capacity` units of bytes."""
    largest = max(candidate.sensitivity for layer in layers for candidate in layer) or 1.0
    program = pulp.LpProblem("plan", pulp.LpMinimize)
    taken = {
        (i, j): pulp.LpVariable(f"x_{i}_{j}", cat=pulp.LpBinary)
        for i, layer in enumerate(layers)
        for j in range(len(layer))
    }
    program += pulp.lpSum(layers[i][j].sensitivity / largest * OBJECTIVE_SCALE * x for (i, j), x in taken.items())
    program += pulp.lpSum(layers[i][j].plan.arena_bytes // unit * x for (i, j), x in taken.items()) <= capacity
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
    """The candidates that no other beats in both bytes and sensitivity, smallest first."""
    kept: list[Candidate] = []
    for candidate in sorted(layer, key=lambda c: (c.plan.arena_bytes, c.sensitivity)):
        if not kept or candidate.sensitivity < kept[-1].sensitivity:
            kept.append(candidate)
    return kept


def total_bytes(chosen: Iterable[Candidate]) -> int:
    return sum(candidate.plan.arena_bytes for candidate in chosen)
