"""Which models are artifacts, and the checks that a server makes when it starts."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors.torch
from torch import Tensor

from ..errors import ArtifactError, InputError
from ..kernels import check_kernels
from ..load import check_code
from ..manifest import AGAIN, MANIFEST, Artifact, file_digest, open_artifact
from ..plan import CachePlan
from .layout import paged_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUPPORTED = ((0, 30), (0, 32))
"""The oldest and the newest minor version of vLLM that this was tried with."""

OPTION = "pmkvq"
"""The key of what artifacts are told in vLLM's `--additional-config`."""

REMOTE_CODE = "modeling_compiled."
"""How the remote code is called in the config of every artifact, by which one is known on a hub."""


def artifact_folder(config: VllmConfig) -> Path | None:
    """Where the artifact lies that a configuration names by its folder or its hub id; None for any other model."""
    model = config.model_config
    if Path(model.model).is_dir():
        return Path(model.model) if (Path(model.model) / MANIFEST).is_file() else None
    named = getattr(model.hf_config, "auto_map", None) or {}
    if not str(named.get("AutoModelForCausalLM", "")).startswith(REMOTE_CODE):
        return None
    return _downloaded(model.model, model.revision, config.load_config.download_dir)


@functools.cache
def _downloaded(model: str, revision: str | None, cache_dir: str | None) -> Path | None:
    """The folder of a hub's repository, whose files vLLM would download anyway, but for those of the plan."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(model, revision=revision, cache_dir=cache_dir))
    return folder if (folder / MANIFEST).is_file() else None


# ---- the checks that a server makes when it starts ----


def prepare(config: VllmConfig) -> None:
    """Check an artifact and what it is to be served with. Raises `ArtifactError` or `InputError`.

    Every file is compared with its digest here, and only here: it is done once, not in every process.
    """
    _check_vllm()
    artifact = artifact_of(config)
    artifact.check_files()
    plan = artifact.manifest.plan
    if plan.states and is_paged(plan):
        raise InputError(
            f"{artifact.folder} has layers with a recurrent state beside its attention, which the plan's pages in vLLM "
            f"have no place for; serve the original model, or run the artifact by itself"
        )
    rotations_of(artifact)
    if not is_paged(plan):
        return
    _check_model(config, artifact)
    _check_features(config)
    _check_stages(config)
    _check_kernels(config, artifact)
    block = plan.layers[0].block
    cache = config.cache_config
    if cache.user_specified_block_size and cache.block_size != block:
        raise InputError(
            f"--block-size {cache.block_size} is not the {block} tokens of the blocks that {artifact.folder} was "
            f"compiled with; leave the option out"
        )
    cache.block_size, cache.user_specified_block_size = block, True
    if is_progressive(config):
        _make_progressive(config)


def is_progressive(config: VllmConfig) -> bool:
    """Whether pages are to lie in more blocks while some are idle. Raises `InputError` where the option says anything
    else."""
    given = config.additional_config.get(OPTION) if isinstance(config.additional_config, dict) else None
    found = given.get("progressive") if isinstance(given, dict) and len(given) == 1 else None
    if given is not None and not isinstance(found, bool):
        raise InputError(
            f"--additional-config has {json.dumps({OPTION: given})}, which says nothing that artifacts know; write "
            f'{{"{OPTION}": {{"progressive": true}}}}, or leave it out'
        )
    return bool(found)


def _make_progressive(config: VllmConfig) -> None:
    """Have vLLM lend idle blocks to pages, and export what it counts of that. Raises `InputError`."""
    from .metrics import export

    scheduler = config.scheduler_config
    if scheduler.scheduler_cls is not None:
        raise InputError(
            f"--scheduler-cls {scheduler.scheduler_cls} does not go with progressive precision, which has a scheduler "
            f"of its own; leave one of the two out"
        )
    kind = "ProgressiveAsyncScheduler" if scheduler.async_scheduling else "ProgressiveScheduler"
    scheduler.scheduler_cls = f"{__package__}.scheduler.{kind}"
    export()


def is_supported() -> bool:
    found = re.match(r"(\d+)\.(\d+)", _version())
    return found is not None and SUPPORTED[0] <= (int(found[1]), int(found[2])) <= SUPPORTED[1]


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _check_vllm() -> None:
    if not is_supported():
        oldest, newest = (".".join(map(str, version)) for version in SUPPORTED)
        raise InputError(
            f"vLLM {_version()} is not one that artifacts are served with; install vLLM {oldest} to {newest}"
        )


def artifact_of(config: VllmConfig) -> Artifact:
    folder = artifact_folder(config)
    assert folder is not None
    return open_artifact(folder)


def is_paged(plan: CachePlan) -> bool:
    """Whether there is anything to pack; a plan that quantizes nothing is served as any other model is."""
    return any(not layer.exact for layer in paged_layers(plan, 2))


def _check_model(config: VllmConfig, artifact: Artifact) -> None:
    model, plan = config.model_config, artifact.manifest.plan
    if model.use_mla:
        raise InputError(
            f"{artifact.folder} has latent attention, which vLLM keeps as latents and the plan as keys and values; "
            f"serve the original model"
        )
    if getattr(model.hf_text_config, "num_kv_shared_layers", None):
        raise InputError(
            f"{artifact.folder} has layers that read the caches of other layers, which the plugin for vLLM does not "
            f"serve; load it with pmkvq_compiler.runtime, or serve the original model"
        )
    if getattr(model, "is_mm_prefix_lm", False):
        raise InputError(
            f"{artifact.folder} lets the tokens of an image see each other, which the plugin for vLLM does not serve; "
            f"pass --language-model-only, or serve the original model"
        )
    if any(layer.chunked for layer in plan.layers):
        raise InputError(
            f"{artifact.folder} attends in chunks, which the plugin for vLLM does not serve; load it with "
            f"pmkvq_compiler.runtime, or serve the original model"
        )
    count = model.get_total_num_hidden_layers() if hasattr(model, "get_total_num_hidden_layers") else None
    count = count or model.hf_text_config.num_hidden_layers
    if len(plan.layers) != count:
        raise ArtifactError(
            f"{artifact.folder}: the plan has {len(plan.layers)} layers and config.json {count}; {AGAIN}"
        )
    if len({layer.block for layer in plan.layers}) > 1:
        raise ArtifactError(f"{artifact.folder}: layers of the plan have blocks of different sizes; {AGAIN}")


def _check_features(config: VllmConfig) -> None:
    """Raises `InputError` for what would give wrong answers, or none of the plan's savings."""
    parallel, cache = config.parallel_config, config.cache_config
    asked = {
        "speculative decoding": config.speculative_config is not None,
        "--kv-offloading-size": getattr(cache, "kv_offloading_size", None) is not None,  # which makes a connector
        "a KV connector (--kv-transfer-config)": config.kv_transfer_config is not None,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in ("auto", _dtype_name(config)),
        "--kv-cache-dtype-skip-layers": bool(getattr(cache, "kv_cache_dtype_skip_layers", None)),
        "--kv-sharing-fast-prefill": bool(getattr(cache, "kv_sharing_fast_prefill", False)),
        "--disable-hybrid-kv-cache-manager": bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
        "--enable-dbo": bool(getattr(parallel, "enable_dbo", False)),
        "--enable-lora": config.lora_config is not None,
        f"--runner {config.model_config.runner_type}": config.model_config.runner_type != "generate",
    }
    for name, used in asked.items():
        if used:
            raise InputError(
                f"{name} does not go with an artifact, whose plan says how keys and values are kept; leave it out"
            )


