"""Artifacts of multimodal models that are kept whole: checkpoints whose language model has folded weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from pmkvq_compiler import runtime
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.options import CompileOptions
from tests.conftest import silent, token_lines
from tests.fuzz import LONG_ONLY, chosen
from tests.models import tiny_folder
from tests.programs import relative_error
from tests.source.test_multimodal import EARLIER, rename, whole_model

IMAGES: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "llava": (4, {"pixel_values": (1, 3, 16, 16)}),
    "qwen2_5_vl": (1, {"pixel_values": (4, 3 * 2 * 8 * 8)}),
}
"""How many tokens an image takes, and the shapes of what a model is given of it."""
BUDGETS = {"gemma3": "76KiB", "llama4": "100KiB", "gemma4": "100KiB"}
"""Where sliding windows and chunks leave little to quantize."""
NOTHING_FOLDS = ("qwen3_5", "gemma4")
"""A gate lies behind the attention, or layers share keys and values."""
KINDS = ("qwen2_5_vl", "llava", "gemma3", "mistral3", "smolvlm", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "llama4")
KINDS += ("qwen3_5", "lfm2_vl", "gemma4", "internvl")


@dataclass(frozen=True)
class Kept:
    """A multimodal model, its folder, and its artifact."""

    model_type: str
    model: PreTrainedModel
    folder: Path
    artifact: Path


def compiled(folder: Path, model: Path, **options: Any) -> Path:
    calib = str(token_lines(folder / "tokens.jsonl"))
    chosen = {"budget": "75%", "max_len": 256, "calib_samples": 2, "calib_len": 96, "whole": True, **options}
    compile_model(CompileOptions(str(model), folder / "artifact", calib=calib, **chosen), silent)
    return folder / "artifact"


@pytest.fixture(scope="module", params=chosen(KINDS, "qwen2_5_vl"))
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp(request.param)
    model = whole_model(request.param, folder / "source")
    if request.param in EARLIER and request.param != "qwen2_5_vl":
        rename(folder / "source", EARLIER[request.param])
    (folder / "source" / "preprocessor_config.json").write_text('{"patch_size":   8}')
    artifact = compiled(folder, folder / "source", budget=BUDGETS.get(request.param, "75%"))
    return Kept(request.param, model, folder / "source", artifact)


def tokens(count: int = 40) -> Tensor:
    return torch.randint(4, 128, (1, count), generator=torch.Generator().manual_seed(1))


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def test_a_text_has_the_same_logits_in_the_artifact_and_in_both_models_of_transformers(kept: Kept) -> None:
    loaded, report = AutoModelForImageTextToText.from_pretrained(kept.artifact, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(kept.model)
    own = runtime.load(kept.artifact, trust_code=False)
    hugging = AutoModelForCausalLM.from_pretrained(kept.artifact, trust_remote_code=True)
    with torch.no_grad():
        expected = kept.model(input_ids=tokens()).logits
        for found in (own(tokens()), loaded(input_ids=tokens()).logits, hugging(tokens()).logits):
            assert relative_error(found, expected) <= 1e-5
    text = hugging.generate(tokens(), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(text, own.generate(tokens(), 8, eos_token_id=()))


def test_an_image_has_the_same_logits_in_the_whole_model(kept: Kept) -> None:
    if kept.model_type not in IMAGES:
        pytest.skip("images of other kinds are given in other ways")
    count, shapes = IMAGES[kept.model_type]
    ids = tokens()
    ids[0, 5 : 5 + count] = kept.model.config.image_token_id
    inputs = {name: torch.randn(shape, generator=torch.Generator().manual_seed(2)) for name, shape in shapes.items()}
    if kept.model_type == "qwen2_5_vl":
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]])
    loaded = AutoModelForImageTextToText.from_pretrained(kept.artifact)
    with torch.no_grad():
        expected = kept.model(input_ids=ids, **inputs).logits
        assert relative_error(loaded(input_ids=ids, **inputs).logits, expected) <= 1e-5
        assert relative_error(kept.model(input_ids=ids).logits, expected) > 1e-3


def test_only_the_language_model_is_changed_and_nothing_is_called_by_another_name(kept: Kept) -> None:
    before, after = stored(kept.folder), stored(kept.artifact)
    assert after.keys() == before.keys()
    folded = {name for name in before if not torch.equal(before[name], after[name])}
    assert bool(folded) == (kept.model_type not in NOTHING_FOLDS)
    assert all("self_attn" in name and "vision" not in name and "visual" not in name for name in folded)
    index = json.loads((kept.artifact / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in after.values())


def test_processors_and_config_are_those_of_the_whole_model(kept: Kept) -> None:
    processor = "preprocessor_config.json"
    assert (kept.artifact / processor).read_bytes() == (kept.folder / processor).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (kept.folder, kept.artifact))
    assert after.pop("auto_map") == {"AutoModelForCausalLM": f"modeling_compiled.{type(kept.model).__name__}"}
    assert {**after, "text_config": None} == {**before, "text_config": None}
    report = json.loads((kept.artifact / "report.json").read_text())
    assert [note[0] for note in report["notes"]].count("kept") == 1
    assert "--whole" in report["command"]


def test_damage_of_what_is_kept_is_found(kept: Kept, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(kept.artifact, tmp_path / "artifact"))
    data = bytearray((copied / "others.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "others.safetensors").write_bytes(data)
    with pytest.raises(runtime.ArtifactError, match=r"others\.safetensors was changed after the compile"):
        runtime.load(copied)


def test_a_model_that_is_not_multimodal_is_refused(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "source", "llama")
    with pytest.raises(UsageError, match="source is no multimodal model, so it cannot be kept whole; leave --whole"):
        compiled(tmp_path, tmp_path / "source")
    assert not (tmp_path / "artifact").exists()


def test_what_cannot_be_copied_is_refused(tmp_path: Path) -> None:
    whole_model("llava", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.vision_tower.scales"] = torch.ones(4).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"stores model\.vision_tower\.scales in F8_E4M3, which is not copied"):
        compiled(tmp_path, tmp_path / "source")


@LONG_ONLY
def test_tensors_that_transformers_converts_are_refused(tmp_path: Path) -> None:
    whole_model("qwen3_5_moe", tmp_path / "source")
    with pytest.raises(UsageError, match="tensors transformers converts while it loads them, so it cannot be kept"):
        compiled(tmp_path, tmp_path / "source")
