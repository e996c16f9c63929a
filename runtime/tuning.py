"""How the generated kernels are launched, as was measured on devices: `kernels/tuning.json` of an artifact."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch

from .errors import ArtifactError
from .manifest import AGAIN, conform, parse_json
from .plan import CODE_BITS

TUNING, DEFAULT_TUNING = "tuning.json", "default"

LARGEST_REGISTERS = 248
"""Registers of a lane, of which eight single warps have the most that can be had."""

NARROW_REGISTERS = 168
"""Registers of a lane for heads of up to 64 channels: more programs at once are worth more than more registers."""


@dataclass(frozen=True)
class DecodeTuning:
    """The decode kernel runs in single warps of so many `registers` a lane, for heads of 128 channels; a lane takes
    `cells` words of V in a step, and blocks of the pool are asked for `prefetch` ahead."""

    cells: int
    registers: int
    prefetch: int

    def registers_for(self, channels: int) -> int:
        """Sums of values and queries take registers in proportion to a head's channels."""
        most = NARROW_REGISTERS if channels <= 64 else LARGEST_REGISTERS
        return LARGEST_REGISTERS if channels > 128 else min(self.registers, most)


@dataclass(frozen=True)
class Tuning:
    """How kernels are launched; none of it changes what they compute.

    `decode[bits]` is for V of that width.
    """

    decode: dict[int, DecodeTuning]
    prefill_tile: int
    prefill_step: int
    prefill_warps: int
    prefill_stages: int
    append_warps: int = 4
    lower_warps: int = 8
    prefill_scratch: int = 256 << 20
    """Bytes for what new tokens attend to, unpacked."""

    def prefill_shape(self, channels: int, dtype: torch.dtype) -> tuple[int, int]:
        """Queries and keys of a step of the prefill kernel. Wide keys are taken fewer at a time, for the sake of shared
        memory, and fp32 numbers, which are no operands of the matrix unit, in tiles that registers hold."""
        if dtype == torch.float32:
            return 32, 16
        return self.prefill_tile, self.prefill_step if channels <= 128 else self.prefill_step // 2


def read_tunings(text: str) -> dict[str, Tuning]:
    """A table of tunings (JSON) by a part of the device's name; one of them is "default", for all other devices.

    Raises `ArtifactError` where it is something else.
    """
    tunings: dict[str, Tuning] = conform(parse_json(text.encode(), TUNING), dict[str, Tuning], TUNING)
    if DEFAULT_TUNING not in tunings:
        raise ArtifactError(f"{TUNING} has nothing for {DEFAULT_TUNING!r}; {AGAIN}")
    for tuning in tunings.values():
        decode = [number for one in tuning.decode.values() for number in astuple(one)]
        launch = [getattr(tuning, field.name) for field in fields(tuning) if field.name != "decode"]
        if tuning.decode.keys() != {*CODE_BITS}:
            widths = ", ".join(map(str, CODE_BITS))
            raise ArtifactError(f"{TUNING} does not say how V is decoded at exactly {widths} bits; {AGAIN}")
        if min(decode) < 0 or min(launch) < 1:
            raise ArtifactError(f"{TUNING} has numbers that no kernel can be launched with; {AGAIN}")
    return tunings


def tuning_for(device: torch.device, tunings: dict[str, Tuning]) -> Tuning:
    """How to launch kernels on a device: as was measured on it, or cautiously."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tuning for known, tuning in tunings.items() if known in name), tunings[DEFAULT_TUNING])
