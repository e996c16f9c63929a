"""What an attention mask lets a query see is found from the mask itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from pmkvq_compiler.passes.locate_attention import markers
from pmkvq_compiler.source.masks import Sight, sight_of
from tests.families import FAMILIES
from tests.programs import captured

NO_PADDING = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("mask", "chunk", "sight"),
    [
        (causal_mask_function, None, Sight(0)),
        (causal_mask_function, 10, Sight(0)),
        (sliding_window_causal_mask_function(10), None, Sight(10)),
        (sliding_window_causal_mask_function(10), 10, Sight(10)),
        (chunked_causal_mask_function(10, NO_PADDING), 10, Sight(10, chunked=True)),
        (chunked_causal_mask_function(7, NO_PADDING), 7, Sight(7, chunked=True)),
        (chunked_causal_mask_function(1000, NO_PADDING), 1000, Sight(0)),
    ],
)
def test_causal_sliding_and_chunked_masks_are_told_apart(mask, chunk, sight) -> None:  # type: ignore[no-untyped-def]
    assert sight_of(mask, 100, chunk) == sight


def test_chunks_of_another_length_than_the_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="sees other tokens"):
        sight_of(chunked_causal_mask_function(10, NO_PADDING), 100, chunk=14)


def test_a_mask_with_a_hole_is_refused() -> None:
    def with_hole(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key != 3)

    with pytest.raises(ValueError, match="sees other tokens"):
        sight_of(with_hole, 100)


def test_markers_of_layers_with_chunks_say_so() -> None:
    family = FAMILIES["llama4"]
    found = markers(captured(family.model_type, **family.overrides).graph)
    assert [marker.args[6] for marker in found] == [12, 12, 12, 0]
    assert [marker.kwargs.get("chunked", False) for marker in found] == [True, True, True, False]
