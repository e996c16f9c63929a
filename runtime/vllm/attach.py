"""What the plugin changes in vLLM, and how it tells artifacts from other models.

Two functions are wrapped: the one that makes a server's configuration, after which an artifact is checked, and
`Attention.__init__`, which gives a planned layer the backend of packed pages. Several copies of this module may be
installed, one in each artifact; the first one wraps, and all of them enter themselves for the format version that they
know. They do so in a dictionary from a format version to a module with `prepare` and `attach`, which the wrapped
functions carry in their attribute `COPIES`. Copies of different releases share it, so neither its name nor its form may
change.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArtifactError, InputError
from ..kernels import LayerKernels
from ..load import choose_attention
from ..manifest import AGAIN, FORMAT_VERSION, MANIFEST, Artifact
from ..plan import CachePlan
from .checks import artifact_folder, artifact_of, is_paged, is_progressive, is_supported, prepare, rotations_of
from .layout import PagedLayer, Pool, offsets, paged_layers, pool_of
from .table import Table
from .worker import follow_scheduler

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.model_executor.layers.attention.attention import Attention

    from .backend import Store

__all__ = ["COPIES", "attach", "prepare", "register_copy"]

COPIES = "pmkvq_copies"


def register_copy() -> None:
    """Wrap vLLM's functions, unless another copy has, and enter this copy for its format version."""
    from vllm.engine.arg_utils import EngineArgs

    copies = getattr(EngineArgs.create_engine_config, COPIES, None)
    if copies is None:
        copies = {}
        _wrap_configuration(EngineArgs, copies)
        if is_supported():
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


# ---- the layers of a model, on one rank ----


@dataclass
class Served:
    """The part of an artifact that this process serves: its layers on this rank of a tensor-parallel group, the
    pipeline stage whose layers they are, and the pool that keeps them. Where the server is progressive, `table` has
    the further blocks of pages."""

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
    steps_in_flight: int
    progressive: bool
    table: Table | None = None
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

    def tie(self, blocks: int, device: torch.device) -> None:
        """Make the table of further blocks for a pool of so many, unless it is there: kernels of captured graphs read
        it where it lies."""
        if self.progressive and (self.table is None or len(self.table.ties) != blocks):
            self.table = Table(blocks, device, self.steps_in_flight)

    def check_size(self, blocks: int) -> None:
        """Raises `InputError` where a sequence of the longest length could never be read into so many blocks.

        vLLM also makes a few blocks to try graphs with, before it knows how many there will be.
        """
        if self.cache.num_gpu_blocks != blocks:
            return
        needed = self.pool.bytes_needed(1, self.max_len, self.in_flight) // self.pool.block_bytes
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
    artifact = artifact_of(config)
    if not is_paged(artifact.manifest.plan):
        return None
    served = _made(config, artifact)
    served.stores = [Store(served, number) for number in range(len(served.pool.groups))]
    context.update({store.name: store for store in served.stores})
    return served


def pool_on(config: VllmConfig, plan: CachePlan) -> tuple[list[PagedLayer], list[range], Pool]:
    """The plan's layers on each rank of a server, which of them are on which pipeline stage, and the pool."""
    from vllm.distributed.utils import get_pp_indices

    stages = config.parallel_config.pipeline_parallel_size
    layers = paged_layers(plan, config.model_config.dtype.itemsize, config.parallel_config.tensor_parallel_size)
    staged = [range(*get_pp_indices(len(layers), stage, stages)) for stage in range(stages)]
    return layers, staged, pool_of(layers, plan.max_len, staged)


def _made(config: VllmConfig, artifact: Artifact) -> Served:
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    layers, staged, pool = pool_on(config, artifact.manifest.plan)
    rank, ranks = get_tensor_model_parallel_rank(), config.parallel_config.tensor_parallel_size
    rotations = {}
    for index, rotation in rotations_of(artifact).items():
        first = rank * len(rotation) // ranks  # ranks have heads in turn; where they are more than heads, they share
        rotations[index] = rotation[first : first + layers[index].heads]
    if is_progressive(config):
        follow_scheduler()
    return Served(
        folder=artifact.folder,
        layers=layers,
        stage=staged[get_pp_group().rank_in_group],
        pool=pool,
        rotations=rotations,
        in_flight=config.max_in_flight_tokens,
        max_len=config.model_config.max_model_len,
        dtype=config.model_config.dtype,
        cache=config.cache_config,
        kernels=_kernels(artifact),
        steps_in_flight=config.max_in_flight_tokens // config.scheduler_config.max_num_batched_tokens,
        progressive=is_progressive(config),
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
