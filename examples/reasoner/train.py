"""Train the small reasoner of the quality benchmark: `python examples/reasoner/train.py --minutes 5` on a GPU.

A Llama of 3 million parameters learns to work out ledgers (`problems.py`). Longer ledgers are added when the longest
ones so far are nearly learnt. Muon trains the matrices, AdamW everything else. `--architecture hybrid` trains another
model, in which one layer in four has attention and the others have a gated delta rule.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from multiprocessing import Value
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch
import torch.nn.functional as F
from delta_rule import fast_delta_rule
from problems import MODEL, character_tokenizer, ledger, most_entries, token_ids
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 4096
TOKENS_A_BATCH = 16 * CONTEXT
LENGTHS = (256, 512, 1024, 2048, 4096)
LEARNT = 0.02
"""Longer ledgers are added when the loss of the longest ones so far is below this (nats a token)."""

IGNORED = -100

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 6, "attention_bias": True}),
    "hybrid": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 8,
            "head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
}
"""The model type of each architecture, and its configuration beside what all of them share. Every fourth layer of the
hybrid has attention."""


class Batches(IterableDataset):  # type: ignore[type-arg]
    """Batches (`input_ids`, `labels`) of ledgers whose length is one of the first `level` + 1 of `LENGTHS`. Half of the
    batches have the longest; only the chain is to be learnt."""

    def __init__(self, level: Synchronized[int]) -> None:
        self.level = level

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        rng = random.Random(worker.seed if worker else 0)
        tokenizer = character_tokenizer()
        while True:
            longest = self.level.value
            length = LENGTHS[longest if rng.random() < 0.5 else rng.randint(0, longest)]
            rows = [self._row(rng, tokenizer, length) for _ in range(TOKENS_A_BATCH // length)]
            inputs, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
            yield inputs, labels

    def _row(self, rng: random.Random, tokenizer: PreTrainedTokenizerFast, length: int) -> tuple[list[int], list[int]]:
        longest = most_entries(length)
        entries = rng.randint(3, longest) if rng.random() < 0.2 else longest
        prompt, chain = token_ids(tokenizer, *ledger(rng, entries))
        padding = length - len(prompt) - len(chain)
        labels = [IGNORED] * len(prompt) + chain + [IGNORED] * padding
        return prompt + chain + [tokenizer.pad_token_id] * padding, labels


def new_model(tokenizer: PreTrainedTokenizerFast, architecture: str = "llama") -> PreTrainedModel:
    """The reasoner with random weights, float32."""
    model_type, own = ARCHITECTURES[architecture]
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=384,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    return AutoModelForCausalLM.from_config(config)


def train(model: PreTrainedModel, minutes: float, workers: int) -> None:
    started, seconds, level = time.time(), 60 * minutes, Value("i", 0)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    loader = DataLoader(Batches(level), batch_size=None, num_workers=workers, prefetch_factor=2)
    for step, (inputs, labels) in enumerate(loader):
        done = (time.time() - started) / seconds
        if done >= 1:
            break
        rate = min(1, (step + 1) / 100) * min(1, max(0.01, (1 - done) / 0.5))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
        inputs, labels = inputs.to(model.device), labels.to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            if inputs.shape[1] == LENGTHS[level.value] and loss.item() < LEARNT:
                level.value = min(level.value + 1, len(LENGTHS) - 1)
            if step % 100 == 0:
                print(f"{done:6.1%}  step {step:5d}  length {inputs.shape[1]:4d}  loss {loss.item():.5f}", flush=True)


@torch.no_grad()
def exact(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, entries: int, problems: int, seed: int) -> float:
    """The share of problems whose greedy chain is right in every character, found by teacher forcing."""
    rng, right = random.Random(seed), 0
    for _ in range(problems):
        prompt, chain = token_ids(tokenizer, *ledger(rng, entries))
        ids = torch.tensor([prompt + chain], device=model.device)
        greedy = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += int(torch.equal(greedy, ids[0, len(prompt) :]))
    return right / problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=12, help="processes that write ledgers (%(default)s)")
    parser.add_argument("--architecture", default="llama", choices=ARCHITECTURES, help="(%(default)s)")
    parser.add_argument("--output", default=MODEL, help="folder to write (%(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = character_tokenizer()
    model = new_model(tokenizer, arguments.architecture).to(device)
    with fast_delta_rule():
        train(model, arguments.minutes, arguments.workers)
    model.to(torch.bfloat16).eval()
    for entries in (most_entries(length) for length in LENGTHS[-3:]):
        print(f"{entries} entries: {exact(model, tokenizer, entries, 64, seed=entries):.1%} exact", flush=True)
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
