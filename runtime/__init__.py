"""The runtime that every artifact carries: loading, the plan, the cache and generation.

It needs torch and safetensors, and triton on a CUDA device.
"""

from .cache import Cache
from .errors import ArtifactError, CacheFull, InputError
from .generate import PREFILL_CHUNK
from .load import Backend, choose_attention, choose_backend, load
from .manifest import FORMAT_VERSION, open_artifact
from .model import CompiledModel
from .plan import CachePlan, LayerPlan

__all__ = [
    "FORMAT_VERSION",
    "PREFILL_CHUNK",
    "ArtifactError",
    "Backend",
    "Cache",
    "CacheFull",
    "CachePlan",
    "CompiledModel",
    "InputError",
    "LayerPlan",
    "choose_attention",
    "choose_backend",
    "load",
    "open_artifact",
]
