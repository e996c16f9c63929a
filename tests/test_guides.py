"""The README and the guides: their commands are accepted, their Python runs, their links lead somewhere."""

from __future__ import annotations

import argparse
import functools
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import import_utils

from pmkvq_compiler import runtime
from pmkvq_compiler.cli import EXAMPLES, main, parse
from pmkvq_compiler.options import TARGETS
from pmkvq_compiler.recipes import RECIPES
from tests.emit.test_emit import LATENT_ATTENTION

from .conftest import CompileTiny
from .folders import TEXT, model_folder
from .guides import ROOT, Guide, commands, docstring_commands, guides
from .test_huggingface import CHAT_TEMPLATE

GUIDES = guides()
RECIPE_NAMES = tuple(RECIPES)
"""The compiler's own: benchmarks, which tests run in this process, add some."""
SCRIPTS = sorted(path for path in (ROOT / "examples").rglob("*.py") if path.name != "__init__.py")
NAME, PACKAGE = "SmolLM2-135M-Instruct", "smollm2_135m_instruct"
FILLED_IN = {"SIZE": "25%", "PACKAGE": PACKAGE}
"""What stands for the words that a reader is to replace."""
ELSEWHERE = {"curl", "hf", "lcb_runner", "pre-commit", "vllm"}
"""Programs of others, whose arguments are not looked at."""
OPTIONS_ELSEWHERE = {"--enforce-eager", "--help", "--language-model-only", "--model_args", "--pipeline-parallel-size"}
OPTIONS_ELSEWHERE |= {"--trust-remote-code"}
"""Options that argparse adds, or that programs of others have."""
Check = Callable[[Sequence[str]], None]


class ArgumentsRead(Exception):
    """A script has accepted its arguments and would begin its work."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `out/demo` is what a reader's would be, of a tiny model with the demo's name."""
    folder = tmp_path_factory.mktemp("reader")
    source = model_folder(folder / NAME, max_position_embeddings=4096, num_hidden_layers=1)
    (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "text.txt").write_text(TEXT)
    calibration = ["--calib", str(folder / "text.txt"), "--calib-samples", "2", "--calib-len", "128"]
    output = ["-o", str(folder / "out" / "demo")]
    assert main([str(source), "--budget", "25%", "--max-len", "4096", *calibration, *output]) == 0
    return folder


