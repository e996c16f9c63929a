"""The functions of transformers' models that carry a state from token to token, and what a capture puts in their place.

transformers calls these functions by names that its models share: those of the libraries that have kernels for them.
While a model is captured, each such name in the modules of its code stands for a function that leaves a marker. A name
alone proves nothing, so the model's own function is first compared with the runtime's on a few random numbers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.ops import CONVOLUTION, DELTA_RULE, SCAN, STATE_OPS, state_shape
from pmkvq_compiler.runtime.backend import NewTokens
from pmkvq_compiler.runtime.plan import StatePlan
from pmkvq_compiler.runtime.states import StateStore

TOLERANCE = 1e-4
"""The largest relative difference between a model's own function and the runtime's, both in float32."""
PACKED = ("seq_idx", "cu_seqlens", "initial_state", "initial_states")
"""Arguments that say where packed sequences begin, or with which state. A capture has neither."""


@dataclass(frozen=True)
class Functions:
    """The functions by which those of a model are replaced: their arguments are those of the libraries. `convolve`,
    `apply_delta_rule` and `scan` do the work, or mark its place."""

    convolve: Callable[..., Tensor] = CONVOLUTION
    apply_delta_rule: Callable[..., Tensor] = DELTA_RULE
    scan: Callable[..., Tensor] = SCAN

    def causal_conv1d(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **others: Any
    ) -> Tensor:
        """A convolution of each channel of [B, C, S], with `weight` [C, K]."""
        _refuse_packed(others)
        out = self.convolve(hidden_states.to(weight.dtype), weight, bias, 0, 0)
        return (out if activation is None else ACT2FN[activation](out)).to(hidden_states.dtype)

    def gated_delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """The delta rule with a decay `g` for each head, or for each channel of a key (Kimi's)."""
        _refuse_packed(others)
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        return self.apply_delta_rule(query, key, value, g, beta, scale, use_qk_l2norm_in_kernel, 0, 0), None

    def mamba2_scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int | None = None,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **others: Any,
    ) -> Tensor:
        """Mamba-2's scan of [B, S, H, P], with a decay for each head."""
        _refuse_packed({**others, "z": z})
        steps = _steps(dt, dt_bias, dt_softplus)
        if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
            steps = torch.clamp(steps, min=dt_limit[0], max=dt_limit[1])
        out = self.scan(hidden_states, steps, A, B, C, 0, 0)
        return out if D is None else out + D.unsqueeze(-1) * hidden_states.float()

    def mamba_scan(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **others: Any,
    ) -> Tensor:
        """Mamba's scan of [B, C, S]: each channel is a head of its own, and each channel of its state decays by
        itself."""
        _refuse_packed(others)
        steps = _steps(dt, None if delta_bias is None else delta_bias.unsqueeze(-1), delta_softplus)
        x, steps = hidden_states.transpose(1, 2).unsqueeze(-1), steps.transpose(1, 2)
        key, query = (one.transpose(1, 2).unsqueeze(2) for one in (B, C))
        out = self.scan(x, steps, A, key, query, 0, 0).squeeze(-1).transpose(1, 2).to(hidden_states.dtype)
        out = out if D is None else out + hidden_states * D.unsqueeze(-1)
        return out if z is None else out * F.silu(z)


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    steps = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(steps) if softplus else steps


def _refuse_packed(arguments: dict[str, Any]) -> None:
    given = [name for name in (*PACKED, "z") if arguments.get(name) is not None]
    if given:
        raise CompileError(
            f"the model gives {', '.join(given)} to an operation with a recurrent state, which the cache cannot "
            f"represent; choose another model"
        )


NAMES = {
    "causal_conv1d_fn": "causal_conv1d",
    "torch_chunk_gated_delta_rule": "gated_delta_rule",
    "chunk_gated_delta_rule": "gated_delta_rule",
    "chunk_kimi_delta_attention": "gated_delta_rule",
    "mamba2_chunk_scan": "mamba2_scan",
    "mamba_selective_scan": "mamba_scan",
}
"""The names of a model's functions, and the methods of `Functions` that take their places."""
PADDING_MASK = "create_recurrent_attention_mask"
"""The function that gives models a mask to keep padding out of states. The runtime keeps it out by itself."""


