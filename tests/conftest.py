"""Artifacts of tiny models, compiled once for all tests that look at them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

from pmkvq_compiler import compile as compiler
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.emit import check
from pmkvq_compiler.options import CompileOptions

from . import check_processes
from .folders import TEXT, model_folder
from .models import SHAPE, tiny_folder
from .programs import captured_once

# Tiny tensors gain nothing from threads, which wait for each other on a busy machine: here, and in processes that tests
# start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

CompileTiny = Callable[..., Path]


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def token_lines(path: Path, seed: int = 0, lines: int = 4, count: int = 200) -> Path:
    """Calibration data of random token ids, for models without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, SHAPE["vocab_size"], (lines, count), generator=generator).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


# Tests of the process itself, of its isolation and of interrupts, have the real one: see `real_checks`.
check.subprocess = check_processes.FORKED  # type: ignore[assignment]
compiler.capture = captured_once


@pytest.fixture(scope="module")
def real_checks() -> Iterator[None]:
    """Artifacts are checked in interpreters that are started anew, as they are for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "subprocess", subprocess)
        yield


@pytest.fixture(scope="session", autouse=True)
def modules_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies remote code into a folder of its own; let it be one that goes away."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="session")
def compile_tiny(tmp_path_factory: pytest.TempPathFactory) -> CompileTiny:
    """`compile_tiny("llama", recipe="none")`: the artifact's folder; its source model lies in `source` beside it."""
    made: dict[str, Path] = {}

    def compile_once(model_type: str, overrides: dict[str, Any] | None = None, **options: Any) -> Path:
        key = json.dumps([model_type, overrides, options], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            tiny_folder(folder / "source", model_type, **(overrides or {}))
            made[key] = folder / "artifact"
            chosen = {"max_len": 400, "block": 32, "window": 64, "calib_samples": 3, "calib_len": 64, **options}
            calib = str(token_lines(folder / "tokens.jsonl"))
            compile_model(CompileOptions(model=str(folder / "source"), output=made[key], calib=calib, **chosen), silent)
        return made[key]

    return compile_once


@pytest.fixture(scope="session")
def chat_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a tokenizer and a chat template; its package is `tiny_qwen`."""
    folder = tmp_path_factory.mktemp("chat")
    source = model_folder(folder / "tiny-qwen", "qwen2")
    (source / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}<assistant>"
    )
    (folder / "calib.txt").write_text(TEXT)
    calib: dict[str, Any] = {"calib": str(folder / "calib.txt"), "calib_samples": 2, "calib_len": 128}
    options: dict[str, Any] = {"budget": "60%", "max_len": 300, "block": 64, "window": 64}
    compile_model(CompileOptions(str(source), folder / "artifact", **options, **calib), silent)
    return folder / "artifact"
