"""Linear recurrences by flash-linear-attention, whose kernels models of this kind are trained and served with.

The library is optional: it is used on a CUDA device, where it can be imported. Before its first results are used, they
are compared with the reference's on a few random numbers (see `recurrence`). What does not work becomes a warning.

Each rule has two kernels. One goes from token to token and computes in float32. The other takes chunks of tokens on
tensor cores and keeps the states between chunks in the dtype of the operands. That is for bfloat16 alone: operands in
float32 would be rounded to the 10 bits of TF32, and float16 might not have the range of a state. Decoding takes the
first kernel. The host reads no numbers for it, so a CUDA graph can hold it.

The library's short convolution is not used. It knows no padding, and rounds as PyTorch's does.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .manifest import brief

STEPS = 128
"""Up to so many tokens of a call are taken one after the other. That is a single launch, and on an H200 it takes less
time than the launches for chunks do."""
NARROWEST, WIDEST = 8, 256
"""Channels that keys and values have at least, and that keys have at most."""

AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""The largest relative norm of the difference of the library's results from the reference's, for each dtype of operands
that it is used with."""
TRIALS = {True: 3, False: 1000}
"""Tokens of the text that results are first compared on, one by one and in chunks. Triton tunes the kernels for it."""
RANGES = {
    "delta_rule": ((-1, 1), (-1, 1), (-1, 1), (-1, 0), (0, 1)),
    "scan": ((-1, 1), (0, 1), (-1, 0), (-1, 1), (-1, 1)),
}
"""Where the numbers of that text lie, for each tensor among the operands of a rule."""

_LAUNCHING = Lock()
"""Threads launch one after another: what Triton has tuned, it keeps beside the arguments of the call."""

Rule = Callable[..., tuple[Tensor, Tensor]]
"""From operands, of which the last is a state, to results and the state after them."""


def one_by_one(query: Tensor) -> bool:
    """Whether the tokens of queries [B, S, ...] are taken one after the other."""
    return query.shape[1] <= STEPS or query.dtype != torch.bfloat16


@dataclass(frozen=True)
class Kernels:
    """The two kernels of one recurrence."""

    chunks: Rule
    steps: Rule

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
        kernel = self.steps if one_by_one(q) else self.chunks
        with _LAUNCHING:
            return kernel(q, k, v, initial_state=state, output_final_state=True, **others)


@dataclass(frozen=True)
class Library:
    """What the library computes, for the operands and states of `recurrence`; every column is a token here."""

    name: str
    by_head: Kernels
    by_channel: Kernels
    gated: Kernels

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        beta: Tensor,
        scale: float,
        normalize: bool,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:
        kernels = self.by_head if decay.dim() == 3 else self.by_channel
        return kernels(query, key, value, state, g=decay, beta=beta, scale=scale, use_qk_l2norm_in_kernel=normalize)

    def scan(
        self, x: Tensor, step: Tensor, rate: Tensor, key: Tensor, query: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The scan of Mamba-2 is gated linear attention to values that are multiplied by their steps."""
        heads = x.shape[2] // key.shape[2]
        q, k = (one.repeat_interleave(heads, dim=2) for one in (query, key))
        values = (x * step.unsqueeze(-1)).to(x.dtype)
        out, state = self.gated(q, k, values, state, g=step * rate, scale=1.0)
        return out.float(), state


_failures: list[str] = []
"""Why the library is no longer used in this process."""


def library_for(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Library | None:
    """The library, where it is installed, works, and computes recurrences on a device whose operands have this dtype
    and whose states this `shape`, which ends with [keys, values]. It is imported at the first call that needs it."""
    keys, values = shape[-2:]
    fits = min(keys, values) >= NARROWEST and keys <= WIDEST
    return _imported() if device.type == "cuda" and dtype in AGREEMENT and fits and not _failures else None


def rule_for(name: str, reference: Rule, operands: tuple[Any, ...]) -> Rule:
    """The library's rule of this name for such operands, if it computes what the reference does; else the reference."""
    *given, state = operands
    library = library_for(state.shape, operands[0].dtype, state.device)
    if library is None:
        return reference
    forms = tuple(Form.of(one) if isinstance(one, Tensor) else one for one in given)
    tokens = TRIALS[one_by_one(operands[0])]
    agrees = _agrees(library, name, reference, forms, state.shape[1:], state.device, tokens)
    return partial(_run, library, name, reference) if agrees else reference


def _run(library: Library, name: str, reference: Rule, *operands: Any) -> tuple[Tensor, Tensor]:
    """What a rule of the library computes. Where it fails, the library is given up, and the reference goes on."""
    try:
        results: tuple[Tensor, Tensor] = getattr(library, name)(*operands)
        return results
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel may raise that another version of Triton compiles
        give_up(f"({library.name}) does not work here ({brief(f'{type(error).__name__}: {error}')})")
        return reference(*operands)


@dataclass(frozen=True)
class Form:
    """A tensor among the operands of a rule: its numbers for each token of a sequence, or for all of them."""

    of_tokens: bool
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, operand: Tensor) -> Form:
        of_tokens = operand.dim() > 2
        return cls(of_tokens, operand.shape[2:] if of_tokens else operand.shape, operand.dtype)


