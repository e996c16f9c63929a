"""What the plugin changes in vLLM, and how it tells artifacts from other models.

Two functions are wrapped: the one that makes a server's configuration, after which an artifact is checked, and
`Attention.__init__`, which gives a planned layer the backend of packed pages. Several copies of this module may be
installed, one in each artifact; the first one wraps, and all of them enter themselves for the format version that they
know. `COPIES` of the wrapped functions is what copies of different versions share: a dictionary from a format version
to a module with `prepare` and `attach`. Leave it as it is.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import ArtifactError, InputError
from ..kernels import LayerKernels, check_kernels
from ..load import check_code, choose_attention
from ..manifest import AGAIN, FORMAT_VERSION, MANIFEST, Artifact, Files, open_artifact
from ..plan import CachePlan
from .layout import PagedLayer, Pool, offsets, paged_layers, pool_of

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.model_executor.layers.attention.attention import Attention

    from .backend import Store

SUPPORTED = ((0, 30), (0, 32))
"""The oldest and the newest minor version of vLLM that this was tried with."""

COPIES = "pmkvq_copies"
REMOTE_CODE = "modeling_compiled."
"""How the remote code is called in the config of every artifact, by which one is known on a hub."""


def register_copy() -> None:
    """Wrap vLLM's functions, unless another copy has, and enter this copy for its format version."""
    from vllm.engine.arg_utils import EngineArgs

    copies = getattr(EngineArgs.create_engine_config, COPIES, None)
    if copies is None:
        copies = {}
        _wrap_configuration(EngineArgs, copies)
        if _is_supported():
            _wrap_attention(copies)
    copies.setdefault(FORMAT_VERSION, sys.modules[__name__])


def _wrap_configuration(engine_args: Any, copies: dict[int, Any]) -> None:
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> VllmConfig:
        config = original(self, *args, **kwargs)
        copy = _copy_for(config, copies)
        if copy is not None:
            copy.prepare(config)
        return config

    setattr(create_engine_config, COPIES, copies)
    engine_args.create_engine_config = create_engine_config


def _wrap_attention(copies: dict[int, Any]) -> None:
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers.attention.attention import Attention

    original = Attention.__init__

    @functools.wraps(original)
    def init(self: Attention, *args: Any, **kwargs: Any) -> None:
        config = get_current_vllm_config_or_none()
        copy = _copy_for(config, copies)
        if copy is None:
            original(self, *args, **kwargs)
        else:
            copy.attach(original, self, args, kwargs, config)

    setattr(init, COPIES, copies)
    Attention.__init__ = init


def _copy_for(config: VllmConfig | None, copies: dict[int, Any]) -> Any:
    """The copy that serves the model of a configuration; None where it is no artifact.

    Raises `ArtifactError` where no copy knows the artifact's format version.
    """
    folder = None if config is None or config.model_config is None else artifact_folder(config)
    if folder is None:
        return None
    try:
        version = json.loads((folder / MANIFEST).read_bytes()).get("format_version")
    except (OSError, ValueError, AttributeError, RecursionError):
        version = FORMAT_VERSION  # which then says what is wrong with the file
    if version in copies or not isinstance(version, int):
        return copies.get(version, next(iter(copies.values())))
    raise ArtifactError(
        f"{folder} has format version {version} and the installed plugins serve {', '.join(map(str, sorted(copies)))}; "
        f"upgrade pmkvq-compiler, or install the artifact itself with pip"
    )


# ---- which model is an artifact ----


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
    artifact = _artifact(config)
    artifact.check_files()
    _rotations(artifact)
    plan = artifact.manifest.plan
    if not _is_paged(plan):
        return
    _check_model(config, artifact)
    _check_features(config)
    _check_kernels(config, artifact)
    block = plan.layers[0].block
    cache = config.cache_config
    if cache.user_specified_block_size and cache.block_size != block:
        raise InputError(
            f"--block-size {cache.block_size} is not the {block} tokens of the blocks that {artifact.folder} was "
            f"compiled with; leave the option out"
        )
    cache.block_size, cache.user_specified_block_size = block, True


