"""The same on a GPU, where the artifact's kernels attend: `pytest -m gpu tests/serve/test_gpu.py`."""

from __future__ import annotations

import pytest

from .engines import Served, all_free, engine, greedy, random_prompts

pytestmark = pytest.mark.gpu

LENGTHS = (7, 40, 130, 513, 777, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_graphs_do_not_change_the_text(served_tiny: Served, dtype: str) -> None:
    artifact, prompts = served_tiny(), random_prompts(LENGTHS)
    texts = []
    for eager in (True, False):
        with engine(artifact, enforce_eager=eager, dtype=dtype) as llm:
            texts.append([greedy(llm, prompts, new=100), greedy(llm, prompts[:3], new=100)])
            assert all_free(llm)
    assert texts[0] == texts[1]
