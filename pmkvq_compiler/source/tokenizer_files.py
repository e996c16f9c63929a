"""The files of a tokenizer beside a checkpoint, and a test of the tokenizer that was read from them."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
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
TOKENIZER_SUFFIXES = frozenset({".json", ".model", ".txt", ".jinja", ".tiktoken", ".bpe"})
OTHER_FILES = frozenset({"config.json", "generation_config.json", "model.safetensors.index.json"})
"""Files with such suffixes that do not belong to a tokenizer."""

PROBE = "The whale, of 30 tons:\n\tit swam \u2013 on!"


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_files(folder: Path) -> list[Path]:
    """Every file that may affect how texts become tokens; none if there is no tokenizer."""
    if not has_tokenizer(folder):
        return []
    files = (path for path in folder.iterdir() if path.suffix in TOKENIZER_SUFFIXES and path.is_file())
    return sorted(path for path in files if path.name not in OTHER_FILES)


def try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Use a tokenizer once in every way in which a compile uses it, because some damage shows only then.

    Raises whatever the tokenizer raises. Raises `ValueError` for a template that could not be saved in an artifact's
    folder, and for tokens with equal ids. References to code are removed.
    """
    tokenizer.init_kwargs.pop("auto_map", None)
    for template in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"[\w.-]+", template):
            raise ValueError(f"it has a chat template called {template!r}, which is not a file name")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.get_vocab(with_added_tokens=False) if isinstance(backend, Tokenizer) else {}
    if len(set(vocabulary.values())) < len(vocabulary):  # added tokens are not counted: they may replace another token
        raise ValueError("two of its tokens have the same id, so one of them would be lost")
    tokenizer.decode(tokenizer.encode(PROBE))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