def _is_supported() -> bool:
    found = re.match(r"(\d+)\.(\d+)", _version())
    return found is not None and SUPPORTED[0] <= (int(found[1]), int(found[2])) <= SUPPORTED[1]


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _check_vllm() -> None:
    if not _is_supported():
        oldest, newest = (".".join(map(str, version)) for version in SUPPORTED)
        raise InputError(
            f"vLLM {_version()} is not one that artifacts are served with; install vLLM {oldest} to {newest}"
        )


def _artifact(config: VllmConfig) -> Artifact:
    folder = artifact_folder(config)
    assert folder is not None
    return open_artifact(folder)


def _is_paged(plan: CachePlan) -> bool:
    """Whether there is anything to pack; a plan that quantizes nothing is served as any other model is."""
    return any(not layer.exact for layer in paged_layers(plan, 2))


def _check_model(config: VllmConfig, artifact: Artifact) -> None:
    model, plan = config.model_config, artifact.manifest.plan
    if model.use_mla:
        raise InputError(
            f"{artifact.folder} has latent attention, which vLLM keeps as latents and the plan as keys and values; "
            f"serve the original model"
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
    whoever installed this copy with its kernels, nor the installed compiler, which would write the same."""
    own = Files(Path(__file__).parent.parent.parent)
    names = [name for name in artifact.package.digests or () if name.startswith("kernels/") and name.endswith(".py")]
    if all(name in own and own.read(name) == artifact.package.read(name) for name in names):
        return
    try:
        check_code(artifact)
    except ArtifactError as error:
        raise ArtifactError(
            f"{artifact.folder} has kernels that nothing on this machine vouches for ({error}); install the artifact "
            f"with pip, or pass --trust-remote-code if you would run code of whoever made it"
        ) from error


def _dtype_name(config: VllmConfig) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


def _rotations(artifact: Artifact) -> dict[int, Tensor]:
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


# ---- the layers of a model, on one rank ----


@dataclass
class Served:
    """The part of an artifact that this process serves: its layers on this rank of a tensor-parallel group, the
    pipeline stage whose layers they are, and the pool that keeps them."""

    folder: Path
    layers: list[PagedLayer]
    stage: range
    pool: Pool
    rotations: dict[int, Tensor]
    in_flight: int
    max_len: int
    dtype: torch.dtype
    cache: CacheConfig
    kernels: list[LayerKernels] | None
    stores: list[Store] = field(default_factory=list)
    attached: set[int] = field(default_factory=set)

    def check_layers(self) -> None:
        """Raises `InputError` where a layer of the plan attends in a way that was not replaced."""
        missing = sorted(set(self.stage) - self.attached)
        if missing:
            raise InputError(
                f"layer {missing[0]} of {self.folder} attends with a class of its own in vLLM, which packed pages do "
                f"not replace; serve the original model"
            )

    def check_size(self, blocks: int) -> None:
        """Raises `InputError` where a sequence of the longest length could never be read into so many blocks.

        vLLM also makes a few blocks to try graphs with, before it knows how many there will be.
        """
        if self.cache.num_gpu_blocks != blocks:
            return
        needed = 1 + self.pool.blocks_per_sequence(self.max_len, self.in_flight)
        needed += sum(group.blocks(self.max_len, 0) for group in self.pool.groups if group.kind == "rows")
        if blocks < needed:
            raise InputError(
                f"a cache of {blocks:,} blocks of {self.pool.block_bytes:,} bytes does not hold the {needed:,} that a "
                f"prompt of {self.max_len:,} tokens takes while it is read; give it more memory or lower "
                f"--max-model-len"
            )


def attach(original: Callable[..., None], attention: Attention, args: Any, kwargs: Any, config: VllmConfig) -> None:
    """Make a layer of the model as vLLM would, but that it attends over the pages of the artifact's plan."""
    bound = inspect.signature(original).bind(attention, *args, **kwargs)
    bound.apply_defaults()
    served = _served(config)
    if served is None:
        original(attention, *args, **kwargs)
        return
    from vllm.model_executor.models.utils import extract_layer_index

    from .backend import Backend

    prefix = bound.arguments["prefix"]
    _check_attention(bound.arguments, served, prefix)
    index = extract_layer_index(prefix)
    original(attention, *args, **{**kwargs, "attn_backend": Backend})
    _check_layer(attention, served, index)
    pages, rows = (_placed(served, kind, index) for kind in ("pages", "rows"))
    assert pages is not None
    layer = served.layers[index]
    kernels = None if served.kernels is None else served.kernels[index]
    attention.impl.attach(layer, pages[0], pages[1], *(rows or (None, 0)), served.rotations.get(index), kernels)
    attention.kv_sharing_target_layer_name = pages[0].name  # the layer owns no cache of its own
    served.attached.add(index)


def _served(config: VllmConfig) -> Served | None:
    """What is served under a configuration; its stores are among the configuration's layers. None where the plan
    quantizes nothing."""
    from .backend import Store

    context = config.compilation_config.static_forward_context
    for layer in context.values():
        if isinstance(layer, Store):
            return layer.served
    artifact = _artifact(config)
    if not _is_paged(artifact.manifest.plan):
        return None
    served = _made(config, artifact)
    served.stores = [Store(served, number) for number in range(len(served.pool.groups))]
    context.update({store.name: store for store in served.stores})
    return served


def _made(config: VllmConfig, artifact: Artifact) -> Served:
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
    from vllm.distributed.utils import get_pp_indices

    plan, parallel = artifact.manifest.plan, config.parallel_config
    ranks, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    layers = paged_layers(plan, config.model_config.dtype.itemsize, ranks)
    staged = [range(*get_pp_indices(len(layers), stage, stages)) for stage in range(stages)]
    in_flight = config.max_in_flight_tokens
    rank = get_tensor_model_parallel_rank()
    rotations = {}
    for index, rotation in _rotations(artifact).items():
        first = rank * len(rotation) // ranks  # ranks have heads in turn; where they are more than heads, they share
        rotations[index] = rotation[first : first + layers[index].heads]
    return Served(
        folder=artifact.folder,
        layers=layers,
        stage=staged[get_pp_group().rank_in_group],
        pool=pool_of(layers, plan.max_len, staged),
        rotations=rotations,
        in_flight=in_flight,
        max_len=config.model_config.max_model_len,
        dtype=config.model_config.dtype,
        cache=config.cache_config,
        kernels=_kernels(artifact),
    )


def _kernels(artifact: Artifact) -> list[LayerKernels] | None:
    """The kernels of every layer on a GPU; None on a CPU, where the reference attends. Raises `InputError`."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return None
    if not current_platform.is_cuda():
        raise InputError(
            f"{artifact.folder} is served on a CUDA device or a CPU, and vLLM runs on {current_platform.device_type}; "
            f"serve it on one of these"
        )
    plan, device = artifact.manifest.plan, torch.device("cuda")
    attention = choose_attention(artifact.package, plan, device, "triton", compiled=False)
    return [kernels for kernels in attention if isinstance(kernels, LayerKernels)]


def _check_attention(arguments: dict[str, Any], served: Served, prefix: str) -> None:
    from vllm.v1.attention.backend import AttentionType

    strange = arguments["attn_backend"] is not None or arguments["kv_sharing_target_layer_name"] is not None
    if strange or arguments["attn_type"] != AttentionType.DECODER:
        raise InputError(
            f"{prefix} of {served.folder} attends in a way of its own in vLLM, which packed pages do not replace; "
            f"serve the original model"
        )


def _check_layer(attention: Attention, served: Served, index: int) -> None:
    """Raises `ArtifactError` where the plan is of a layer of another shape."""
    if index >= len(served.layers):
        raise ArtifactError(f"{served.folder}: the plan has no layer {index}, which the model has; {AGAIN}")
    layer = served.layers[index]
    names = ("key/value heads", "key_head_dim", "value_head_dim", "sliding_window")
    planned = (layer.heads, layer.plan.key_head_dim, layer.plan.value_head_dim, layer.plan.sliding_window)
    found = (attention.num_kv_heads, attention.head_size, attention.head_size_v, attention.sliding_window)
    for name, one, other in zip(names, planned, found, strict=True):
        if one != other:
            raise ArtifactError(
                f"{served.folder}: layer {index} has {name} {one} in the plan and {other} in vLLM; {AGAIN}"
            )


def _placed(served: Served, kind: str, index: int) -> tuple[Store, int] | None:
    """The store of a layer's pages or rows, and where the layer begins in its blocks."""
    for store in served.stores:
        if store.group.kind == kind and index in store.group.layers:
            return store, offsets(store.group, served.layers, served.stage)[index]
    return None
