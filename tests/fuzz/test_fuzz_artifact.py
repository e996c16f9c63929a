"""Damaged artifacts: each loads to what it was, or says in one sentence what is wrong with it.

A short run tries 200 mutants, `make fuzz` 2,000. Where a mutant is to be reached, the digest of what it changes is
written anew; what only a digest can tell is then left alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.cubins import Archive
from pmkvq_compiler.runtime.manifest import file_digest, open_artifact

from .mutants import FACTOR, run
from .mutate import mutate_bytes, mutate_json_text

PACKAGE = "tiny_qwen"
IDS = torch.arange(3, 43).view(2, 20)
TEXT, CHAT = "The whale swam on.", [{"role": "user", "content": "Is it a whale?"}]
ARCHIVE = f"{PACKAGE}/kernels/aot/sm_90.zip"

Mutator = Callable[["Copy", random.Random], None]


class Copy:
    """A copy of the artifact that mutators change and that is put right again."""

    def __init__(self, original: Path, folder: Path) -> None:
        self.original = original
        self.folder = Path(shutil.copytree(original, folder))
        self.manifest: dict[str, Any] = json.loads((original / "pmkvq.json").read_text())
        self.changed: set[str] = set()

    def read(self, name: str) -> bytes:
        return (self.original / name).read_bytes()

    def write(self, name: str, content: bytes, listed: bool = False) -> None:
        """Change a file; `listed`: with its digest."""
        (self.folder / name).write_bytes(content)
        self.changed.add(name)
        if listed:
            files = {**self.manifest["files"], name: file_digest(self.folder / name)}
            self.write("pmkvq.json", json.dumps({**self.manifest, "files": files}).encode())

    def restore(self) -> None:
        for name in self.changed:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.original / name, path)
        self.changed.clear()


# ---- mutators ----


def bytes_of_any_file(copy: Copy, generator: random.Random) -> None:
    """The digests tell."""
    name = generator.choice(["pmkvq.json", "README.md", *copy.manifest["files"]])
    copy.write(name, mutate_bytes(copy.read(name), generator))


def files_that_are_something_else(copy: Copy, generator: random.Random) -> None:
    name = generator.choice(["pmkvq.json", *copy.manifest["files"]])
    path = copy.folder / name
    copy.changed.add(name)
    path.unlink()
    match generator.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to(path)
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            other = generator.choice(list(copy.manifest["files"]))
            shutil.copy(copy.original / other, path)


def manifest(copy: Copy, generator: random.Random) -> None:
    copy.write("pmkvq.json", mutate_json_text(copy.manifest, generator).encode("utf-8", "surrogatepass"))


def manifest_and_plan(copy: Copy, generator: random.Random) -> None:
    """A part of the manifest that others are compared with."""
    part = generator.choice(("plan", "tensors", "files", "weights", "vocab_size", "package", "key_rotations"))
    text = mutate_json_text(copy.manifest[part], generator)
    whole = json.dumps({**copy.manifest, part: "HERE"}).replace('"HERE"', text)
    copy.write("pmkvq.json", whole.encode("utf-8", "surrogatepass"))


def settings(copy: Copy, generator: random.Random) -> None:
    names = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", f"{PACKAGE}/kernels/tuning.json")
    name = generator.choice(names)
    text = mutate_json_text(json.loads(copy.read(name)), generator)
    copy.write(name, text.encode("utf-8", "surrogatepass"), listed=True)


def bytes_of_settings(copy: Copy, generator: random.Random) -> None:
    names = ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja")
    name = generator.choice((*names, f"{PACKAGE}/kernels/tuning.json"))
    copy.write(name, mutate_bytes(copy.read(name), generator), listed=True)


def headers(copy: Copy, generator: random.Random) -> None:
    """Names, dtypes, shapes and places of tensors, one tensor at a time."""
    name = generator.choice(("model.safetensors", f"{PACKAGE}/constants.safetensors"))
    content = copy.read(name)
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    tensor = generator.choice([key for key in header if key != "__metadata__"])
    text = mutate_json_text({tensor: header.pop(tensor)}, generator)
    if text.startswith("{") and generator.random() < 0.9:
        text = json.dumps({**header, "HERE": 0}).replace('"HERE": 0', text.strip("{}") or '"a": 0')
    changed = text.encode("utf-8", "surrogatepass")
    length = len(changed) if generator.random() < 0.9 else generator.choice((0, 1, 2**40, 2**63, len(changed) - 1))
    copy.write(name, length.to_bytes(8, "little") + changed + data, listed=True)


def tensors_cut(copy: Copy, generator: random.Random) -> None:
    name = generator.choice(("model.safetensors", f"{PACKAGE}/constants.safetensors"))
    content = copy.read(name)
    copy.write(name, content[: generator.randrange(len(content))], listed=True)


JUNK = (
    b"",
    b"\0",
    b"(",
    b"raise ValueError('no')",
    b"1 / 0",
    b"import nothing_like_it",
    b"\xff",
    b"x = 1\n",
    b"(" * 500,
)
EDITS = (
    ("budget=", "budget=1"),
    ("(", ")"),
    ("window=", "windows="),
    ("False", "True"),
    ("bits=", "bits=1"),
    ("8", "9"),
)


def plan_module(copy: Copy, generator: random.Random) -> None:
    name = f"{PACKAGE}/plan.py"
    text = copy.read(name).decode()
    if generator.random() < 0.5:
        numbers = list(re.finditer(r"\d+", text))
        number = generator.choice(numbers)
        other = generator.choice(("0", "1", "16", "-1", "1.5", "None", "True", "'a'", str(10**30), "[]"))
        text = text[: number.start()] + other + text[number.end() :]
    else:
        text = text.replace(*generator.choice(EDITS), generator.choice((1, -1)))
    copy.write(name, generator.choice(JUNK) if generator.random() < 0.1 else text.encode(), listed=True)


def other_modules(copy: Copy, generator: random.Random) -> None:
    """Generated modules that are no longer any."""
    name = generator.choice((f"{PACKAGE}/model.py", f"{PACKAGE}/kernels/layers.py"))
    text = copy.read(name).decode()
    edits = (
        ("VOCAB_SIZE = ", "VOCAB_SIZE = 1"),
        ("def bind", "def bound"),
        ("VOCAB_SIZE", "SIZE"),
        ("KERNELS", "KERNEL"),
    )
    edited = text.replace(*generator.choice(edits), 1).replace(
        "attention_0", generator.choice(("attention_9", "../plan")), 1
    )
    copy.write(name, generator.choice((*JUNK, edited.encode(), edited.encode())), listed=True)


def archives(copy: Copy, generator: random.Random) -> None:
    if generator.random() < 0.5:
        copy.write(ARCHIVE, mutate_bytes(copy.read(ARCHIVE), generator), listed=True)
        return
    with zipfile.ZipFile(copy.original / ARCHIVE) as archive:
        index = json.loads(archive.read("index.json"))
    write_archive(copy.folder / ARCHIVE, mutate_json_text(index, generator))
    copy.write(ARCHIVE, (copy.folder / ARCHIVE).read_bytes(), listed=True)


MUTATORS: list[tuple[Mutator, int]] = [
    (bytes_of_any_file, 30),
    (files_that_are_something_else, 10),
    (manifest, 45),
    (manifest_and_plan, 30),
    (settings, 30),
    (bytes_of_settings, 10),
    (headers, 15),
    (tensors_cut, 3),
    (plan_module, 12),
    (other_modules, 5),
    (archives, 10),
]
"""And how many mutants each makes in a short run: 200 in all."""


# ---- what is tried ----


def write_archive(path: Path, index: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("index.json", index.encode("utf-8", "surrogatepass"))
        archive.writestr("code.cubin", bytes(range(256)))


@pytest.fixture(scope="module")
def original(chat_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a tokenizer, a chat template, and an archive that could hold machine code."""
    folder = Path(shutil.copytree(chat_artifact, tmp_path_factory.mktemp("fuzz") / "artifact"))
    (folder / ARCHIVE).parent.mkdir()
    variant = {"cubin": "code.cubin", "divisible": [0, 1]}
    kernels = {"constants": {"BLOCK": 64, "SOFTCAP": 0.0, "HAS_SINKS": False}, "variants": {"[]": variant}}
    cubin = {"symbol": "append", "shared": 0, "num_warps": 4, "hidden": 2}
    write_archive(folder / ARCHIVE, json.dumps({"modules": {"attention_0": kernels}, "cubins": {"code.cubin": cubin}}))
    content = json.loads((folder / "pmkvq.json").read_text())
    content["files"][ARCHIVE] = file_digest(folder / ARCHIVE)
    (folder / "pmkvq.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def text_module(original: Path) -> Iterator[Any]:
    """The artifact's own `text.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(original))
        yield importlib.import_module(f"{PACKAGE}.text")
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


def check_sentence(text: str) -> None:
    assert text.strip(), "a refusal says why"
    assert "\n" not in text.strip(), f"more than a sentence: {text}"
    assert len(text) < 1200, f"more than a sentence: {text[:200]}"


def uses(folder: Path) -> Tensor:
    """Logits of the artifact in `folder`; that it generates for a batch."""
    model = runtime.load(folder)
    logits = model(IDS)
    out = model.generate(IDS, 3)
    assert int(out.min()) >= 0
    assert int(out.max()) < model.vocab_size
    return logits


def kernels_of(folder: Path) -> None:
    """The modules of kernels."""
    artifact = open_artifact(folder)
    runtime.choose_attention(artifact.package, artifact.manifest.plan, torch.device("cpu"), "triton")


def archive_of(folder: Path) -> None:
    """An archive to its last file, as a device would read it."""
    content = open_artifact(folder).package.read(ARCHIVE.partition("/")[2])
    archive = Archive(folder / ARCHIVE, torch.device("cuda:0"), content)
    kernels = archive.kernels("attention_0")
    for entry in kernels.variants.values():
        archive.read(entry["cubin"])
        list(map(int, entry["divisible"]))


def test_a_damaged_artifact_is_what_it_was_or_says_what_is_wrong(
    original: Path, text_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # modules of kernels are read, none is launched
    monkeypatch.setattr(sys.modules[runtime.load.__module__], "_check_triton", lambda device: None)
    logits = uses(original)
    kernels_of(original)
    archive_of(original)
    tokens = text_module.Tokenizer(original).encode(TEXT)
    copies: dict[Path, Copy] = {}
    plan = [mutator for mutator, count in MUTATORS for _ in range(count * FACTOR)]
    refusals = (runtime.ArtifactError, runtime.InputError, text_module.ArtifactError, text_module.InputError)

    def refused(use: Callable[[], Any]) -> bool:
        try:
            use()
        except refusals as error:
            check_sentence(str(error))
            return True
        return False

    def attempt(number: int) -> str:
        copy = (
            copies.setdefault(tmp_path, Copy(original, tmp_path / f"of-{number}")) if not copies else copies[tmp_path]
        )
        generator, mutator = random.Random(number), plan[number]
        try:
            mutator(copy, generator)

            def same() -> None:
                assert torch.equal(uses(copy.folder), logits), f"{mutator.__name__}: loads and computes something else"

            def encodes() -> None:
                tokenizer = text_module.Tokenizer(copy.folder)
                found = tokenizer.encode(TEXT)
                tokenizer.decode(found[0])
                if mutator is bytes_of_any_file:
                    assert torch.equal(found, tokens), "encodes to something else"

            found = [refused(use) for use in (same, encodes, lambda: archive_of(copy.folder))]
            outcome = f"{mutator.__name__}: {'refused' if any(found) else 'the same'}"
            if mutator is other_modules:  # importing kernels takes longest
                refused(lambda: kernels_of(copy.folder))
            if mutator is bytes_of_any_file and copy.changed & copy.manifest["files"].keys():
                assert all(copy.read(name) == (copy.folder / name).read_bytes() for name in copy.changed) or (
                    outcome.endswith("refused")
                ), "a changed file was not noticed"
            return outcome
        except BaseException as error:
            error.args = (f"{mutator.__name__}: {error}",)
            raise
        finally:
            copy.restore()

    outcomes = run(attempt, range(len(plan)))
    print(dict(outcomes))
    assert sum(outcomes.values()) == 200 * FACTOR
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("refused")) > 120 * FACTOR


def test_transformers_refuses_damaged_defaults_in_a_sentence(original: Path, tmp_path: Path) -> None:
    """Of generation_config.json, which both read."""

    def attempt(number: int) -> str:
        copy = Copy(original, tmp_path / f"of-{number}")
        generator = random.Random(number)
        text = mutate_json_text(json.loads(copy.read("generation_config.json")), generator)
        copy.write("generation_config.json", text.encode("utf-8", "surrogatepass"), listed=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(copy.folder, trust_remote_code=True)
            with contextlib.suppress(ValueError):
                model.generate(IDS, max_new_tokens=3)
        except Exception as error:
            if not isinstance(error, ValueError) and type(error).__name__ != "ArtifactError":
                raise
            check_sentence(str(error))
            return "refused"
        return "loads"

    outcomes = run(attempt, range(6 * FACTOR))
    assert sum(outcomes.values()) == 6 * FACTOR
