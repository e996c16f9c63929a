"""Artifacts in vLLM: its plugin, which serves them from packed pages.

`layout`, `pages`, `kernels` and `tiers` know nothing of vLLM: they say what lies where in a pool of blocks, attend
over it, and keep the books of idle blocks. All other modules touch vLLM, and are imported only once it runs.
"""

from __future__ import annotations


def register() -> None:
    """The entry point in `vllm.general_plugins`, called in every process of vLLM, and maybe more than once there."""
    from .attach import register_copy

    register_copy()