@cache
def _agrees(
    library: Library,
    name: str,
    reference: Rule,
    forms: tuple[Any, ...],
    state_shape: torch.Size,
    device: torch.device,
    tokens: int,
) -> bool:
    """Whether a rule of the library computes what the reference does; if not, the library is given up.

    Triton compiles and tunes the kernels in this call, so it must not be captured in a graph.
    """
    generator, dtype = torch.Generator(device).manual_seed(0), forms[0].dtype

    def drawn(shape: Sequence[int], low: int, high: int) -> Tensor:
        return torch.empty(shape, device=device).uniform_(low, high, generator=generator)

    ranges, operands = iter(RANGES[name]), []
    for form in forms:
        if isinstance(form, Form):
            shape = (1, tokens, *form.shape) if form.of_tokens else form.shape
            form = drawn(shape, *next(ranges)).to(form.dtype)
        operands.append(form)
    operands.append(drawn((1, *state_shape), -1, 1))
    pairs = zip(_run(library, name, reference, *operands), reference(*operands), strict=True)
    if not _failures and any(_difference(*pair) > AGREEMENT[dtype] for pair in pairs):
        give_up(f"({library.name}) computes something else here than PyTorch does")
    return not _failures


def _difference(found: Tensor, expected: Tensor) -> float:
    """The relative norm of the difference; infinite where a number is not finite."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.double(), expected.double()
    relative = float((found - expected).norm() / expected.norm())
    return relative if math.isfinite(relative) else math.inf


@cache
def _imported() -> Library | None:
    try:
        if importlib.util.find_spec("fla") is None:
            return None
        import fla
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
        from fla.ops.kda import chunk_kda, fused_recurrent_kda
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

        return Library(
            name=f"fla {fla.__version__}",
            by_head=Kernels(chunk_gated_delta_rule, fused_recurrent_gated_delta_rule),
            by_channel=Kernels(chunk_kda, fused_recurrent_kda),
            gated=Kernels(chunk_simple_gla, fused_recurrent_simple_gla),
        )
    except Exception as error:  # whatever another version of it, of Triton or of torch may raise
        give_up(f"cannot be imported ({brief(f'{type(error).__name__}: {error}')})")
        return None


def give_up(failure: str) -> None:
    """Use the library no more in this process, and warn that it does not: "flash-linear-attention `failure`"."""
    _failures.append(failure)
    warnings.warn(
        f"flash-linear-attention {failure}, so recurrent layers are computed in plain PyTorch, which is slower; "
        f"install a version that fits torch {torch.__version__}, or uninstall it",
        RuntimeWarning,
        stacklevel=2,
    )
