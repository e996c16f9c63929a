"""Damaged configs, tokenizers and headers of weights: the result is the one that transformers has, or one sentence."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.emit.rehearsal import locate
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.source.gguf_config import HARMLESS, NEUTRAL
from pmkvq_compiler.source.source import Source, open_source
from tests.conftest import silent
from tests.folders import TEXT, model_folder
from tests.fuzz import rounds
from tests.fuzz.mutate import flip_bits, mutate_bytes, mutate_json
from tests.gguf_files import gguf_file
from tests.refusals import is_one_sentence, refusal

LONGEST = 10
"""Seconds that a mutant may take."""
IDS = torch.arange(3, 40).unsqueeze(0)
SAMPLE = "The whale swam on."
SHAPE = {"num_hidden_layers": 2, "vocab_size": 128}

Mutation = Callable[[Path, random.Random], None]


class Hang(BaseException):
    """Not to be taken for an error of the model's."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """So many seconds of this process's work, and six times as many on a machine that others use, too."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise Hang

    timers = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 6 * seconds)}
    before = {number: signal.signal(number, ring) for number, _ in timers.values()}
    for timer, (_, limit) in timers.items():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, (number, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def dry(path: Path, graph: bool) -> None:
    """All that a compile does with a source before it measures anything; the `graph` is of the config alone."""
    source = open_source(str(path))
    source.fingerprint  # noqa: B018 (computed when asked for)
    if source.tokenizer is not None:
        source.tokenizer.encode(SAMPLE)
    if graph:
        locate(capture(source.config), source.config.model_type)
    source.load_model("eager")


def logits(model: Any) -> torch.Tensor:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out: torch.Tensor = model.eval()(IDS % model.config.get_text_config().vocab_size).logits
    return out


def check_like_transformers(source: Source, folder: Path) -> None:
    """Another reading of the same folder: the same numbers under the same names, the same logits."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    ours = source.load_model("eager", dtype=torch.float32)
    for name, value in theirs.state_dict().items():
        assert torch.equal(source.read(name).float(), value), name
    assert torch.equal(logits(ours), logits(theirs))


def check_tokens(source: Source, folder: Path, work: Path) -> None:
    """What is written with an artifact makes the same tokens as the folder's own files."""
    assert source.tokenizer is not None
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert source.tokenizer.encode(SAMPLE) == theirs.encode(SAMPLE)
    source.save_tokenizer(work)
    assert AutoTokenizer.from_pretrained(work).encode(SAMPLE) == theirs.encode(SAMPLE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("fuzz") / "model", **SHAPE)


def edit_json(name: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        value = mutate_json(json.loads((folder / name).read_text(encoding="utf-8")), rng)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")

    return mutate


def edit_bytes(name: str) -> Mutation:
    def mutate(folder: Path, rng: random.Random) -> None:
        (folder / name).write_bytes(mutate_bytes((folder / name).read_bytes(), rng))

    return mutate


def edit_header(folder: Path, rng: random.Random) -> None:
    """Bytes of a safetensors header."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(mutate_bytes(data[:end], rng) + data[end:])


def edit_header_values(folder: Path, rng: random.Random) -> None:
    """A safetensors header of the right length that says something else."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    name = rng.choice([name for name in header if name != "__metadata__"])
    choice = rng.randrange(5)
    if choice == 0:
        other = rng.choice([one for one in header if one not in (name, "__metadata__")])
        header[name], header[other] = header[other], header[name]
    elif choice == 1:
        header[name]["dtype"] = rng.choice(["I32", "U32", "F16", "BF16", "F8_E4M3", "I8", "BOOL", "F64", "X", "C64"])
    elif choice == 2:
        header[f"{name}{rng.choice(['_', '.weight', ''])}{rng.randrange(9)}"] = header.pop(name)
    elif choice == 3:
        header[name]["shape"] = header[name]["shape"][::-1]
    else:
        header = mutate_json(header, rng)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


FOLDER_KINDS: dict[str, tuple[list[Mutation], tuple[int, int]]] = {
    "config": ([edit_json("config.json"), edit_json("config.json"), edit_bytes("config.json")], (5, 150)),
    "tokenizer": (
        [
            edit_json("tokenizer.json"),
            edit_bytes("tokenizer.json"),
            edit_json("tokenizer_config.json"),
            edit_bytes("tokenizer_config.json"),
        ],
        (6, 125),
    ),
    "generation config": ([edit_json("generation_config.json"), edit_bytes("generation_config.json")], (3, 50)),
    "safetensors header": ([edit_header, edit_header_values], (6, 125)),
}


@pytest.mark.parametrize("kind", FOLDER_KINDS)
def test_a_damaged_folder_is_read_as_transformers_reads_it_or_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    mutations, counts = FOLDER_KINDS[kind]
    outcomes: Counter[str] = Counter()
    for seed in range(rounds(*counts)):
        rng = random.Random(f"{kind} {seed}")
        work = tmp_path / str(seed)
        shutil.copytree(folder, work / "model")
        rng.choice(mutations)(work / "model", rng)
        with within(LONGEST):
            sentence = refusal(partial(dry, work / "model", graph=kind == "config"))
        if sentence is not None:
            assert is_one_sentence(sentence), seed
            outcomes["refused"] += 1
        else:
            source = open_source(str(work / "model"))
            source.save_generation_config(work, 400)
            assert GenerationConfig.from_pretrained(work).use_cache is not False
            (work / "model" / "generation_config.json").unlink()  # transformers ends raw on what is left out here
            check_like_transformers(source, work / "model")
            if source.tokenizer is not None:
                check_tokens(source, work / "model", work / "saved")
            outcomes["same"] += 1
        shutil.rmtree(work)
    print(kind, dict(outcomes))
    assert outcomes["same"] or outcomes["refused"]


def test_a_damaged_gguf_header_is_applied_or_refused(tmp_path: Path) -> None:
    intact = tmp_path / "model.gguf"
    gguf_file(intact, tokenizer=True, **SHAPE)
    end = min(tensor.data_offset for tensor in GGUFReader(intact).tensors)
    data, before = intact.read_bytes(), open_source(str(intact))
    fields, tokens, expected = keys(intact), before.tokenizer.encode(SAMPLE), logits(before.load_model("eager"))
    outcomes: Counter[str] = Counter()
    path = tmp_path / "mutant.gguf"
    for seed in range(rounds(6, 200)):
        rng = random.Random(f"gguf {seed}")
        # Most of a header is the vocabulary: look at what is before it as often as at all of it.
        stop = rng.choice((end, data.index(b"tokenizer.ggml.tokens"), end))
        path.write_bytes(rng.choice((mutate_bytes, flip_bits))(data[:stop], rng) + data[stop:])
        with within(LONGEST):
            sentence = refusal(partial(dry, path, graph=True))
        if sentence is not None:
            assert is_one_sentence(sentence), seed
            outcomes["refused"] += 1
            continue
        source = open_source(str(path))
        changed = {key for key, value in keys(path).items() if fields.get(key) != value} | fields.keys() - keys(path)
        names = {key.removeprefix("llama.") for key in changed if key.startswith("llama.")} - HARMLESS - NEUTRAL.keys()
        if names:
            assert source.config.to_dict() != before.config.to_dict(), (seed, names)
        else:
            assert torch.equal(logits(source.load_model("eager")), expected), (seed, changed)
        if not any(key.startswith("tokenizer.") for key in changed):
            assert source.tokenizer.encode(SAMPLE) == tokens, seed
        outcomes["applied" if names else "same"] += 1
    print("gguf header", dict(outcomes))
    assert outcomes["refused"]
    assert outcomes["same"] or outcomes["applied"]


def keys(path: Path) -> dict[str, Any]:
    """The header as llama.cpp's own reader has it."""
    return {key: field.contents() for key, field in GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


def test_whole_compiles_of_damaged_folders(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    for seed in range(rounds(1, 20)):
        rng = random.Random(f"whole {seed}")
        work = tmp_path / str(seed)
        shutil.copytree(folder, work / "model")
        kind = rng.choice(list(FOLDER_KINDS))
        rng.choice(FOLDER_KINDS[kind][0])(work / "model", rng)
        options = CompileOptions(
            model=str(work / "model"),
            output=work / "out",
            recipe="none",
            max_len=128,
            calib=str(tmp_path / "text.txt"),
            calib_samples=2,
            calib_len=96,
        )
        sentence = refusal(partial(compile_model, options, silent))
        assert sentence is None or is_one_sentence(sentence), seed
        assert (work / "out").exists() == (sentence is None), seed
