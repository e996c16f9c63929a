"""Models that count the tokens of a call themselves take positions from the input instead."""

from __future__ import annotations

import torch

from pmkvq_compiler.source.positions import counted_positions
from tests.families import FAMILIES
from tests.models import tiny_model
from tests.programs import captured, relative_error, run_in_float64


def test_a_temperature_of_positions_is_that_of_the_input() -> None:
    """Llama 4 scales queries of layers without RoPE by a number that grows with the position."""
    family = FAMILIES["llama4"]
    overrides = {**family.overrides, "attention_chunk_size": 512, "num_hidden_layers": 4}
    program, model = captured(family.model_type, **overrides), tiny_model(family.model_type, **overrides)
    assert counted_positions(program.graph) == []
    ids = torch.randint(3, 128, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.double()(ids).logits
    assert relative_error(run_in_float64(program, tiny_model(family.model_type, **overrides), ids)[0], expected) < 1e-5
