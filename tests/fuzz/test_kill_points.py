"""Compiles killed at their file operations and at random times: the destination is the old artifact or the new one,
whole, and nothing is left after the next compile.

What takes a destination is killed at every file operation that it has. Whole compiles are killed at a few of theirs, or
at 200 where the environment variable PMKVQ_FUZZ is set.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pmkvq_compiler import runtime
from pmkvq_compiler.cli import main
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.emit import place as place_module
from pmkvq_compiler.emit import renames
from pmkvq_compiler.options import CompileOptions
from tests.conftest import token_lines
from tests.emit.test_place import artifact, claim
from tests.folders import model_folder, tree
from tests.fuzz import chosen

OPERATIONS = {"open", "fcntl.flock", "subprocess.Popen", "shutil.rmtree", "shutil.copytree", "pmkvq.rename"} | {
    f"os.{name}" for name in ("mkdir", "rename", "remove", "rmdir", "chmod", "scandir", "listdir", "truncate")
}
WHOLE_RUN = "PMKVQ_FUZZ" in os.environ
pytestmark = pytest.mark.usefixtures("real_checks")
OLD = "the card of the old artifact"


def watch(folder: Path, happens: Callable[[int], None]) -> None:
    """Call `happens` with the number of each file operation of this process in `folder`, before it is done, and before
    and after each rename that Python does not know. For forked processes: it cannot be undone."""
    count, owner = 0, os.getpid()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in OPERATIONS or os.getpid() != owner:
            return
        if event.startswith(("open", "os.")) and not any(str(folder) in str(one) for one in arguments):
            return
        count += 1
        happens(count)

    def audited(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def renamed(source: Path, target: Path) -> None:
            sys.audit("pmkvq.rename")
            rename(source, target)
            sys.audit("pmkvq.rename")

        return renamed

    for name in ("exchange", "move_to_free_place"):
        setattr(place_module, name, audited(getattr(place_module, name)))
    sys.addaudithook(audit)


def fork(function: Callable[[], int]) -> int:
    """The process id of a child that runs `function` and exits with what it returns."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """The exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# ---- the protocol, at every operation ----


