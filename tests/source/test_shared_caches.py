"""Layers that attend to the keys and values of any layer before them, not only at the end of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from pmkvq_compiler.errors import CompileError
from tests.models import tiny_folder
from tests.programs import relative_error
from tests.test_families import at_8_bits, exact_model, generated, in_pieces, located_source

READS = {1: 0, 3: 0, 4: 2}
"""Layers that read the caches of others. Layer 3 comes after another owner than its own, and before that owner's."""


class InterleavedConfig(LlamaConfig):
    model_type = "interleaved_llama"
    soft_cap_of_readers: float | None = None


class InterleavedAttention(LlamaAttention):
    kept: ClassVar[dict[int, tuple[Tensor, Tensor]]] = {}

    def forward(self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        options = {"dropout": 0.0, "scaling": self.scaling, **kwargs}
        if self.layer_idx in READS:
            key, value = self.kept[READS[self.layer_idx]]
            options |= {"softcap": self.config.soft_cap_of_readers} if self.config.soft_cap_of_readers else {}
        self.kept[self.layer_idx] = key, value
        implementation = self.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, _ = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


class InterleavedForCausalLM(LlamaForCausalLM):
    config_class = InterleavedConfig

    def __init__(self, config: InterleavedConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = InterleavedAttention(config, index)
        self.post_init()


@pytest.fixture(autouse=True)
def known_to_transformers() -> Iterator[None]:
    AutoConfig.register("interleaved_llama", InterleavedConfig)
    AutoModelForCausalLM.register(InterleavedConfig, InterleavedForCausalLM)
    yield
    CONFIG_MAPPING._extra_content.pop("interleaved_llama")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(InterleavedConfig)


def test_readers_may_lie_between_owners(tmp_path: Path) -> None:
    tiny_folder(tmp_path, "interleaved_llama", num_hidden_layers=5)
    source, program = located_source(tmp_path)
    assert {site.layer: site.reads for site in program.sites if site.reads is not None} == READS
    exact = exact_model(source, program, tmp_path)
    assert [*exact.plan.places] == [0, 2]
    ids = torch.randint(3, 128, (3, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = source.load_model("eager")(ids, use_cache=False).logits
    for piece in (80, 5):
        assert relative_error(in_pieces(exact, ids, piece), expected) <= 1e-5
    layers = tuple(at_8_bits(layer) for layer in exact.plan.layers)
    plan = replace(exact.plan, recipe="8 bits", budget=sum(one.arena_bytes for one in layers), layers=layers)
    assert 0 < relative_error(in_pieces(generated(program, source, plan, tmp_path), ids, 5), expected) <= 1e-2


def test_a_reader_that_attends_in_another_way_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path, "interleaved_llama", num_hidden_layers=5, soft_cap_of_readers=3.0)
    with pytest.raises(CompileError, match="layer 1 of interleaved_llama attends to the keys and values of layer 0"):
        located_source(tmp_path)
