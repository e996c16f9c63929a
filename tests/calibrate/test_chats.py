"""Conversations of a calibration text are rendered as transformers renders them, and no template can hang a compile."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pmkvq_compiler.calibrate import chats
from pmkvq_compiler.calibrate.chats import AT_ONCE, Chat, render_chats
from pmkvq_compiler.cli import main
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.source.source import open_source
from tests.folders import model_folder
from tests.fuzz import LONG_ONLY
from tests.test_chat_templates import BOMBS, CONVERSATIONS, FAULTS, QWEN, TEMPLATES

SHORT = [{"role": "user", "content": "Ahoy"}, {"role": "assistant", "content": "Aye"}]
PICKY = (
    "{% if messages[0].content == 'loop' %}{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)
SOME_BOMBS = ("a loop", "loops that print", "a product", "doubling", "two macros", "a long text", "a list", "a range")
"""Of each kind one or two; all of them are tried on artifacts."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = open_source(str(model_folder(tmp_path_factory.mktemp("chats") / "model"))).tokenizer
    assert tokenizer is not None
    tokenizer.add_special_tokens({"bos_token": "<", "eos_token": ">"})
    return tokenizer


def with_template(tokenizer: Any, template: Any) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def spoken(*contents: str) -> list[Chat]:
    return [Chat(f"line {number}", [{"role": "user", "content": one}]) for number, one in enumerate(contents, 1)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_rendered_as_by_transformers(tokenizer: Any, name: str) -> None:
    theirs = with_template(tokenizer, TEMPLATES[name])
    expected, taken = [], []
    for messages in CONVERSATIONS:
        plain = not any({"reasoning", "thinking"} & message.keys() for message in messages)
        try:
            text = theirs.apply_chat_template(messages, tokenize=False)
        except Exception:
            with pytest.raises(CompileError, match="does not fit the model's chat template"):
                list(render_chats(theirs, [Chat("here", messages)]))
            continue
        if plain:  # older versions know the reasoning under one name alone
            expected.append(text)
            taken.append(Chat("here", messages))
    assert list(render_chats(theirs, taken)) == expected
    assert len(expected) > 3


def test_many_conversations_stay_in_their_order(tokenizer: Any) -> None:
    words = [f"word {number}" for number in range(2 * AT_ONCE + 3)]
    start = time.monotonic()
    assert list(render_chats(with_template(tokenizer, "{{ messages[0].content }}"), spoken(*words))) == words
    assert time.monotonic() - start < 10, "a process for many, not one for each"


def test_no_template_hangs_or_exhausts_a_compile(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "RENDER_SECONDS", 2)

    def explode(bomb: str) -> str:
        alone = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, chat_template=bomb)
        with pytest.raises(CompileError, match="line 1, does not fit the model's chat template") as caught:
            list(render_chats(alone, spoken("Ahoy")))
        return str(caught.value)

    start = time.monotonic()
    with ThreadPoolExecutor(len(SOME_BOMBS)) as pool:
        reasons = list(pool.map(explode, (BOMBS[name] for name in SOME_BOMBS)))
    assert time.monotonic() - start < 15
    assert not any("\n" in reason for reason in reasons)
    assert any("seconds" in reason for reason in reasons)


@pytest.mark.parametrize("place", [pytest.param(3, marks=LONG_ONLY), AT_ONCE + 1])
def test_the_one_conversation_that_takes_too_long_is_named(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(chats, "RENDER_SECONDS", 2)
    words = ["a"] * (AT_ONCE + 4)
    words[place] = "loop"
    with pytest.raises(CompileError, match=rf"^line {place + 1}, does not fit .*: it (ended with|takes more than 2)"):
        list(render_chats(with_template(tokenizer, PICKY), spoken(*words)))


@pytest.mark.parametrize("template", [one for one in FAULTS if "ud800" not in one])
def test_what_a_template_raises_is_one_sentence_with_the_line(tokenizer: Any, template: str) -> None:
    with pytest.raises(CompileError, match=r"^line 1, does not fit the model's chat template: .") as caught:
        list(render_chats(with_template(tokenizer, template), spoken("Ahoy")))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("template", [None, {"tool_use": QWEN}])
def test_a_model_without_a_chat_template_is_named(tokenizer: Any, template: Any) -> None:
    with pytest.raises(CompileError, match=r"^line 1, does not fit the model's chat template"):
        list(render_chats(with_template(tokenizer, template), spoken("Ahoy")))


@pytest.mark.parametrize("messages", [[], ["Ahoy"], [None], [["role", "user"]], [SHORT[0], 5]])
def test_messages_that_are_none_are_named(tokenizer: Any, messages: list[Any]) -> None:
    with pytest.raises(CompileError, match=r"^here, does not fit .*its messages are not a list of objects"):
        list(render_chats(with_template(tokenizer, QWEN), [Chat("here", messages)]))


def test_a_template_that_never_ends_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with a folder as it is downloaded: one sentence, exit code 1, nothing written."""
    monkeypatch.setattr(chats, "RENDER_SECONDS", 2)
    model = model_folder(tmp_path / "model")
    (model / "chat_template.jinja").write_text(BOMBS["a loop"])
    (tmp_path / "calib.jsonl").write_text(json.dumps({"messages": SHORT}) + "\n")
    calib = ["--calib", str(tmp_path / "calib.jsonl"), "--calib-samples", "1", "--calib-len", "80"]
    start = time.monotonic()
    code = main([str(model), "-o", str(tmp_path / "out"), "--budget", "60%", "--max-len", "300", *calib])
    assert time.monotonic() - start < 40
    said = capsys.readouterr().err
    assert code == 1
    assert "line 1, does not fit the model's chat template" in said.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.jsonl", "model"]