@pytest.mark.parametrize("native", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("before", chosen(["nothing", "empty", "artifact"], "nothing", "artifact"))
def test_killed_at_any_operation_the_destination_is_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(renames, "_native_rename", lambda: None)
    output = tmp_path / "deep" / "out"

    def replace(at: int) -> int:
        watch(tmp_path, lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == at else None)
        with claim(output, force=True) as place:
            artifact(place.folder, "new")
            place.take(True)
        return 0

    new = tree(artifact(tmp_path / "new", "new"))
    at, code = 0, -signal.SIGKILL
    outcomes = set()
    while code == -signal.SIGKILL:
        at += 1
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
        if before == "empty":
            output.mkdir(parents=True)
        if before == "artifact":
            artifact(output)
        old = contents(output)
        code = ended(fork(partial(replace, at)))
        if native or before != "artifact":  # between two renames there is nothing, until the next compile
            assert contents(output) in (old, new), at
        fail_in(output)
        found = contents(output)
        assert found in (old, new), at
        assert {path.name for path in output.parent.glob("*")} <= {"out"}, at
        outcomes.add(found == new)
    assert code == 0
    assert at > 15
    assert outcomes == {True, False}


def contents(output: Path) -> dict[str, bytes | None] | None:
    return tree(output) if output.exists() else None


def fail_in(output: Path) -> None:
    """A compile that begins and fails."""
    with suppress(KeyError), claim(output, force=True) as place:
        (place.folder / "half").touch()
        raise KeyError


# ---- whole compiles ----


@dataclass(frozen=True)
class Model:
    folder: Path
    options: list[str]
    operations: int
    """How many a compile has in `folder`."""
    seconds: float
    """How long one takes."""

    def command(self, output: Path) -> list[str]:
        return [*self.options, "-o", str(output), "--force"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, real_checks: None) -> Model:
    """A model with a calibration, so that compiles take no longer than they must, and an artifact called `old`."""
    folder = tmp_path_factory.mktemp("kill")
    model_folder(folder / "model", num_hidden_layers=1)
    calib = token_lines(folder / "tokens.jsonl")
    options = [str(folder / "model"), "--recipe", "none", "--calib", str(calib), "--max-len", "96"]
    options += ["--calib-samples", "1", "--calib-len", "64"]
    model = Model(folder, options, 0, 0)
    assert quiet(model.command(folder / "old"), folder / "said") == 0
    (folder / "old" / "README.md").write_text(OLD)
    file = os.open(folder / "counted", os.O_RDWR | os.O_CREAT)

    def counted() -> int:
        watch(folder, lambda count: os.ftruncate(file, count))
        return quiet(model.command(folder / "fresh"), folder / "said")

    start = time.perf_counter()
    assert ended(fork(counted)) == 0
    return Model(folder, options, os.fstat(file).st_size, time.perf_counter() - start)


def quiet(command: list[str], said: Path) -> int:
    with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        return main(command)


@dataclass(frozen=True)
class Kill:
    target: str
    number: signal.Signals
    operation: float | None
    """At which, as a share of all; None to be killed from outside."""
    moment: float = 0
    """When, as a share of the time that a compile takes."""


def kills() -> Iterator[Kill]:
    """A few that matter, or 200: the last operations, which take the destination, are all among them."""
    if not WHOLE_RUN:
        yield Kill("new", signal.SIGINT, 0.5)
        yield Kill("existing", signal.SIGKILL, 0.95)
        return
    dice = random.Random(17)
    for target in ("new", "existing"):
        yield from (Kill(target, signal.SIGKILL, number / 40) for number in range(40))
        yield from (Kill(target, signal.SIGKILL, None, dice.random()) for _ in range(20))
        yield from (Kill(target, signal.SIGINT, number / 20) for number in range(20))
        yield from (Kill(target, signal.SIGINT, None, dice.random()) for _ in range(10))
        yield from (Kill(target, signal.SIGTERM, dice.random()) for _ in range(7))
        yield from (Kill(target, signal.SIGHUP, dice.random()) for _ in range(3))


@pytest.mark.parametrize("kill", list(kills()), ids=str)
def test_a_compile_that_is_killed_breaks_no_destination_and_leaves_nothing(
    model: Model, tmp_path: Path, kill: Kill
) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    for calibration in model.folder.glob("*.calibration.safetensors"):
        shutil.copy(calibration, folder)
    kept = {path.name for path in folder.iterdir()}
    output, said = folder / "out", tmp_path / "said"
    if kill.target == "existing":
        shutil.copytree(model.folder / "old", output)
    old = contents(output)
    at = None if kill.operation is None else 1 + int(kill.operation * model.operations)

    def victim() -> int:
        if at is not None:
            watch(folder, lambda count: signal.raise_signal(kill.number) if count == at else None)
        return quiet(model.command(output), said)

    child = fork(victim)
    if at is None:
        time.sleep(kill.moment * model.seconds)
        os.kill(child, kill.number)
    code = ended(child)
    assert code in (-signal.SIGKILL, 128 + kill.number, 0)
    found = contents(output)
    if found is not None:
        assert_whole(output, new=found != old)
    if kill.number != signal.SIGKILL:
        assert {path.name for path in folder.iterdir()} <= {*kept, "out"}
    if code > 0:
        sentence = said.read_text().splitlines()[-1]
        assert sentence.startswith("pmkvq-compile: ")
        assert sentence.endswith("; nothing was changed" if found == old else "is the new artifact, whole")
    assert quiet(model.command(output), said) == 0, said.read_text()
    assert_whole(output, new=True)
    assert {path.name for path in folder.iterdir()} == {*kept, "out"}


def assert_whole(artifact: Path, new: bool) -> None:
    manifest = json.loads((artifact / "pmkvq.json").read_text())
    files = {path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == {*manifest["files"], "pmkvq.json", "README.md"}
    assert ((artifact / "README.md").read_text() != OLD) == new
    assert runtime.load(artifact).plan.max_len == 96


def test_a_calibration_that_was_kept_is_told(tmp_path: Path) -> None:
    model_folder(tmp_path / "model", num_hidden_layers=1)
    options: dict[str, Any] = {"recipe": "none", "max_len": 80, "calib_samples": 1, "calib_len": 64}
    options["calib"] = str(token_lines(tmp_path / "tokens.jsonl"))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "emit":
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match=r"nothing was changed, and the calibration is kept in .*model-"):
            compile_model(CompileOptions(str(tmp_path / "model"), tmp_path / "out", **options), interrupt)
        with pytest.raises(KeyboardInterrupt, match=r"nothing was changed$"):
            compile_model(CompileOptions(str(tmp_path / "model"), tmp_path / "out", **options), interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
