"""A damaged calibration file is made anew: it never gives another plan, and never ends a compile."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.storage import METADATA_KEY, calibration_path, load_calibration, load_or_calibrate
from pmkvq_compiler.plan.propose import solve
from pmkvq_compiler.source.source import open_source
from tests.calibrate.test_calibrate import equal, options, problem, silent
from tests.folders import TEXT, model_folder
from tests.fuzz import LONG_ONLY, rounds

Damage = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit is another."""
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def flip_header(data: bytes, rng: random.Random) -> bytes:
    """One character of the header is another."""
    place = rng.randrange(8 + int.from_bytes(data[:8], "little"))
    return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randrange(1, 64))


def cut_out(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 64) :]


def zero_page(data: bytes, rng: random.Random) -> bytes:
    """A block that a disk has lost."""
    start = rng.randrange(len(data))
    return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]


def swap(data: bytes, rng: random.Random) -> bytes:
    """Two stretches have changed places."""
    first, second = sorted(rng.sample(range(0, len(data) - 64, 64), 2))
    return (
        data[:first]
        + data[second : second + 64]
        + data[first + 64 : second]
        + data[first : first + 64]
        + (data[second + 64 :])
    )


def digit(data: bytes, rng: random.Random) -> bytes:
    """A number of the header is another: the JSON stays valid."""
    header = 8 + int.from_bytes(data[:8], "little")
    places = [place for place in range(8, header) if data[place : place + 1].isdigit()]
    place = rng.choice(places)
    return data[:place] + str((int(data[place : place + 1]) + rng.randrange(1, 10)) % 10).encode() + data[place + 1 :]


DAMAGES: list[Damage] = [flip, flip_header, truncate, extend, cut_out, zero_page, swap, digit]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    model_folder(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Path, Calibration]:
    """A calibration's file and what it holds."""
    chosen = options(folder, calib=str(folder / "text.txt"))
    calibration = load_or_calibrate(open_source(str(folder / "model")), problem(chosen), chosen.output, silent)
    return calibration_path(chosen.output, "model", calibration.fingerprint), calibration


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_damaged_file_is_taken_for_a_calibration(
    made: tuple[Path, Calibration], tmp_path: Path, damage: Damage
) -> None:
    path, calibration = made
    data, rng = path.read_bytes(), random.Random(damage.__name__)
    assert equal(load_calibration(path), calibration)
    for _ in range(rounds(25, 250)):
        damaged = damage(data, rng)
        (tmp_path / "damaged").write_bytes(damaged)
        if damaged == data:
            assert equal(load_calibration(tmp_path / "damaged"), calibration)
            continue
        with pytest.raises(ValueError, match="sha256"):
            load_calibration(tmp_path / "damaged")


def deep(path: Path) -> None:
    path.write_bytes(b"\xff\xff\xff\x00\x00\x00\x00\x00" + b"[" * 0xFFFFFF)


def rewritten(path: Path) -> None:
    """Another tool has saved the same tensors and numbers with one loss changed: a valid file of no known digest."""
    with safe_open(path, framework="pt") as handle:
        metadata = handle.metadata()
    facts = json.loads(metadata[METADATA_KEY])
    facts["key_loss"][0][-1] *= 2
    save_file(load_file(path), path, metadata={**metadata, METADATA_KEY: json.dumps(facts)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:5]), marks=LONG_ONLY),
        pytest.param(lambda path: path.write_text("not a calibration"), marks=LONG_ONLY),
        lambda path: path.chmod(0),
        deep,
        rewritten,
    ],
    ids=["empty", "five bytes", "a text", "unreadable", "deep nesting", "rewritten"],
)
def test_a_damaged_file_is_replaced_and_the_plan_stays(
    made: tuple[Path, Calibration], folder: Path, damage: Callable[[Path], None]
) -> None:
    path, calibration = made
    source, chosen = (
        open_source(str(folder / "model")),
        options(folder, calib=str(folder / "text.txt"), budget="100000bytes"),
    )
    damage(path)
    again = load_or_calibrate(source, problem(chosen), chosen.output, silent)
    assert equal(load_calibration(path), again), "the file is whole again"
    plans = [solve(problem(chosen), one) for one in (calibration, again)]
    assert plans[0] == plans[1]


def test_a_calibration_under_the_name_of_another_is_not_taken(made: tuple[Path, Calibration], folder: Path) -> None:
    path, calibration = made
    source, chosen = open_source(str(folder / "model")), options(folder, calib=str(folder / "text.txt"))
    other = load_or_calibrate(source, problem(replace(chosen, calib_samples=3)), chosen.output, silent)
    other_path = calibration_path(chosen.output, "model", other.fingerprint)
    other_path.write_bytes(path.read_bytes())
    again = load_or_calibrate(source, problem(replace(chosen, calib_samples=3)), chosen.output, silent)
    assert again.fingerprint == other.fingerprint != calibration.fingerprint
