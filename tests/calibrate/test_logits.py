"""Logits in slices are the logits of the whole text, and all of them are never in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pmkvq_compiler.calibrate import logits as module
from pmkvq_compiler.calibrate.attention_hook import ATTENTION, observed, run
from pmkvq_compiler.calibrate.logits import Logits, logits_of
from pmkvq_compiler.calibrate.walk import gradient_of, sampled_loss, text_loss
from tests.fuzz import LONG_ONLY
from tests.models import tiny_folder, tiny_model

POSITIONS = torch.arange(50).unsqueeze(0)

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("gemma2", {"final_logit_softcapping": 3.0}),
    ("cohere", {"logit_scale": 0.3}),
    ("granite", {"logits_scaling": 4.0}),
    ("gpt2", {"n_embd": 64, "n_head": 4, "n_layer": 2}),
    ("gpt_neox", {}),
    ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 96}),
]


@pytest.mark.parametrize(("model_type", "overrides"), KINDS)
def test_slices_have_the_logits_of_the_whole_text(
    model_type: str, overrides: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 128 * 7)
    model = tiny_model(model_type, **overrides)
    model.set_attn_implementation(ATTENTION)
    ids = torch.randint(3, 128, (2, 50))
    with torch.no_grad(), observed(lambda call: None):
        expected, found = run(model, ids, POSITIONS), logits_of(model, ids, POSITIONS)
    for row in range(2):
        own = found.of_text(row)
        parts = list(own.parts())
        assert [part.stop for part in parts] == [*range(7, 50, 7), 50]
        torch.testing.assert_close(torch.cat([own[part] for part in parts]), expected[row])
        torch.testing.assert_close(own.last(9)[:], expected[row, -9:])
    with torch.no_grad(), observed(lambda call: None):
        torch.testing.assert_close(run(model, ids, POSITIONS), expected, msg="the model is as it was")


def whole_text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:-1], tokens[1:])


def whole_sampled_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """`sampled_loss`, from all logits at once."""
    temperature = 1.0
    while (logits.detach()[len(tokens) // 2 :] / temperature).softmax(-1).amax(-1).mean() > 0.9:
        temperature *= 2
    cumulative = (logits.detach() / temperature).softmax(-1).cumsum(-1)
    random = torch.rand(len(tokens), 1, generator=torch.Generator().manual_seed(len(tokens)))
    labels = torch.searchsorted(cumulative, random * cumulative[:, -1:])[:, 0]
    return F.cross_entropy(logits / temperature, labels, reduction="sum")


@pytest.mark.parametrize("confident", [1.0, 40.0])
@pytest.mark.parametrize(("sliced", "whole"), [(text_loss, whole_text_loss), (sampled_loss, whole_sampled_loss)])
def test_losses_in_slices_have_the_gradients_of_the_whole_loss(
    sliced: Any, whole: Any, confident: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 128 * 7)
    model = tiny_model("llama").requires_grad_(False)
    model.lm_head.weight.mul_(confident)
    model.set_attn_implementation(ATTENTION)
    ids = torch.randint(3, 128, (1, 50))
    with observed(lambda call: None):
        logits = logits_of(model, ids, POSITIONS)
    hidden = logits.hidden.detach().requires_grad_()
    whole(model.lm_head(hidden)[0], ids[0]).backward()
    torch.testing.assert_close(gradient_of(sliced, logits, ids[0]), hidden.grad)


def test_an_objective_sees_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 128 * 7)
    model = tiny_model("llama").requires_grad_(False)
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, arguments, output: seen.append(output.shape[1]))

    def objective(logits: Logits, tokens: Tensor) -> Iterator[Tensor]:
        for part in logits.parts():
            yield logits[part].square().sum()

    gradient_of(objective, logits_of(model, torch.randint(3, 128, (1, 50)), POSITIONS), torch.zeros(50))
    hook.remove()
    assert max(seen) <= 7


PEAK = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from tests.conftest import silent
folder, length = sys.argv[1], int(sys.argv[2])
compile_model(
    CompileOptions(f"{folder}/source", Path(folder, "out"), budget="30%", max_len=4096, calib=f"{folder}/calib.jsonl",
                   calib_samples=1, recipe="uniform", calib_len=length, dry_run=True, bits=(2,)), silent)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
"""


LENGTHS = [512, pytest.param(4096, marks=LONG_ONLY)]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_vocabulary_of_262144_takes_no_memory_for_all_logits_of_a_text(tmp_path: Path, length: int) -> None:
    """All logits of 4,096 tokens are 4.3 GB, and their gradients as much. Calibration, and the trial of a plan, stay
    below a third of it, with the imports and the model, whatever the length."""
    shape = {"vocab_size": 1 << 18, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 4096}
    tiny_folder(tmp_path / "source", "llama", tie_word_embeddings=True, **shape)
    ids = torch.randint(3, 1 << 18, (length,)).tolist()
    (tmp_path / "calib.jsonl").write_text(json.dumps({"input_ids": ids}) + "\n")
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(done.stdout.splitlines()[-1]) < 1.45e9
