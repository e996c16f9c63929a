"""What a manifest says is compared with a schema and with the files, once, before anything of the artifact is used."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.manifest import LARGEST_JSON, file_digest

PACKAGE = "tiny_qwen"


@pytest.fixture
def folder(chat_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_artifact, tmp_path / "copy"))


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "pmkvq.json").read_text())
    return content


def refused(folder: Path, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(runtime.ArtifactError, match=words) as caught:
        runtime.load(folder)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def signed(folder: Path, name: str) -> None:
    content = manifest_of(folder)
    content["files"][name] = file_digest(folder / name)
    (folder / "pmkvq.json").write_text(json.dumps(content))


TEXTS = {
    "[]": "names no format_version",
    "null": "names no format_version",
    "1": "names no format_version",
    '"pmkvq"': "names no format_version",
    "": "cannot be read",
    "{": "cannot be read",
    "{'a': 1}": "cannot be read",
    "\xff": "names no format_version|cannot be read",
    "[" * 100_000: "nested too deeply",
    '{"a":' * 100_000 + "1" + "}" * 100_000: "nested too deeply",
    '{"format_version": 2, "format_version": 2}': "'format_version' occurs twice",
    '{"format_version": NaN}': "NaN is no number",
    '{"format_version": -Infinity}': "-Infinity is no number",
    '{"format_version": ' + "9" * 5000 + "}": "cannot be read",
    '{"format_version": 1e999}': "names no format_version",
    '{"format_version": true}': "names no format_version",
    '{"format_version": "2"}': "names no format_version",
    '{"format_version": ' + "9" * 40 + "}": "instead of an integer",
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "pmkvq.json").write_bytes(text.encode("latin-1"))
    refused(folder, TEXTS[text])


def test_a_manifest_of_a_gigabyte_is_not_read(folder: Path) -> None:
    with (folder / "pmkvq.json").open("r+b") as file:
        file.truncate(1 << 30)
    refused(folder, f"more than {LARGEST_JSON >> 20} MiB")


Change = Callable[[dict[str, Any]], Any]


def at(*path: Any, to: Any) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        owner = manifest
        for step in path[:-1]:
            owner = owner[step]
        owner[path[-1]] = to(owner[path[-1]]) if callable(to) else to

    return change


CHANGES: list[tuple[Change, str]] = [
    (lambda m: m.pop("plan"), "lacks key 'plan'"),
    (lambda m: m.pop("files"), "lacks key 'files'"),
    (lambda m: m.update(colour="red"), "has the unknown key 'colour'"),
    (lambda m: m["plan"].update(colour="red"), "plan has the unknown key 'colour'"),
    (lambda m: m["plan"].pop("max_len"), "plan lacks key 'max_len'"),
    (lambda m: m["plan"]["layers"].pop(), "different plans|layers that the plan does not have"),
    (lambda m: m["plan"]["layers"].append(copy.deepcopy(m["plan"]["layers"][0])), "the budget|different plans"),
    (lambda m: m["plan"]["layers"].clear(), "no layers"),
    (at("plan", "max_len", to=1.5), "plan: max_len is 1.5 instead of an integer"),
    (at("plan", "max_len", to=True), "plan: max_len is true instead of an integer"),
    (at("plan", "max_len", to="300"), 'plan: max_len is "300" instead of an integer'),
    (at("plan", "max_len", to=0), "max_len or batch_size below 1"),
    (at("plan", "max_len", to=10**18), "max_len or batch_size below 1 or too large"),
    (at("plan", "max_len", to=10**30), "instead of an integer"),
    (at("plan", "max_len", to=lambda n: n - 1), "different plans"),
    (at("plan", "batch_size", to=-1), "max_len or batch_size below 1"),
    (at("plan", "dtype", to="int4"), "dtype 'int4' is not one of"),
    (at("plan", "dtype", to="float16"), "different plans"),
    (at("plan", "budget", to=1), "more than the budget"),
    (
        at("plan", "layers", 1, "stages", to=[[16, 16], [8]]),
        r"layers\[1\]: stages\[1\] is \[8\] instead of a list of 2",
    ),
    (at("plan", "layers", 1, "stages", to=[[3, 3]]), r"layers\[1\]: stages are pairs"),
    (at("plan", "layers", 1, "stages", to=lambda s: s[::-1]), r"layers\[1\]: stages"),
    (at("plan", "layers", 0, "key_axis", to="row"), "key_axis is \"row\" instead of 'token' or 'channel'"),
    (at("plan", "layers", 0, "sliding_window", to=0), "sliding_window is 0"),
    (at("plan", "layers", 0, "sliding_window", to=[]), "instead of an integer or null"),
    (at("plan", "layers", 0, "key_head_dim", to=7), "head dimensions are multiples of 8"),
    (at("plan", "layers", 0, "arena_bytes", to=1), "do not hold"),
    (at("plan", "layers", 0, "window", to=-64), "at least 1"),
    (at("vocab_size", to=129), "has a vocab_size of 129 and model.py 128"),
    (at("vocab_size", to=96), "has a vocab_size of 96 and model.py 128"),
    (at("vocab_size", to=-1), "no size of a vocabulary"),
    (at("weights", to=[]), "names no file beside it"),
    (at("weights", to=["model.safetensors"] * 2), "or one twice"),
    (at("weights", to=["other.safetensors"]), "without its digest or its tensors"),
    (at("weights", to="model.safetensors"), "instead of a list"),
    (at("weights", to=[f"{PACKAGE}/constants.safetensors"]), "names no file beside it"),
    (at("tensors", to={}), "without its digest or its tensors"),
    (lambda m: m["tensors"]["model.safetensors"].pop("lm_head.weight"), "tensor lm_head.weight is F32 .* says nothing"),
    (lambda m: m["tensors"]["model.safetensors"].update(more="F32 [1]"), "tensor more is missing"),
    (at("tensors", "model.safetensors", "lm_head.weight", to="F16 [128, 64]"), r"is F32 \[128, 64\] where .* F16"),
    (at("tensors", "model.safetensors", "lm_head.weight", to="F32 [64, 128]"), r"is F32 \[128, 64\] where"),
    (at("tensors", "model.safetensors", "lm_head.weight", to=5), "is 5 instead of a string"),
    (at("key_rotations", to=[9]), "layers that the plan does not have"),
    (at("key_rotations", to=[False]), r"key_rotations\[0\] is false instead of an integer"),
    (at("files", "model.safetensors", to="0" * 64), "was changed after the compile"),
    (at("files", "model.safetensors", to="0"), "is no sha256"),
    (at("package", to=""), "no name of a package"),
    (at("package", to="elsewhere"), "without its digest|is missing"),
    (at("options", to={"a": {"b": {}}}), "options: a is"),
    (at("fingerprints", to=[]), "fingerprints is"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=[words[:40] for _, words in CHANGES])
def test_what_does_not_fit_is_named(folder: Path, change: Change, words: str) -> None:
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "pmkvq.json").write_text(json.dumps(manifest))
    refused(folder, words)


def test_weights_that_are_others_than_the_code_needs_are_named(folder: Path) -> None:
    """Though their digests are right."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    for changed, words in (
        ({key: value for key, value in tensors.items() if key != name}, f"tensor {name} is missing"),
        ({**tensors, name: tensors[name].to(torch.bfloat16)}, rf"tensor {name} is BF16 \[64, 64\]"),
        ({**tensors, name: tensors[name][:, :32].contiguous()}, rf"tensor {name} is F32 \[64, 32\]"),
        ({**tensors, name: tensors[name].reshape(-1)}, rf"tensor {name} is F32 \[4096\]"),
        (
            {**tensors, "another": tensors[name].clone()},
            r"tensor another is F32 \[64, 64\] where .* says nothing of it",
        ),
        ({}, "is missing"),
    ):
        save_file(changed, path)
        signed(folder, "model.safetensors")
        refused(folder, words)
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:20])
    signed(folder, "model.safetensors")
    refused(folder, "cannot be read")