@pytest.fixture
def check(project: dict[str, Any], demo: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Call it with a command: it fails where the command would be refused."""

    def one(words: Sequence[str]) -> None:
        words = [FILLED_IN.get(word, word) for word in words]
        ends = [words.index(sign) for sign in ("|", ">") if sign in words]
        start = next(number for number, word in enumerate(words) if "=" not in word)  # after variables of this command
        program, *arguments = words[start : min(ends, default=len(words))]
        match Path(program).name:
            case "pmkvq-compile":
                accepts(parse, arguments)
            case "python" if arguments[0] == "-m" and arguments[1] == PACKAGE:
                monkeypatch.syspath_prepend(demo / "out" / "demo")
                module = functools.partial(runpy.run_module, alter_sys=True)
                reads_arguments(module, PACKAGE, arguments[2:], monkeypatch)
            case "python" if arguments[0] == "-m":
                assert arguments[1].partition(".")[0] in ELSEWHERE or find_spec(arguments[1]), words
            case "python":
                script = ROOT / arguments[0]
                monkeypatch.syspath_prepend(script.parent)
                reads_arguments(runpy.run_path, str(script), arguments[1:], monkeypatch)
            case "make":
                subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)
            case "pip":
                extras = {
                    name for word in arguments for names in re.findall(r"\[(.+)\]", word) for name in names.split(",")
                }
                assert extras <= set(project["optional-dependencies"]), words
            case "pytest":
                assert all((ROOT / argument).exists() for argument in arguments if "/" in argument), words
            case "lm_eval":
                harness = pytest.importorskip("lm_eval._cli.harness", reason="lm-evaluation-harness is an extra")
                monkeypatch.setattr(sys, "argv", [program, *arguments])
                harness.HarnessCLI().parse_args()
            case name:
                known = name in ELSEWHERE or (ROOT / program).is_file()
                assert known, (
                    f"{' '.join(words)!r} is no command that is known here; Python goes into a ```python block"
                )

    return one


def accepts(read: Callable[[list[str]], object], arguments: list[str]) -> None:
    """`--help` ends a program well; other arguments are simply read."""
    if arguments == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            read(arguments)
    else:
        read(arguments)


def reads_arguments(
    run: Callable[..., object], program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a program up to where it has accepted its arguments."""
    original = argparse.ArgumentParser.parse_args

    def read(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        raise ArgumentsRead

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        patch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(ArgumentsRead):
            run(program, run_name="__main__")


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_commands_of_a_guide_are_accepted(guide: Guide, check: Check) -> None:
    for words in guide.commands:
        check(words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_commands_in_the_docstring_of_an_example_are_accepted(script: Path, check: Check) -> None:
    for words in docstring_commands(script):
        check(words)


def test_commands_that_help_shows_are_accepted(check: Check) -> None:
    shown = [line for line in EXAMPLES.splitlines() if line.startswith("  pmkvq-compile ")]
    assert len(shown) > 3
    for line in shown:
        for words in commands(line, {}):
            check(words)


@pytest.mark.parametrize(
    "line",
    [
        "pmkvq-compile demo --budget 22MiB --block 64",
        "pmkvq-compile demo --max-len 4096",
        "python examples/onnx/onnx_generate.py out/demo",
        "python examples/benchmarks/kernels.py",
        "make everything",
        "pip install 'pmkvq-compiler[pictures]'",
        "lm_eval --model hf --task recall --no_such_option",
        f"python -m {PACKAGE} --question Why",
        "pmkvq-serve out/demo",
    ],
)
def test_a_command_that_would_be_refused_is_noticed(line: str, check: Check) -> None:
    (words,) = commands(line, {})
    with pytest.raises((Exception, SystemExit)):
        check(words)


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_options_that_a_guide_names_exist(guide: Guide) -> None:
    programs = [ROOT / "pmkvq_compiler" / "cli.py", ROOT / "templates" / "chat.py", *SCRIPTS]
    known = {flag for path in programs for flag in re.findall(r'"(--[\w-]+)"', path.read_text(encoding="utf-8"))}
    assert guide.options - known <= OPTIONS_ELSEWHERE


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if guide.path.name != "CHANGELOG.md"], ids=str)
def test_files_that_a_guide_names_exist(guide: Guide) -> None:
    """A changelog may name what is gone, and instructions what a reader is to write."""
    assert [name for name in guide.files if "my_" not in name and not (ROOT / name).exists()] == []


def test_guides_name_every_recipe_and_every_target() -> None:
    for words, name in ((RECIPE_NAMES, "budget"), (TARGETS, "aot")):
        text = (ROOT / "examples" / name / "README.md").read_text(encoding="utf-8")
        assert [word for word in words if f"| `{word}` |" not in text] == []


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
    links = {
        guide.path: {(guide.path.parent / link.partition("#")[0]).resolve() for link in guide.links} for guide in GUIDES
    }
    reached, waiting = set[Path](), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path not in reached:
            reached.add(path)
            waiting.extend(links.get(path, ()))
    assert {path for path in links if ROOT / "examples" in path.parents} - reached == set()


def test_latent_attention_compiles_and_keeps_the_latent_once_for_all_heads(compile_tiny: CompileTiny) -> None:
    """As the guide says of models."""
    artifact = compile_tiny("deepseek_v3", {**LATENT_ATTENTION, "num_hidden_layers": 2}, recipe="pm-kvq", budget="90%")
    model = runtime.load(artifact)
    rotary, rank = LATENT_ATTENTION["qk_rope_head_dim"], LATENT_ATTENTION["kv_lora_rank"]
    heads = {(one.num_key_value_heads, one.key_head_dim, one.value_head_dim) for one in model.plan.layers}
    assert heads == {(1, rank + rotary, rank)}
    cache = model.new_cache()
    model.generate(torch.full((1, 300), 5), max_new_tokens=100, eos_token_id=(), cache=cache)
    assert cache.bytes_used <= model.plan.budget
    assert cache.bits == [(layer.key_bits, layer.value_bits) for layer in model.plan.layers], "a full cache"


def test_readme_is_read_in_a_few_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 900


def test_quickstart_compiles_and_writes(demo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", ROOT / "examples" / "quickstart.py", demo / NAME, tmp_path / "artifact"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "capture 1/1" in done.stdout
    assert "Thewhaleroseoutofthefog" in done.stdout.replace(" ", "")
    assert re.search(r"[\d,]+ of [\d,]+ bytes hold \d+ tokens", done.stdout)


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
