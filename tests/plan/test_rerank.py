"""Whole plans are tried with the very model, and what does best is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, AttentionCall, observed, run
from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.measure import calibrate
from pmkvq_compiler.calibrate.output_loss import MAGNIFIED
from pmkvq_compiler.calibrate.texts import read_samples
from pmkvq_compiler.formats import stored
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.plan import rerank as trial
from pmkvq_compiler.plan.propose import propose, solve
from pmkvq_compiler.plan.solution import Folds, Solution
from pmkvq_compiler.problem import Problem, resolve
from pmkvq_compiler.source.source import Source, open_source
from tests.conftest import silent
from tests.folders import TEXT, model_folder
from tests.programs import captured_once

MAX_LEN, LENGTH = 448, 256
Setting = tuple[Source, Problem, Calibration]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A model with its calibration for recipe `best`, and a budget that presses."""
    folder = model_folder(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = CompileOptions(
        model=str(folder),
        output=tmp_path / "artifact",
        budget="80%",
        calib=str(tmp_path / "text.txt"),
        calib_samples=2,
        calib_len=LENGTH,
        block=32,
        device="cpu",
        dtype="float32",
    )
    source = open_source(str(folder), "float32")
    program = captured_once(source.config)
    run_passes(program, [LocateAttention()])
    problem = resolve(options, program.sites, MAX_LEN, source.dtype)
    return source, problem, calibrate(source, problem, silent)


def solved(setting: Setting) -> Solution:
    _, problem, calibration = setting
    return solve(problem, calibration)


def tried_alone(setting: Setting, solution: Solution) -> float:
    source, problem, calibration = setting
    model = source.load_model(ATTENTION).requires_grad_(False)
    return trial.try_plans(model, read_samples(source, problem), [[solution]], calibration, silent)[0].loss


def test_the_loss_of_a_plan_is_the_divergence_that_all_its_layers_cause_together(setting: Setting) -> None:
    """Against a plain loop: every query attends for itself to what is old to it, errors magnified."""
    source, problem, calibration = setting
    solution = solved(setting)
    folds = Folds.of(solution, calibration)
    assert any(layer.quantized for layer in solution.plan.layers)

    def query_by_query(call: AttentionCall) -> Tensor:
        layer, (key_format, value_format) = solution.plan.layers[call.layer], solution.formats[call.layer]
        if key_format is None or value_format is None:
            return call.output()
        window, outputs = min(layer.window, LENGTH // 4), []
        keys = stored(call.key, key_format, layer.sink, layer.block, folds.keys.get(call.layer))
        values = stored(call.value, value_format, layer.sink, layer.block, folds.values.get(call.layer))
        for position in range(LENGTH):
            old = max(0, -(-(position + 1 - layer.sink - window) // layer.block)) * layer.block
            mixed = [x.clone() for x in (call.key, call.value)]
            for x, codes in zip(mixed, (keys, values), strict=True):
                part = slice(layer.sink, layer.sink + old)
                x[:, :, part] += MAGNIFIED * (codes - x)[:, :, part]
            outputs.append(call.at(torch.tensor([position])).output(*mixed))
        return torch.cat(outputs, dim=2)

    model = source.load_model(ATTENTION).requires_grad_(False)
    divergences = []
    for sample in read_samples(source, problem):
        logits = []
        for observe in (AttentionCall.output, query_by_query):
            with torch.no_grad(), observed(observe):
                logits.append(run(model, sample[None], torch.arange(LENGTH)[None])[0, LENGTH // 2 :].double())
        p, q = (x.log_softmax(-1) for x in logits)
        divergences.append((p.exp() * (p - q)).sum(-1).mean().item() / MAGNIFIED**2)
    assert tried_alone(setting, solution) == pytest.approx(sum(divergences) / 2, rel=1e-2)


def test_a_plan_that_sums_wrongly_think_best_is_found_out(setting: Setting) -> None:
    """Keys by token at 2 bits are said to cost nothing: the sum believes it, the trial does not."""
    source, problem, calibration = setting
    misled = {
        layer: {kept: 0.0 if (kept.axis, kept.bits) == ("token", 2) else 1e6 for kept in losses}
        for layer, losses in calibration.key_loss.items()
    }
    honest = propose(problem, calibration)
    with pytest.MonkeyPatch.context() as patch:
        proposals = [
            *honest,
            solve(problem, replace(calibration, key_loss=misled)),
        ]
        patch.setattr(trial, "propose", lambda *_: proposals)
        (best,) = trial.best_plans(source, [problem], calibration, silent)
    assert best.solution in honest
    assert best.loss == pytest.approx(tried_alone(setting, best.solution), rel=1e-3)
    assert tried_alone(setting, proposals[-1]) > best.loss


def test_every_budget_has_a_race_of_its_own(setting: Setting) -> None:
    """Plans for a roomy budget do not push out those for a tight one."""
    source, problem, calibration = setting
    assert problem.budget is not None
    problems = [problem, replace(problem, budget=int(1.15 * problem.budget))]
    both = trial.best_plans(source, problems, calibration, silent)
    for one, its_own in zip(both, problems, strict=True):
        (alone,) = trial.best_plans(source, [its_own], calibration, silent)
        assert one == alone
        assert its_own.budget is not None
        assert one.solution.plan.arena_bytes <= its_own.budget


def test_what_is_never_quantized_costs_nothing_and_needs_no_model(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, problem, calibration = setting
    monkeypatch.setattr(Source, "load_model", lambda *_, **__: pytest.fail("the model was run"))
    (exact,) = trial.best_plans(source, [replace(problem, budget=10**9)], calibration, silent)
    assert exact.loss == 0.0
    short_problem = replace(problem, budget=10**9, max_len=50)
    (short,) = trial.best_plans(source, [short_problem], calibration, silent)
    assert short.loss == 0.0
