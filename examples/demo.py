"""Load an artifact, generate until its layers must give up bits, and compare it with the model it was made from.

    python examples/demo.py out/demo

`make demo` compiles the artifact and then runs this script.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache
from transformers.utils import logging

from pmkvq_compiler import runtime
from pmkvq_compiler.report.charts import readable_bytes
from pmkvq_compiler.report.page import layer_ranges
from pmkvq_compiler.runtime import Cache
from pmkvq_compiler.source.source import open_source

PROMPT_TOKENS, NEW_TOKENS = 600, 600
PIECE, STRETCH = 64, 1024

Forward = Callable[[Tensor], Tensor]
"""Logits [S, V] of a piece [1, S] that follows the earlier pieces."""


def main(folder: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = runtime.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = files("pmkvq_compiler").joinpath("data/heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, : model.plan.max_len]

    passage = text[text.index("CHAPTER 35. The Mast-Head.") :]
    prompt = tokenizer(passage, return_tensors="pt", add_special_tokens=False).input_ids[:, :PROMPT_TOKENS]
    print(f"\nThe artifact continues {PROMPT_TOKENS} tokens of a novel:\n")
    cache = model.new_cache()
    speaker = Speaker(tokenizer, cache)
    print("..." + tokenizer.decode(prompt[0, -60:]), end="")
    model.generate(
        prompt,
        NEW_TOKENS,
        do_sample=True,
        temperature=0.8,
        top_p=0.9,
        eos_token_id=(),
        seed=1,
        streamer=speaker,
        cache=cache,
    )
    print(f"\n\nbudget             {readable_bytes(model.plan.budget)}")
    print(f"bytes reserved     {readable_bytes(cache.bytes_reserved)}")
    print(f"bytes used         {readable_bytes(cache.bytes_used)} by {cache.length[0]:,} tokens")
    print(f"tokens per second  {speaker.tokens_per_second:.1f}")

    print(f"\n{tokens.shape[1]:,} tokens of held-out text, each predicted from the cached ones before it:\n")
    source = open_source("demo").load_model("sdpa", dtype=model.dtype)
    source_cache, cache = DynamicCache(config=source.config), model.new_cache()
    with torch.inference_mode():
        compare(
            lambda piece: source(piece, past_key_values=source_cache).logits[0].float(),
            lambda piece: model(piece, cache)[0].float(),
            tokens,
        )
    print(f"\nartifact  {folder}\nreport    {folder / 'report.html'}")


@dataclass
class Speaker:
    """Prints tokens as they come and, between them, which layers were lowered."""

    tokenizer: Any
    cache: Cache
    times: list[float] = field(default_factory=list)
    bits: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, token_ids: Tensor) -> None:
        self.times.append(time.perf_counter())
        self._note_lowered()
        print(self.tokenizer.decode(token_ids), end="", flush=True)

    def _note_lowered(self) -> None:
        lowered: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
        for layer, (before, after) in enumerate(zip(self.bits, self.cache.bits, strict=False)):
            if before != after:
                lowered.setdefault((before, after), []).append(layer)
        for (before, after), layers in lowered.items():
            at = f"{self.cache.length[0]:,} tokens"
            print(f"\n  [at {at}: K, V of layers {layer_ranges(layers)} from {before} to {after} bits]")
        self.bits = self.cache.bits

    @property
    def tokens_per_second(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def compare(source: Forward, artifact: Forward, tokens: Tensor) -> None:
    """Print mean KL divergence of the next-token distributions and both perplexities, for each stretch and for all."""
    divergence, source_loss, artifact_loss = [], [], []
    for start in range(0, tokens.shape[1] - 1, PIECE):
        following = tokens[0, start + 1 : start + 1 + PIECE]
        piece = tokens[:, start : start + len(following)]
        expected, found = source(piece).log_softmax(-1), artifact(piece).log_softmax(-1)
        divergence.append((expected.exp() * (expected - found)).sum(-1))
        source_loss.append(F.nll_loss(expected, following, reduction="none"))
        artifact_loss.append(F.nll_loss(found, following, reduction="none"))

    figures = torch.stack([torch.cat(divergence), torch.cat(source_loss), torch.cat(artifact_loss)])
    print(f"{'tokens':>13}  {'KL, nats':>8}  {'perplexity: source':>18}  {'artifact':>8}")
    stretches = [(STRETCH * number, part) for number, part in enumerate(figures.split(STRETCH, dim=1))]
    for start, part in [*stretches, (0, figures)]:
        kl, *losses = part.mean(1)
        source_perplexity, artifact_perplexity = (loss.exp() for loss in losses)
        span = f"{start + 1:,} - {start + part.shape[1]:,}"
        print(f"{span:>13}  {kl:>8.4f}  {source_perplexity:>18.3f}  {artifact_perplexity:>8.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder that `pmkvq-compile demo` wrote")
    main(parser.parse_args().artifact)
