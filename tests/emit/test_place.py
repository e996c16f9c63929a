"""Where an artifact may go, and that nothing else is ever lost there."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pmkvq_compiler.cli import main
from pmkvq_compiler.emit import renames
from pmkvq_compiler.emit.place import Place, claimed
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.interrupts import Signals, watched
from tests.children import in_child
from tests.conftest import token_lines
from tests.folders import model_folder, open_to_others, tree

Claim = Callable[..., "Iterator[Place]"]


def claim(output: Path | str, force: bool = False, keep: dict[str, Path] | None = None):  # type: ignore[no-untyped-def]
    return claimed(Path(output), force, keep or {}, Signals())


def artifact(folder: Path, content: str = "old") -> Path:
    """A folder that the compiler could have written."""
    (folder / "package").mkdir(parents=True, exist_ok=True)
    (folder / "package" / "model.py").write_text(content)
    (folder / "README.md").write_text("the card")
    manifest = {"format_version": 2, "package": "package", "files": {"package/model.py": "0" * 64}}
    (folder / "pmkvq.json").write_text(json.dumps(manifest))
    return folder


def write_new(place: Place) -> None:
    (place.folder / "package").mkdir()
    (place.folder / "package" / "model.py").write_text("new")


NEW = {"package": None, "package/model.py": b"new"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model that no compile could open; the home folder is beside it, empty."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here" / "models" / "model").mkdir(parents=True)
    (tmp_path / "here" / "models" / "model" / "config.json").write_text("no config")
    (tmp_path / "here" / "texts").mkdir()
    (tmp_path / "here" / "texts" / "calib.txt").write_text("Call me Ishmael.")
    return tmp_path / "here"


def link(target: str, name: str) -> Callable[[Path], None]:
    return lambda here: (here / name).symlink_to(target)


def nothing(here: Path) -> None:
    pass


REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("", nothing, "is the current folder"),
    (".", nothing, "is the current folder"),
    ("./", nothing, "is the current folder"),
    ("texts/..", nothing, "is the current folder"),
    ("..", nothing, "holds the current folder"),
    ("../here", nothing, "is the current folder"),
    ("/", nothing, "holds the current folder"),
    ("../home", nothing, "is the home folder"),
    ("/proc", nothing, "is the mount point /proc"),
    ("/dev", nothing, "output /dev "),
    ("models/model", nothing, "is the model"),
    ("models/model/", nothing, "is the model"),
    ("models/../models/model", nothing, "is the model"),
    ("other/model", link("models", "other"), "is the model"),
    ("models", nothing, "holds the model"),
    ("texts", nothing, "holds the calibration text"),
    ("weights", lambda here: (artifact(here / "weights"), linked_weights(here)), "holds a file of the model"),
    ("texts/calib.txt", nothing, "is a file; choose a folder"),
    ("texts/calib.txt/out", nothing, "calib.txt is a file"),
    ("texts/calib.txt/deeper/out/", nothing, "calib.txt is a file"),
    ("pipe", lambda here: os.mkfifo(here / "pipe"), "is a file; choose a folder"),
    ("link", link("empty", "link"), "is a symbolic link to empty"),
    ("link/", lambda here: ((here / "empty").mkdir(), link("empty", "link")(here)), "is a symbolic link to empty"),
    ("link", lambda here: link(str(artifact(here / "old")), "link")(here), "is a symbolic link to"),
    ("loop/out", link("loop", "loop"), "(Too many levels of symbolic links)"),
    ("n" * 300, nothing, "(File name too long)"),
    ("n" * 255, nothing, "(File name too long)"),
    ("deep/" * 2000 + "out", nothing, "(File name too long)"),
    (os.fsdecode(b"caf\xe9"), nothing, "is not valid UTF-8"),
    (os.fsdecode(b"caf\xe9/out"), nothing, "is not valid UTF-8"),
    ("mine", lambda here: shutil.copytree(here / "texts", here / "mine"), "is not empty and is not an artifact"),
    ("other\nline", lambda here: shutil.copytree(here / "texts", here / "other\nline"), r"'other\nline' is not empty"),
]


def linked_weights(here: Path) -> None:
    (here / "models" / "model" / "model.safetensors").symlink_to(here / "weights" / "package" / "model.py")


@pytest.mark.parametrize(("output", "prepare", "words"), REFUSED, ids=[repr(case[0][:30]) for case in REFUSED])
def test_a_place_that_must_stay_is_refused_before_any_work(
    here: Path, capsys: pytest.CaptureFixture[str], output: str, prepare: Callable[[Path], object], words: str
) -> None:
    """With --force. The model cannot be opened, which would be the complaint if anything had been done."""
    prepare(here)
    before = tree(here.parent)
    command = ["models/model", "--budget", "1GiB", "--calib", "texts/calib.txt", "--force", "-o", output]
    assert main(command) == 2
    shown = capsys.readouterr()
    (sentence,) = filter(None, map(str.strip, shown.err.splitlines()))
    assert sentence.startswith("pmkvq-compile: output ")
    assert words in sentence
    assert shown.out == ""
    assert tree(here.parent) == before


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"format_version": "2", "files": {}}', "[" * 10**5, "\xff{"])
def test_a_file_called_like_a_manifest_makes_no_artifact(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pmkvq.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="is not an artifact"), claim(tmp_path / "out", force=True):
        pass
    assert (tmp_path / "out" / "pmkvq.json").exists()


def test_an_artifact_is_replaced_with_force_alone_and_an_empty_folder_without(tmp_path: Path) -> None:
    old = artifact(tmp_path / "old")
    (old / "package" / "__pycache__").mkdir()  # as imports leave it
    (old / "package" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"code")
    with pytest.raises(UsageError, match="--force"), claim(old):
        pass
    (tmp_path / "empty").mkdir()
    for output, force in ((old, True), (tmp_path / "empty", False), (tmp_path / "deep" / "er" / "new", False)):
        with claim(output, force) as place:
            write_new(place)
            place.take(force)
        assert tree(output) == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "old"]


@pytest.mark.parametrize("name", ["notes.txt", ".git/config", "package/mine.py"])
def test_what_a_user_keeps_in_an_artifact_is_not_replaced(tmp_path: Path, name: str) -> None:
    file = artifact(tmp_path / "out") / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=f"also holds {name}"), claim(tmp_path / "out", force=True):
        pass
    assert tree(tmp_path) == before


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path) -> None:
    artifact(tmp_path / "old")
    before = tree(tmp_path)
    for output in (tmp_path / "old", tmp_path / "a" / "b" / "new"):
        with suppress(KeyError), claim(output, force=True) as place:
            write_new(place)
            assert tree(tmp_path) != before
            raise KeyError
        assert tree(tmp_path) == before


def test_a_second_compile_into_one_place_is_refused_at_its_start(tmp_path: Path) -> None:
    def second() -> str:
        with pytest.raises(CompileError) as error, claim(tmp_path / "out"):
            pass
        return str(error.value)

    with claim(tmp_path / "out") as place:
        write_new(place)
        for sentence in (second(), in_child(second)):
            assert "is being written by another compile" in sentence
        with claim(tmp_path / "other"):
            pass
        place.take(False)
    assert tree(tmp_path / "out") == NEW


def test_what_a_dead_process_left_is_swept_and_what_others_have_there_is_not(tmp_path: Path) -> None:
    for folder in ("artifact", "scratch", "replaced"):
        (tmp_path / ".out.partial" / folder / "deep").mkdir(parents=True)
        (tmp_path / ".out.partial" / folder / "deep" / "file").write_text("half")
        (tmp_path / ".out.partial" / folder / "deep").chmod(0o500)
    artifact(tmp_path / "out")
    alive, dead = (tmp_path / f".m.calibration.safetensors.{process}" for process in (os.getpid(), 2**22 + 1))
    alive.touch()
    dead.touch()
    with claim(tmp_path / "out", force=True) as place:
        artifact(place.folder, "new")
        place.take(True)
    assert (tmp_path / "out" / "package" / "model.py").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "out"]
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "film.mkv").touch()
    with pytest.raises(UsageError, match=r"\.out\.partial.*is in use"), claim(tmp_path / "out", force=True):
        pass
    assert (tmp_path / ".out.partial" / "film.mkv").exists()


def appears(target: Path) -> None:
    target.mkdir()
    (target / "letter.txt").write_text("mine")


def is_filled(target: Path) -> None:
    (target / "letter.txt").write_text("mine")


def is_exchanged(target: Path) -> None:
    target.rename(target.with_name("elsewhere"))
    appears(target)


def becomes_a_link(target: Path) -> None:
    target.rename(target.with_name("elsewhere"))
    target.symlink_to("elsewhere")


@pytest.mark.parametrize("native", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize(
    ("before", "happens"),
    [
        ("nothing", appears),
        ("empty", is_filled),
        ("empty", is_exchanged),
        ("artifact", is_filled),
        ("artifact", is_exchanged),
        ("artifact", becomes_a_link),
        ("artifact", shutil.rmtree),
    ],
)
def test_a_folder_that_changes_during_the_compile_stays_and_the_artifact_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, happens: Callable[[Path], object], native: bool
) -> None:
    if not native:
        monkeypatch.setattr(renames, "_native_rename", lambda: None)
    target = tmp_path / "out"
    if before != "nothing":
        target.mkdir()
    if before == "artifact":
        target.rmdir()
        artifact(target)
    (tmp_path / "out-2").write_text("this name is taken")
    with claim(target, True) as place:
        write_new(place)
        happens(target)
        changed = tree(target), target.is_symlink()
        with pytest.raises(CompileError, match=r"the finished artifact is in .*out-3$"):
            place.take(True)
    assert (tree(target), target.is_symlink()) == changed
    assert tree(tmp_path / "out-3") == NEW
    assert not (tmp_path / ".out.partial").exists()


def test_two_renames_replace_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renames, "_native_rename", lambda: None)
    for output in (tmp_path / "new", artifact(tmp_path / "old")):
        with claim(output, True) as place:
            write_new(place)
            place.take(True)
        assert tree(output) == NEW
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_a_compile_killed_between_two_renames_is_undone_by_the_next(tmp_path: Path) -> None:
    old = tree(artifact(tmp_path / ".out.partial" / "replaced"))
    (tmp_path / ".out.partial" / "artifact").mkdir()
    with pytest.raises(UsageError, match="--force"), claim(tmp_path / "out"):
        pass
    assert tree(tmp_path / "out") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_this_user_may_not_write_to_is_refused_at_the_start(tmp_path: Path) -> None:
    open_to_others(tmp_path)
    artifact(tmp_path / "old")
    tmp_path.chmod(0o555)

    def refused(output: Path) -> str:
        with pytest.raises(UsageError) as error, claim(output, force=True):
            pass
        return str(error.value)

    try:
        assert "(Permission denied)" in in_child(lambda: refused(tmp_path / "new"), as_nobody=True)
        assert "(Permission denied)" in in_child(lambda: refused(tmp_path / "deep" / "new"), as_nobody=True)
        assert "may not be replaced" in in_child(lambda: refused(tmp_path / "old"), as_nobody=True)
    finally:
        tmp_path.chmod(0o755)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def fill(output: Path) -> None:
    with claim(output) as place:
        (place.folder / "large").write_bytes(bytes(2_000_000))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=64", "none", tmp_path / "disk"]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a file system, where it may")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


def test_a_mounted_disk_is_no_destination_and_a_full_or_read_only_one_is_said(disk: Path) -> None:
    with pytest.raises(UsageError, match="is the mount point"), claim(disk):
        pass
    with pytest.raises(UsageError, match="holds the mount point"), claim(disk.parent, force=True):
        pass
    with claim(disk / "out") as place:
        place.check_room(1000)
        with pytest.raises(CompileError, match=r"needs 2,000,000 bytes, but its file system has 1,0\d\d,\d\d\d free"):
            place.check_room(2_000_000)
    with pytest.raises(CompileError, match=r"out cannot be written \(No space left on device\); free"):
        fill(disk / "out")
    assert tree(disk) == {}
    with suppress(OSError):
        for number in range(64):
            (disk / str(number)).touch()
    with pytest.raises(CompileError, match="No space left on device"), claim(disk / "out"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(UsageError, match="Read-only file system"), claim(disk / "out"):
        pass


def test_what_runs_out_is_said_in_a_sentence_and_nothing_is_left(tmp_path: Path) -> None:
    """Files of limited size, as on a full disk, and few open ones: whatever of a compile comes to its limit first."""
    model_folder(tmp_path / "model", num_hidden_layers=1)
    calib = token_lines(tmp_path / "tokens.jsonl")
    (tmp_path / "place").mkdir()
    command = [str(tmp_path / "model"), "--budget", "200%", "--max-len", "96", "--window", "64", "--calib", str(calib)]
    command += ["--calib-samples", "1", "--calib-len", "96", "-o", str(tmp_path / "place" / "out")]

    def limited(kind: int, limit: int) -> tuple[int, str]:
        resource.setrlimit(kind, (limit, limit))
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = main(command)
        return code, said.getvalue()

    assert main([*command, "--dry-run"]) == 0  # all is imported
    folder = Path("/proc/self/fd")
    opened = {int(name) for name in os.listdir(folder)} if folder.exists() else {*range(64)}
    unused = (number for number in itertools.count() if number not in opened)  # a limit on numbers, not on how many
    limits = [(resource.RLIMIT_FSIZE, size) for size in (0, 5_000, 60_000)]
    limits += [(resource.RLIMIT_NOFILE, number) for number in itertools.islice(unused, 5)]
    for kind, limit in limits:
        code, said = in_child(partial(limited, kind, limit))
        assert code == 1, said
        sentence = said.strip().splitlines()[-1]
        expected = "File too large" if kind == resource.RLIMIT_FSIZE else r"ulimit -n|Too many open files"
        assert re.fullmatch(rf"pmkvq-compile: .*({expected}).*", sentence), said
        assert "Traceback" not in said
    left = {path.name for path in (tmp_path / "place").iterdir() if not path.name.startswith("model-")}
    assert left <= {".out.partial"}, "what cannot be opened cannot be removed"
    assert main(command) == 0
    assert {path.name for path in (tmp_path / "place").iterdir() if not path.name.startswith("model-")} == {"out"}


@pytest.mark.parametrize("begins", [True, False], ids=["as it begins to end", "when it has taken the destination"])
def test_a_signal_at_any_line_of_a_compiles_end_leaves_nothing(tmp_path: Path, begins: bool) -> None:
    """Between the last statement of a compile and the first that defers signals are lines of contextlib's and ours."""
    at, arrived = 0, True
    while arrived:
        at, arrived, count = at + 1, False, 0

        def trace(frame: FrameType, event: str, argument: object, at: int = at) -> Any:
            nonlocal count, arrived
            count += 1
            if count == at:
                arrived = True
                sys.settrace(None)
                signal.raise_signal(signal.SIGTERM)
            return trace

        output = tmp_path / f"out{at}"
        with suppress(KeyboardInterrupt), watched() as signals:
            try:
                with claimed(output, False, {}, signals) as place:
                    artifact(place.folder, "new")
                    if not begins:
                        place.take(False)
                    sys.settrace(trace)
            finally:
                sys.settrace(None)
        assert [path.name for path in tmp_path.glob(".*")] == [], at
        assert output.exists() != begins
    assert at > 100
