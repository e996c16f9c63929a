"""The files of a tokenizer beside a checkpoint, and a trial of what was read from them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
"""A model whose folder has none of these has no tokenizer."""
TOKENIZER_PARTS = ("added_tokens.json", "special_tokens_map.json", "merges.txt", "chat_template.jinja")
"""Files that say more of a tokenizer where one of `TOKENIZER_FILES` is."""

PROBE = "The whale, of 30 tons:\n\tit swam \u2013 on!"


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_files(folder: Path) -> list[Path]:
    """Every file that decides which tokens a text is."""
    return [folder / name for name in sorted({*TOKENIZER_FILES, *TOKENIZER_PARTS}) if (folder / name).is_file()]


def try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Do with a tokenizer what will be done with it: some of what a damaged file says is only read then.

    Raises whatever it raises, and `ValueError` for what would be lost, or be written outside of an artifact's folder.
    References to code are dropped.
    """
    tokenizer.init_kwargs.pop("auto_map", None)
    for template in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"[\w.-]+", template):
            raise ValueError(f"it has a chat template called {template!r}, which is no file name")
    vocabulary = tokenizer.get_vocab()
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two of its tokens have the same id, of which one would be lost")
    tokenizer.decode(tokenizer.encode(PROBE))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
