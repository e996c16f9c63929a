"""The benchmark of progressive precision shows no times of what cannot be right."""

from __future__ import annotations

import importlib
import math
from argparse import Namespace
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest

from .engines import REASONER

OPTIONS = Namespace(shapes=None, sequences=50)
ROW: dict[str, Any] = {"whole": True, "right": 50, "alone": [[(5, -0.1, 2.0), (7, -0.2, 0.01)], [(6, -0.3, 3.0)]]}


@pytest.fixture
def progressive(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REASONER.parent / "serve")
    return importlib.import_module("progressive")


def rows() -> dict[str, Any]:
    return {"8 bits": deepcopy(ROW), "progressive": deepcopy(ROW)}


def test_what_is_right_passes(progressive: ModuleType) -> None:
    found = rows()
    found["8 bits"]["right"] = 49
    found["progressive"]["alone"][0][1] = (8, -0.2, 0.01)
    progressive.check(found, OPTIONS)


@pytest.mark.parametrize(
    ("kind", "wrong", "named"),
    [
        ("progressive", {"whole": False}, "did not get all tokens"),
        ("8 bits", {"right": 48}, "48 of 50 chains"),
        ("8 bits", {"alone": [[(5, math.nan, 2.0)], []]}, "no number"),
        ("progressive", {"alone": [[(4, -0.1, 2.0), (7, -0.2, 0.01)], ROW["alone"][1]]}, "token 4 follows"),
    ],
)
def test_what_is_wrong_is_named(progressive: ModuleType, kind: str, wrong: dict[str, Any], named: str) -> None:
    found = rows()
    found[kind] |= wrong
    with pytest.raises(SystemExit, match=named):
        progressive.check(found, OPTIONS)