def _check_stages(config: VllmConfig) -> None:
    """Raises `InputError` for pipeline stages that vLLM itself would fail to run at the first request."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    stages, mode = config.parallel_config.pipeline_parallel_size, config.compilation_config.mode
    if stages > 1 and mode == CompilationMode.NONE and current_platform.is_cpu():
        raise InputError(
            f"--pipeline-parallel-size {stages} does not go with --enforce-eager on a CPU, where vLLM makes nothing to "
            f"hand from stage to stage; leave --enforce-eager out"
        )


def _check_kernels(config: VllmConfig, artifact: Artifact) -> None:
    """Raises `InputError` where the kernels of a GPU do not fit, and `ArtifactError` where nobody vouches for them."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return
    ranks = config.parallel_config.tensor_parallel_size
    for layer in artifact.manifest.plan.layers:
        check_kernels(layer)
        if ranks > layer.num_key_value_heads:
            raise InputError(
                f"--tensor-parallel-size {ranks} is more than {layer.num_key_value_heads} key/value heads, and the "
                f"kernels of {artifact.folder} take all queries of one; use {layer.num_key_value_heads} ranks at most"
            )
    if not config.model_config.trust_remote_code:
        _check_trust(artifact)


def _check_trust(artifact: Artifact) -> None:
    """Raises `ArtifactError` where a GPU would run Python that came with a model and that nobody vouches for: neither
    whoever installed a package with the same kernels, nor the installed compiler, which would write them."""
    package, digests = artifact.manifest.package, artifact.package.digests or {}
    code = {name: digest for name, digest in digests.items() if name.startswith("kernels/")}
    for entry in importlib.metadata.entry_points(group="vllm.general_plugins"):
        if entry.value.startswith(package + ".") and entry.dist is not None:
            installed = Path(str(entry.dist.locate_file(package)))
            if all(_is_same(installed / name, digest) for name, digest in code.items()):
                return
    try:
        check_code(artifact)
    except ArtifactError as error:
        raise ArtifactError(
            f"{artifact.folder} has kernels that nothing on this machine vouches for ({error}); install the artifact "
            f"with pip, or pass --trust-remote-code if you would run code of whoever made it"
        ) from error


def _is_same(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _dtype_name(config: VllmConfig) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


def rotations_of(artifact: Artifact) -> dict[int, Tensor]:
    """What turns keys and queries of a layer [H, key_head_dim, key_head_dim]. Raises `ArtifactError`."""
    name = "constants.safetensors"
    try:
        constants = safetensors.torch.load(artifact.package.read(name))
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{artifact.package.folder / name} cannot be read ({error}); {AGAIN}") from error
    found = {}
    for index in artifact.manifest.key_rotations:
        layer = artifact.manifest.plan.layers[index]
        shape = (layer.num_key_value_heads, layer.key_head_dim, layer.key_head_dim)
        named = [key for key in constants if key.endswith(f".{index}.key_rotation")]
        if len(named) != 1 or constants[named[0]].shape != shape:
            raise ArtifactError(f"{artifact.package.folder / name} has no rotation of layer {index}'s keys; {AGAIN}")
        found[index] = constants[named[0]]
    return found