IDS: list[tuple[dict[str, Any], set[int], int | None]] = [
    ({"eos_token_id": 2, "pad_token_id": 0}, {2}, 0),
    ({"eos_token_id": [2, 3], "pad_token_id": None}, {2, 3}, None),
    ({"eos_token_id": [2, 128, -1], "pad_token_id": -1}, {2}, None),
    ({"eos_token_id": 10**12, "pad_token_id": 128}, set(), None),
    ({}, set(), None),
]


@pytest.mark.parametrize(("ids", "ends", "pad"), IDS)
def test_ids_beyond_the_vocabulary_never_reach_a_text(
    folder: Path, ids: dict[str, Any], ends: set[int], pad: int | None
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(ids))
    signed(folder, "generation_config.json")
    model = runtime.load(folder)
    assert (model.eos_token_ids, model.pad_token_id) == (ends, pad)
    out = model.generate(torch.arange(3, 23).view(2, 10), 5)
    assert 0 <= int(out.min()) <= int(out.max()) < model.vocab_size


@pytest.mark.parametrize("value", [True, "2", 2.0, {}, [[2]], [None], [True]])
@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
def test_what_is_no_id_is_named(folder: Path, key: str, value: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    signed(folder, "generation_config.json")
    refused(folder, f"generation_config.json: {key} is .* which is no token id")


def test_settings_that_are_no_settings_are_named(folder: Path) -> None:
    for name, text, words in (
        ("generation_config.json", "[]", "generation_config.json is no JSON object"),
        ("generation_config.json", "[" * 100_000, "generation_config.json cannot be read"),
        (f"{PACKAGE}/kernels/tuning.json", "{}", "tuning.json has nothing for 'default'"),
        (f"{PACKAGE}/kernels/tuning.json", '{"default": 1}', "tuning.json: default is 1 instead of an object"),
        (f"{PACKAGE}/plan.py", "PLAN = 5\n", "have different plans"),
        (f"{PACKAGE}/plan.py", "raise SystemError('no')\n", r"plan.py cannot be imported \(SystemError: no\)"),
        (f"{PACKAGE}/model.py", "VOCAB_SIZE = 128\n", "model.py has no bind"),
        (f"{PACKAGE}/model.py", "\0", "model.py cannot be imported"),
        (f"{PACKAGE}/model.py", "VOCAB_SIZE = bind = 'x'\n", "a vocab_size of 128 and model.py x"),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_text(text)
        signed(folder, name)
        refused(folder, words)
        (folder / name).write_bytes(before)
        signed(folder, name)
    runtime.load(folder)


def test_a_dtype_that_nothing_computes_in_is_named(folder: Path) -> None:
    for dtype in (torch.int8, "int8", "", torch.bool, 5):
        with pytest.raises(runtime.ArtifactError, match="is not one of float32"):
            runtime.load(folder, dtype=dtype)  # type: ignore[arg-type]
