"""The launch parameters of the generated kernels, as measured per device: `kernels/tuning.json` of an artifact."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch

from .errors import ArtifactError
from .manifest import AGAIN, conform, parse_json
from .plan import CODE_BITS, FINAL_BITS, LayerPlan

TUNING, DEFAULT_TUNING = "tuning.json", "default"

LIBRARY_TILE = 64
"""What `library_unit` is a multiple of."""

MAY_BE_ZERO = ("decode", "library_unit")

LARGEST_REGISTERS = 248
"""The most registers that a lane is given: with these, eight programs of one warp fit a multiprocessor."""

NARROW_REGISTERS = 168
"""The most registers of a lane for heads of up to 64 channels, where more programs at once help more than more
registers."""


@dataclass(frozen=True)
class DecodeTuning:
    """Launch parameters of the decode kernel, whose programs are single warps.

    A lane has so many `registers`, for heads of 128 channels, and takes `cells` words of V in a step. Blocks of the
    pool are prefetched `prefetch` blocks ahead.
    """

    cells: int
    registers: int
    prefetch: int

    def registers_for(self, channels: int) -> int:
        """Registers of a lane for heads with so many channels: queries and sums of values need them in proportion."""
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
    """Bytes for unpacked keys and values, which new tokens attend to."""
    library_unit: int = 0
    """The library attends for so many new tokens or more, whose number is rounded up to a multiple of this. 0: it
    attends for none on this device. A multiple of LIBRARY_TILE."""

    def append_warps_for(self, bits: tuple[int, int]) -> int:
        """Warps of a program that quantizes a block to these widths of K and V. At 2 bits the lanes of few warps have
        too few registers (Triton 3.6)."""
        return self.append_warps * (2 if min(bits) == 2 else 1)

    def prefill_shape(self, channels: int, dtype: torch.dtype) -> tuple[int, int]:
        """How many queries and keys a step of the prefill kernel takes. Wider heads take fewer keys, to fit shared
        memory. The matrix unit cannot multiply fp32 numbers, so their tiles are small enough for registers."""
        if dtype == torch.float32:
            return 32, 16
        return self.prefill_tile, self.prefill_step if channels <= 128 else self.prefill_step // 2


def read_tunings(text: str) -> dict[str, Tuning]:
    """A table of tunings (JSON) by a part of the device's name; one of them is "default", for all other devices.

    Raises `ArtifactError` where the text is not such a table.
    """
    tunings: dict[str, Tuning] = conform(parse_json(text.encode(), TUNING), dict[str, Tuning], TUNING)
    if DEFAULT_TUNING not in tunings:
        raise ArtifactError(f"{TUNING} has nothing for {DEFAULT_TUNING!r}; {AGAIN}")
    for tuning in tunings.values():
        decode = [number for one in tuning.decode.values() for number in astuple(one)]
        launch = [getattr(tuning, field.name) for field in fields(tuning) if field.name not in MAY_BE_ZERO]
        if tuning.decode.keys() != {*CODE_BITS}:
            widths = ", ".join(map(str, CODE_BITS))
            raise ArtifactError(f"{TUNING} does not say how V is decoded at exactly {widths} bits; {AGAIN}")
        if min(*decode, tuning.library_unit) < 0 or min(launch) < 1 or tuning.library_unit % LIBRARY_TILE:
            raise ArtifactError(f"{TUNING} has numbers that no kernel can be launched with; {AGAIN}")
    return tunings


def widths_of(plan: LayerPlan, bits: tuple[int, int]) -> dict[str, int]:
    """The `bits` of K and V. Where nothing is quantized, any that the kernels know will do."""
    key_bits, value_bits = bits if plan.quantized else (FINAL_BITS[0], FINAL_BITS[0])
    return {"KEY_BITS": key_bits, "VALUE_BITS": value_bits}


def tuning_for(device: torch.device, tunings: dict[str, Tuning]) -> Tuning:
    """How to launch kernels on a device: as measured on it, or by the default."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((tuning for known, tuning in tunings.items() if known in name), tunings[DEFAULT_TUNING])
