"""Long chains of thought that are right or wrong: ledgers of sums, with one character for each token.

A problem's prompt lists named entries. Each is a digit, or the sum or difference (modulo 10) of two earlier entries.
The chain works every entry out:

    prompt   q8;か7;ネq-か;Bネ+q;?\\n
    chain    q8;か7;ネq8-か7=ネ1;Bネ1+q8=B9;!\\n

The right chain is unique. Every entry may be needed again until the end, and one wrong character spoils all entries
that depend on it, so the losses of a key/value cache show. An entry takes 15 tokens, prompt and chain together.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LITERALS = 8
"""Entries at the start that are given as numbers."""

NAMES = string.ascii_letters + "".join(chr(code) for code in [*range(0x3041, 0x3094), *range(0x30A1, 0x30F7)])
CHARACTERS = "0123456789=+-;?!\n" + NAMES
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
MODEL = Path(__file__).with_name("model")


def ledger(rng: random.Random, entries: int) -> tuple[str, str]:
    """Prompt and right chain of a random ledger of `entries` entries, of which there are at most `len(NAMES)`."""
    prompt, chain, values = [], [], []
    names = rng.sample(NAMES, entries)
    for index, name in enumerate(names):
        if index < LITERALS:
            values.append(rng.randrange(10))
            prompt.append(f"{name}{values[-1]};")
            chain.append(prompt[-1])
        else:
            left, right, sign = rng.randrange(index), rng.randrange(index), rng.choice("+-")
            a, b = values[left], values[right]
            values.append((a + b if sign == "+" else a - b) % 10)
            prompt.append(f"{name}{names[left]}{sign}{names[right]};")
            chain.append(f"{name}{names[left]}{a}{sign}{names[right]}{b}={name}{values[-1]};")
    return "".join(prompt) + "?\n", "".join(chain) + "!\n"


def most_entries(tokens: int) -> int:
    """Entries of the longest ledger whose prompt and chain, with `<s>` and `</s>`, have at most `tokens` tokens."""
    around, literal, entry = 6, 6, 15
    return min(len(NAMES), LITERALS + (tokens - around - LITERALS * literal) // entry)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; a text begins with `<s>`."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, chain: str) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, with `<s>`, and of the chain, with `</s>`."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[BOS], *map(vocabulary.__getitem__, prompt)], [
        *map(vocabulary.__getitem__, chain),
        vocabulary[EOS],
    ]
