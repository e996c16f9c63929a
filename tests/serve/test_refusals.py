"""What cannot be served is refused in one sentence when a server makes its configuration, before it loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pmkvq_compiler.runtime.errors import ArtifactError, InputError
from pmkvq_compiler.runtime.load import file_digest
from pmkvq_compiler.runtime.vllm import attach, checks, register
from tests.test_deployment import in_the_hubs_cache

from .engines import Served

OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32"}


def configure(model: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), **{**OPTIONS, **options}).create_engine_config()


def sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 500
    return text


@pytest.fixture
def copied(served_tiny: Served, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served_tiny(), tmp_path / "artifact"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV connector"),
        ({"kv_offloading_size": 1.0}, "offloading"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2"),
        ({"block_size": 128}, "--block-size 128"),
        ({"block_size": 16}, "--block-size 16"),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid"),
        ({"enable_lora": True, "max_lora_rank": 8}, "--enable-lora"),
        ({"pipeline_parallel_size": 2}, "--enforce-eager"),
        ({"additional_config": {"pmkvq": {"progressive": "yes"}}}, '"progressive": "yes"'),
        ({"additional_config": {"pmkvq": {"progresive": True}}}, '"progresive": true'),
        ({"additional_config": {"pmkvq": {}}}, '"pmkvq": {}'),
        ({"additional_config": {"pmkvq": {"progressive": True}}, "scheduler_cls": "a.b"}, "--scheduler-cls a.b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_with_packed_pages_is_named(served_tiny: Served, options: dict[str, Any], named: str) -> None:
    with pytest.raises((InputError, ValueError)) as caught:
        configure(served_tiny(), **options)
    assert isinstance(caught.value, InputError), caught.value
    assert named in sentence(caught.value)


@pytest.mark.parametrize("option", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallel_is_named(served_tiny: Served, option: str) -> None:
    """vLLM itself refuses some of it on a CPU; the check is asked about a configuration that is changed afterwards."""
    config = configure(served_tiny())
    setattr(config.parallel_config, option, 2)
    with pytest.raises(InputError, match=option.replace("_", "-")):
        attach.prepare(config)


@pytest.mark.parametrize("options", [{}, {"block_size": 64}, {"kv_cache_dtype": "auto"}], ids=str)
def test_what_goes_with_packed_pages_is_taken(served_tiny: Served, options: dict[str, Any]) -> None:
    assert configure(served_tiny(), **options).cache_config.block_size == 64


def test_an_older_or_newer_vllm_is_named(served_tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    for version in ("0.29.1", "0.33.0", "1.0.0", "unknown"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(InputError, match=f"vLLM {version}"):
            configure(served_tiny())
    for version in ("0.30.0", "0.31.2+cpu", "0.32.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        configure(served_tiny())


def changed(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "pmkvq.json").read_text())
        (folder / "pmkvq.json").write_text(json.dumps({**manifest, **values}))

    return change


def shortened(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        (path,) = folder.rglob(name)
        path.write_bytes(path.read_bytes()[:-1])

    return cut


def without_a_layer(folder: Path) -> None:
    """A plan of one layer fewer, with digests that agree."""
    manifest = json.loads((folder / "pmkvq.json").read_text())
    manifest["plan"]["layers"].pop()
    manifest["key_rotations"] = []
    (folder / "pmkvq.json").write_text(json.dumps(manifest))


def with_other_heads(folder: Path) -> None:
    """A config of the same number of layers whose heads are others."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    manifest = json.loads((folder / "pmkvq.json").read_text())
    manifest["files"]["config.json"] = file_digest(folder / "config.json")
    (folder / "pmkvq.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (changed(format_version=99), "format version 99"),
        (changed(format_version=1), "format version 1"),
        (changed(plan=3), "plan"),
        (lambda folder: (folder / "pmkvq.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "pmkvq.json").write_text("[]"), "format_version"),
        (shortened("constants.safetensors"), "was changed after the compile"),
        (shortened("model.safetensors"), "was changed after the compile"),
        (lambda folder: next(folder.rglob("constants.safetensors")).unlink(), "is missing"),
        (without_a_layer, "2 layers"),
        (with_other_heads, "config.json 4"),
    ],
)
def test_damage_stops_the_start(copied: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copied)
    with pytest.raises(ArtifactError) as caught:
        configure(copied)
    assert said in sentence(caught.value)


def test_a_rotation_that_is_not_there_stops_the_start(served_tiny: Served, tmp_path: Path) -> None:
    rotated = Path(shutil.copytree(served_tiny(recipe="rotation", bits=(4,), budget="45%"), tmp_path / "artifact"))
    configure(rotated)
    manifest = json.loads((rotated / "pmkvq.json").read_text())
    assert manifest["key_rotations"]
    manifest["plan"]["layers"][0]["num_key_value_heads"] = 3
    (rotated / "pmkvq.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="no rotation of layer 0"):
        configure(rotated)


def test_a_hub_id_is_served_as_its_folder(served_tiny: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a download leaves it, links to blobs; vLLM itself would fetch neither the plan nor rotations."""
    snapshot = in_the_hubs_cache(served_tiny(), tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = checks._downloaded("someone/tiny", None, str(tmp_path / "hub"))
    assert found == snapshot
    assert configure(found).cache_config.block_size == 64


@pytest.fixture
def other_copy() -> Iterator[dict[int, Any]]:
    """What the copies of the plugin in this process share."""
    from vllm.engine.arg_utils import EngineArgs

    copies = getattr(EngineArgs.create_engine_config, attach.COPIES)
    before = dict(copies)
    yield copies
    copies.clear()
    copies.update(before)


def test_an_artifact_is_served_by_the_copy_of_its_format_version(copied: Path, other_copy: dict[int, Any]) -> None:
    class Copy:
        asked = 0

        @classmethod
        def prepare(cls, config: Any) -> None:
            cls.asked += 1

    changed(format_version=99)(copied)
    other_copy[99] = Copy
    configure(copied)
    assert Copy.asked == 1


def test_entering_twice_wraps_once(served_tiny: Served) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention.attention import Attention

    configure(served_tiny())  # which loads the plugins
    before = EngineArgs.create_engine_config, Attention.__init__
    register()
    assert before == (EngineArgs.create_engine_config, Attention.__init__)


def test_recurrent_states_are_refused_before_anything_is_loaded(served_tiny: Served) -> None:
    """A cache that is not quantized is served as any other model's is, and states with it."""
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    with pytest.raises((InputError, ValueError)) as caught:
        configure(served_tiny("lfm2", layers, budget="60%"))
    assert isinstance(caught.value, InputError), caught.value
    assert "recurrent state" in sentence(caught.value)
    assert configure(served_tiny("lfm2", layers, budget=None, recipe="none")).model_config.is_hybrid
