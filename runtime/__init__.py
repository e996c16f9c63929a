"""What an artifact carries: the plan, the cache and its arithmetic. Needs torch and safetensors; triton on CUDA."""

from .cache import Cache
from .errors import ArtifactError, CacheFull, InputError
from .generate import PREFILL_CHUNK
from .load import Backend, choose_attention, load
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
    "load",
    "open_artifact",
]
