"""A loaded artifact: weights, the generated forward function and the plan."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor

from .cache import Cache
from .errors import InputError
from .forward import Forward
from .generate import Streamer, generate


@dataclass(frozen=True, eq=False)
class CompiledModel(Forward):
    """Call it for logits, or let it generate. Threads may share it; each needs a cache of its own."""

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int | None = None,
        streamer: Streamer | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Continue prompts [B, S] by up to `max_new_tokens`; see `pmkvq_compiler.runtime.generate.generate`."""
        options: dict[str, Any] = {
            "do_sample": do_sample,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "eos_token_id": eos_token_id,
            "seed": seed,
            "streamer": streamer,
            "attention_mask": attention_mask,
            "cache": cache,
        }
        return generate(self, input_ids, max_new_tokens, **options)

    def __copy__(self) -> CompiledModel:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModel:
        """A model with weights of its own."""
        own = {name: copy.deepcopy(getattr(self, name), memo) for name in ("weights", "hidden_states", "logits")}
        memo[id(self)] = twin = replace(self, **own)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise InputError(
            "a loaded model cannot be pickled or saved, for its code is the artifact's; pass the artifact's folder on "
            "and load it there"
        )
