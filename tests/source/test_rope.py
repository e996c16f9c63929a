"""RoPE whose frequencies change with the length: such models compile for the length up to which they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmkvq_compiler.cli import main
from pmkvq_compiler.source.rope import FixedFrequencies, fixed_frequencies
from pmkvq_compiler.source.source import open_source
from tests.families import DYNAMIC, FAMILIES, LONGROPE
from tests.models import tiny_folder, tiny_model


@pytest.mark.parametrize(
    ("model_type", "overrides", "fixed"),
    [
        ("llama", {}, None),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, None),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 96}, FixedFrequencies("dynamic", 96)),
        ("phi3", FAMILIES["phi3, longrope"].overrides, FixedFrequencies("longrope", 128)),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}},
            FixedFrequencies("longrope", 128),
        ),
    ],
)
def test_frequencies_stay_the_same_up_to_a_length(
    model_type: str, overrides: dict[str, object], fixed: FixedFrequencies | None
) -> None:
    assert fixed_frequencies(tiny_model(model_type, **overrides).config) == fixed


@pytest.mark.parametrize("name", ["phi3, longrope", "llama, dynamic"])
def test_a_longer_text_is_refused_in_one_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_folder(tmp_path / "model", FAMILIES[name].model_type, **FAMILIES[name].overrides)
    assert open_source(str(tmp_path / "model")).max_position_embeddings == 128
    command = [str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--recipe", "none", "--max-len", "129"]
    assert main(command) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pmkvq-compile: ")]
    assert "beyond the 128 tokens up to which the RoPE" in sentence
    assert sentence.endswith("choose --max-len 128 or less")
    assert not (tmp_path / "out").exists()
