"""The README and the guides: their commands are accepted, their Python runs, their links lead somewhere."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import import_utils

from pmkvq_compiler.cli import EXAMPLES, main, parse

from .folders import TEXT, model_folder
from .guides import ROOT, Guide, commands, docstring_commands, guides
from .test_huggingface import CHAT_TEMPLATE

GUIDES = guides()
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*.py") if path.name != "__init__.py")
NAME, PACKAGE = "SmolLM2-135M-Instruct", "smollm2_135m_instruct"
ELSEWHERE = {"git", "hf", "lcb_runner", "gh"}
"""Programs of others, whose arguments are not looked at."""


class ArgumentsRead(Exception):
    """A script has accepted its arguments and would begin its work."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `out/demo` is what a reader's would be, of a tiny model with the demo's name."""
    folder = tmp_path_factory.mktemp("reader")
    source = model_folder(folder / NAME, max_position_embeddings=4096)
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "text.txt").write_text(TEXT)
    calibration = ["--calib", str(folder / "text.txt"), "--calib-samples", "2", "--calib-len", "128"]
    output = ["-o", str(folder / "out" / "demo")]
    assert main([str(source), "--budget", "25%", "--max-len", "4096", *calibration, *output]) == 0
    return folder


def check(words: Sequence[str], project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command of a guide would be refused."""
    while "=" in words[0]:  # variables for this command alone
        words = words[1:]
    program, arguments = Path(words[0]).name, list(words[1:])
    if "|" in arguments or ">" in arguments:
        arguments = arguments[: min(arguments.index(one) for one in ("|", ">") if one in arguments)]
    if program == "pmkvq-compile":
        accepted(parse, arguments)
    elif program in ("python", "python3") and arguments[0] == "-m":
        check([arguments[1], *arguments[2:]], project, monkeypatch)
    elif program in ("python", "python3"):
        script_accepts(ROOT / arguments[0], arguments[1:], monkeypatch)
    elif program == "make":
        subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        wanted = {name for word in arguments for names in re.findall(r"\[(.+)\]", word) for name in names.split(",")}
        assert wanted <= set(project["optional-dependencies"]), words
    elif program == "pytest":
        assert all((ROOT / one).exists() for one in arguments if "/" in one), words
    elif program == "lm_eval":
        pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra")
        from lm_eval._cli.harness import HarnessCLI

        monkeypatch.setattr(sys, "argv", [program, *arguments])
        HarnessCLI().parse_args()
    elif program == "cd" or program == "." or program.partition(".")[0] in ELSEWHERE:
        return
    elif program == PACKAGE:
        from pmkvq_compiler.templates.chat import _parser

        _parser(PACKAGE).parse_args(arguments)
    else:
        assert find_spec(program) is not None, f"nothing here knows the command {' '.join(words)!r}"


def accepted(read: Any, arguments: list[str]) -> None:
    """`--help` ends the program well; else the arguments are simply read."""
    try:
        read(arguments)
    except SystemExit as end:
        assert end.code == 0, arguments


def script_accepts(script: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script up to the place where it has read its arguments."""
    original = argparse.ArgumentParser.parse_args

    def read(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        raise ArgumentsRead

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        patch.setattr(sys, "argv", [str(script), *arguments])
        patch.syspath_prepend(script.parent)
        with pytest.raises(ArgumentsRead):
            runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_commands_of_a_guide_are_accepted(
    guide: Guide, project: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in guide.commands:
        check(words, project, monkeypatch)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_commands_in_the_docstring_of_an_example_are_accepted(
    script: Path, project: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in docstring_commands(script):
        check(words, project, monkeypatch)


def test_commands_that_help_shows_are_accepted(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [line for line in EXAMPLES.splitlines() if line.startswith("  pmkvq-compile ")]
    assert len(shown) > 3
    for line in shown:
        for words in commands(line, {}):
            check(words, project, monkeypatch)


def test_a_command_that_would_be_refused_is_noticed(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail."""
    for line in (
        "pmkvq-compile demo --budget 22MiB --block 64",
        "pmkvq-compile demo --max-len 4096",
        "python examples/onnx/onnx_generate.py out/demo",
        "python examples/benchmarks/kernels.py",
        "make everything",
        "pip install 'pmkvq-compiler[pictures]'",
        "lm_eval --model hf --task recall --no_such_option",
        f"python -m {PACKAGE} --question Why",
        "pmkvq-serve out/demo",
    ):
        (words,) = commands(line, {})
        with pytest.raises((Exception, SystemExit)):
            check(words, project, monkeypatch)


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if guide.blocks], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_python_of_a_guide_runs(guide: Guide, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a guide follow on each other, beside an `out/demo` that was compiled before."""
    monkeypatch.chdir(demo)
    monkeypatch.syspath_prepend(demo / "out" / "demo")  # as if the artifact were installed
    names: dict[str, Any] = {"__name__": "__main__"}
    for line, text in guide.blocks:
        code = compile("\n" * (line - 1) + text, str(guide.path), "exec")
        exec(code, names)


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_links_of_a_guide_lead_to_files_and_headings(guide: Guide) -> None:
    anchors = {one.path: one.headings for one in GUIDES}
    for link in guide.links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = (guide.path.parent / name).resolve() if name else guide.path
        assert target.exists(), f"{guide} links to {link}"
        assert not heading or heading in anchors[target], f"{guide} links to {link}"


def test_every_guide_can_be_reached_from_the_readme() -> None:
    """A guide that nothing leads to is not read."""
    linked = {
        (guide.path.parent / link.partition("#")[0]).resolve() for guide in GUIDES for link in guide.links if guide
    }
    shown = {guide.path for guide in GUIDES if ROOT / "examples" in guide.path.parents}
    assert shown - linked == set()


def test_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 900


def test_quickstart_compiles_and_writes(demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / "quickstart.py", demo / NAME, tmp_path / "artifact"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    assert "The whale rose out of the fog, and " in done.stdout
    assert re.search(r"[\d,]+ of [\d,]+ bytes hold 234 tokens", done.stdout)
    assert "calibrate" not in done.stdout, "the second run finds the artifact"


@pytest.mark.parametrize("arguments", [["--prompt", "Why is the sky blue?"], []])
def test_the_terminal_of_the_artifact_answers(demo: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", PACKAGE, *arguments, "--max-new-tokens", "4"],
        input="" if arguments else "Ahoy\n/quit\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=demo / "out" / "demo",
    )
    assert done.stdout.strip()


def test_no_example_hides_a_package() -> None:
    """A script's folder comes first on the path: a file of it that is called like a package is imported in its place.

    A folder without `__init__.py` hides nothing, for Python prefers an installed package to it.
    """
    probed = set(re.findall(r'_is_package_available\("(\w+)', Path(import_utils.__file__).read_text(encoding="utf-8")))
    assert "kernels" in probed, "transformers looks for packages that are not installed, too"
    packages = probed | set(sys.stdlib_module_names) | set(packages_distributions())
    assert [path for path in SCRIPTS if path.stem in packages] == []
    assert list((ROOT / "examples").rglob("__init__.py")) == []