@contextmanager
def state_markers(model: PreTrainedModel) -> Iterator[None]:
    """Within, the state functions of the model's code leave markers. Raises `CompileError` if one of them computes
    something else than the runtime would."""
    markers = Functions()

    def marker(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if name == PADDING_MASK:
            return lambda *args, **kwargs: None
        if not _agrees(name, inspect.unwrap(function)):
            raise CompileError(
                f"{model.config.model_type} has a function {name} whose recurrent state this version does not know; "
                f"choose another model, or an earlier version of transformers"
            )
        found: Callable[..., Any] = getattr(markers, NAMES[name])
        return found

    with _replaced(model, {*NAMES, PADDING_MASK}, marker):
        yield


@contextmanager
def own_functions(model: PreTrainedModel) -> Iterator[None]:
    """Within, the state functions of the model's code are those of transformers in plain PyTorch.

    Otherwise transformers calls a library with kernels for them if it is installed, on the CPU as well, where the
    kernels cannot run. What is measured must not depend on that either.
    """
    with _replaced(model, NAMES.keys(), lambda name, function: inspect.unwrap(function)):
        yield


@contextmanager
def _replaced(
    model: PreTrainedModel, names: Collection[str], replacement: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within, the functions of these names in the model's code are replaced."""
    replaced = []
    try:
        for module in _modules(model):
            for name, function in [*vars(module).items()]:
                if name in names:
                    other = replacement(name, function)
                    replaced.append((module, name, function))
                    setattr(module, name, other)
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def has_state_functions(model: PreTrainedModel) -> bool:
    """Whether the model's code has a function that carries a state and that the runtime knows."""
    return any(name in vars(module) for module in _modules(model) for name in NAMES)


def _modules(model: PreTrainedModel) -> list[ModuleType]:
    """The Python modules of the model's code, each once."""
    names = dict.fromkeys(kind.__module__ for part in model.modules() for kind in type(part).__mro__)
    return [sys.modules[name] for name in names if name.startswith("transformers.models.")]


@functools.cache
def _agrees(name: str, function: Callable[..., Any]) -> bool:
    """Whether a model's function computes what the runtime's does, on random numbers."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    cases: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "causal_conv1d": lambda: ((drawn(2, 6, 5), drawn(6, 3), drawn(6)), {"activation": "silu"}),
        "gated_delta_rule": lambda: (
            tuple(drawn(2, 5, 2, 8) - 0.5 for _ in range(3)),
            {
                "g": -(drawn(2, 5, 2, 8) if "kimi" in name else drawn(2, 5, 2)),
                "beta": drawn(2, 5, 2),
                "initial_state": None,
                "use_qk_l2norm_in_kernel": True,
            },
        ),
        "mamba2_scan": lambda: (
            (drawn(2, 5, 4, 8), drawn(2, 5, 4), -drawn(4), drawn(2, 5, 2, 8), drawn(2, 5, 2, 8)),
            {"chunk_size": 4, "D": drawn(4), "dt_bias": drawn(4), "dt_softplus": True},
        ),
        "mamba_scan": lambda: (
            (drawn(2, 8, 5), drawn(2, 8, 5), -drawn(8, 4), drawn(2, 4, 5), drawn(2, 4, 5)),
            {"D": drawn(8), "z": drawn(2, 8, 5), "delta_bias": drawn(8), "delta_softplus": True},
        ),
    }
    args, kwargs = cases[NAMES[name]]()
    try:
        with torch.no_grad():
            outs = [call(*args, **kwargs) for call in (function, getattr(_running(), NAMES[name]))]
    except Exception:  # a function of this name that takes other arguments is another function
        return False
    own, ours = (out[0] if isinstance(out, tuple) else out for out in outs)
    return own.shape == ours.shape and bool((own - ours).norm() <= TOLERANCE * own.norm())


def _running() -> Functions:
    """The functions as the runtime runs them, for one call from the beginning of two texts of five tokens."""

    def run(marker: OpOverload) -> Callable[..., Tensor]:
        def call(*args: Any) -> Tensor:
            operands = args[:-2]
            store = StateStore([StatePlan(0, 0, state_shape(marker, operands), float32=True)], 2, torch.float32, "cpu")
            return STATE_OPS[marker](*operands, SimpleNamespace(states=store, new_tokens=new, attention=()), 0, 0)

        return call

    new = NewTokens([slice(0, 5)] * 2, None)
    return Functions(run(CONVOLUTION), run(DELTA_RULE), run(SCAN))
