"""lm-evaluation-harness on an artifact, on the task in `examples/evaluation`, with no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions

from .conftest import silent
from .folders import TEXT, model_folder

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")

ROOT = Path(__file__).parent.parent
QUESTIONS = 4


def test_tasks_of_the_papers_benchmarks_are_found_and_judged() -> None:
    from lm_eval.tasks import TaskManager

    from examples.evaluation.boxed import process_results
    from examples.evaluation.programs import programs

    tasks = TaskManager(include_path=str(ROOT / "examples" / "evaluation")).all_tasks
    assert {"aime24", "aime25", "cmimc25", "livecodebench"} <= set(tasks)
    answers = {"So it is $\\boxed{\\frac{1}{2}}$.": 1, "So it is $\\boxed{2}$.": 0}
    for answer, right in answers.items():
        assert process_results({"answer": "\\frac12"}, [answer]) == {"exact_match": right}
    said = "First\n```python\nprint(1)\n```\nNo:\n```python\nprint(2)\n```\n"
    samples = [json.dumps({"doc": {"question_id": name}, "resps": [[said, "I do not know."]]}) for name in "ab"]
    assert programs(samples) == [{"question_id": name, "code_list": ["print(2)\n", ""]} for name in "ab"]


def evaluate(model: Path) -> tuple[dict[str, Any], Any]:
    """Results of both tasks, and the model that the harness loaded."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = HFLM(pretrained=str(model), trust_remote_code=True, device="cpu", batch_size=2)
    results = lm_eval.simple_evaluate(
        loaded,
        tasks=["recall", "recall_generate"],
        limit=QUESTIONS,
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_path=str(ROOT / "examples" / "evaluation"), include_defaults=False),
    )
    return results, loaded.model


def test_unquantized_artifact_scores_what_its_source_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    source, artifact = model_folder(tmp_path / "source", num_hidden_layers=1), tmp_path / "artifact"
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.eos_token = tokenizer.pad_token = chr(2)  # the harness asks for both
    tokenizer.save_pretrained(source)
    (tmp_path / "calib.txt").write_text(TEXT)
    options: dict[str, Any] = {"calib": str(tmp_path / "calib.txt"), "calib_samples": 2, "calib_len": 128}
    compile_model(CompileOptions(str(source), artifact, recipe="none", max_len=512, batch_size=2, **options), silent)
    (expected, plain), (found, compiled) = evaluate(source), evaluate(artifact)
    assert hasattr(compiled, "compiled")
    assert not hasattr(plain, "compiled")
    for task in ("recall", "recall_generate"):
        scores = [
            {name: value for name, value in results["results"][task].items() if "stderr" not in name}
            for results in (found, expected)
        ]
        assert scores[0] == scores[1]
    for one, other in zip(found["samples"]["recall"], expected["samples"]["recall"], strict=True):
        likelihoods = [torch.tensor([float(answer[0]) for answer in each["filtered_resps"]]) for each in (one, other)]
        assert len(likelihoods[0]) == 4
        torch.testing.assert_close(*likelihoods, rtol=1e-4, atol=1e-4)
    generated = [[each["resps"] for each in results["samples"]["recall_generate"]] for results in (found, expected)]
    assert generated[0] == generated[1]
    assert len(generated[0]) == QUESTIONS
