"""Model folders as a user has them: weights and a tokenizer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_folder

TEXT = "The whale swam on, and the ship followed it through the fog of the morning.\n" * 400


def model_folder(path: Path, model_type: str = "llama", **overrides: Any) -> Path:
    """A tiny model with random weights and a tokenizer of one token a character."""
    tiny_folder(path, model_type, **overrides)
    vocabulary = {chr(code): code for code in range(128)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    return path


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: the content of its files, None for its folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def open_to_others(folder: Path) -> None:
    """Let other users look into a folder of pytest's, whose folders are for their owner alone."""
    temporary = Path(tempfile.gettempdir())
    for one in (folder, *folder.parents):
        if one.is_relative_to(temporary) and one != temporary:
            one.chmod(0o755)
