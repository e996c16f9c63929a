"""Multimodal models that are kept whole: vLLM serves them, with packed pages for their language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.runtime.errors import InputError
from pmkvq_compiler.runtime.vllm import attach
from tests.conftest import silent, token_lines
from tests.source import test_multimodal
from tests.source.test_multimodal import WHOLE, whole_model

from .engines import SHAPE, all_free, engine, greedy, random_prompts
from .test_refusals import configure, sentence

TEXT_ALONE = {"limit_mm_per_prompt": {"image": 0}}
"""Images would need a processor, and a tokenizer that knows their tokens."""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The artifact of a SmolVLM that was kept whole (True), and that of its language model alone (False)."""
    folder = tmp_path_factory.mktemp("smolvlm")
    shape = {**WHOLE["smolvlm"]["text_config"], **SHAPE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(test_multimodal.WHOLE, "smolvlm", {**WHOLE["smolvlm"], "text_config": shape})
        whole_model("smolvlm", folder / "source")
    calib = str(token_lines(folder / "tokens.jsonl", count=300))
    options: dict[str, Any] = {"budget": "25%", "max_len": 1400, "calib": calib, "calib_samples": 2, "calib_len": 192}
    for whole in (True, False):
        compile_model(CompileOptions(str(folder / "source"), folder / str(whole), whole=whole, **options), silent)
    return {whole: folder / str(whole) for whole in (True, False)}


def test_the_whole_model_continues_texts_as_its_language_model_alone_does(artifacts: dict[bool, Path]) -> None:
    prompts = random_prompts((7, 130, 513))
    with engine(artifacts[False]) as llm:
        expected = greedy(llm, prompts)
    with engine(artifacts[True], **TEXT_ALONE) as llm:
        assert llm.llm_engine.model_config.architecture == "SmolVLMForConditionalGeneration"
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        assert any("vision" in name for name, _ in model.named_modules())
        assert greedy(llm, prompts) == expected
        assert all_free(llm)


def test_images_that_are_seen_in_both_directions_are_refused(
    artifacts: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Gemma 3, whose code in vLLM needs packages that are not installed here."""
    config = configure(artifacts[True])
    vars(config.model_config).pop("is_mm_prefix_lm", None)  # some versions keep it there
    monkeypatch.setattr(type(config.model_config), "is_mm_prefix_lm", True)
    with pytest.raises(InputError, match="the tokens of an image see each other") as caught:
        attach.prepare(config)
    assert "--language-model-only" in sentence(caught.value)
