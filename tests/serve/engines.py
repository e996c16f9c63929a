"""Engines of vLLM in this process, and what is asked of them."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.reasoner.problems import ledger, most_entries, token_ids

SETTINGS = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
REASONER = Path(__file__).parent.parent.parent / "examples" / "reasoner"
Served = Callable[..., Path]
Alone = Callable[..., list[list[int]]]

SHAPE = {
    "vocab_size": 192,
    "hidden_size": 96,
    "head_dim": 32,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 4096,
}
"""Heads for two ranks and for three; vLLM's own attention on a CPU wants head_dim 32."""

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "seed": 0,
    "max_model_len": 1400,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
}


@contextmanager
def engine(model: Path | str, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` with `ENGINE` and these options."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=str(model), **{**ENGINE, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(llm: Any, prompts: list[list[int]], new: int = 24, together: bool = True) -> list[list[int]]:
    """Tokens that continue each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    batches = [asked] if together else [[one] for one in asked]
    done = [one for batch in batches for one in llm.generate(batch, sampling, use_tqdm=False)]
    return [list(one.outputs[0].token_ids) for one in done]


def block_pool(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def all_free(llm: Any) -> bool:
    """Whether every block is free but the one that is nobody's."""
    pool = block_pool(llm)
    return bool(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)


def random_prompts(lengths: tuple[int, ...] = (7, 40, 130, 300, 513, 777, 1200, 64)) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, SHAPE["vocab_size"]) for _ in range(length)] for length in lengths]


def chains(count: int, tokens: int, seed: int = 1) -> list[tuple[list[int], list[int], str, str]]:
    """Ids of prompts and right chains, and their texts."""
    from transformers import AutoTokenizer

    tokenizer, rng = AutoTokenizer.from_pretrained(REASONER / "model"), random.Random(seed)
    texts = [ledger(rng, most_entries(tokens)) for _ in range(count)]
    return [(*token_ids(tokenizer, *text), *text) for text in texts]
