"""Whatever breaks off a call, the cache is as it was before, or refuses."""

from __future__ import annotations

import ast
import random

import pytest

from ..interpreted import run_interpreted
from . import rounds
from .interrupts import PLANS, Trials, plans, tiny_model

KERNEL_TRIALS = rounds(2, 40)
MAX_LEN = 330


@pytest.mark.parametrize("seed", range(2))
def test_what_is_broken_off_leaves_the_cache_as_it_was_or_refusing(seed: int) -> None:
    models = [tiny_model(plan, MAX_LEN) for plan in plans(MAX_LEN, PLANS)]
    trials = Trials(models, random.Random(seed), longest=MAX_LEN)
    trials.run(rounds(25, 500))
    print(dict(trials.outcomes))
    assert min(trials.outcomes["kept"], trials.outcomes["refused"]) > 0, "both were to occur"


def test_so_do_the_kernels() -> None:
    """In Triton's interpreter, a decoder's steps among them."""
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    printed = run_interpreted("tests.fuzz.interrupts", KERNEL_TRIALS, 0)
    print(printed)
    assert sum(ast.literal_eval(printed).values()) == KERNEL_TRIALS
