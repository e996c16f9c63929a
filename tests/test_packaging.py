"""What is installed, and who may import whom."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("pmkvq_compiler", "passes", "runtime", "templates")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in the project's wheel, built from a copy of the sources."""
    place = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source" / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        place,
        place / "source",
    ]
    subprocess.run(build, check=True, capture_output=True)
    (built,) = place.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_has_one_top_level_package(wheel: list[str]) -> None:
    packages = {name.split("/")[0] for name in wheel}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"pmkvq_compiler"}


def test_the_process_that_checks_an_artifact_does_without_transformers() -> None:
    """Importing it would take longer than the check of a small model, in every compile."""
    code = "import sys, pmkvq_compiler.emit.check; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_wheel_has_every_source_template_and_text(wheel: list[str]) -> None:
    expected = {
        path.relative_to(ROOT).as_posix() if name == "pmkvq_compiler" else f"pmkvq_compiler/{path.relative_to(ROOT)}"
        for name in SOURCES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md"
    }
    assert expected - set(wheel) == set()


def test_wheel_has_the_licence(wheel: list[str]) -> None:
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel)


TOUCHES_VLLM = {
    "attach.py",
    "backend.py",
    "checks.py",
    "completions.py",
    "metrics.py",
    "scheduler.py",
    "specs.py",
    "worker.py",
}


def test_runtime_imports_torch_and_safetensors_alone() -> None:
    """But for the plugin's modules that vLLM itself imports, and an optional library."""
    allowed = sys.stdlib_module_names | {"torch", "safetensors", "triton"}
    vllm = {"vllm", "huggingface_hub"}  # the second is a part of what the first needs
    for path in (ROOT / "runtime").rglob("*.py"):
        within = vllm if path.parent.name == "vllm" and path.name in TOUCHES_VLLM else set()
        within |= {"fla"} if path.stem == "linear_attention" else set()
        assert {module.split(".")[0] for module in absolute_imports(path)} - allowed <= within, path


def test_plugin_of_vllm_is_not_imported_by_the_rest_of_the_runtime() -> None:
    for path in (ROOT / "runtime").glob("*.py"):
        assert "vllm" not in {module.split(".")[0] for module in siblings(path, "runtime")}, path


def test_passes_do_not_import_the_driver() -> None:
    found = {(path.name, module) for path in (ROOT / "passes").rglob("*.py") for module in absolute_imports(path)}
    driver = {
        (file, module)
        for file, module in found
        if module.startswith("pmkvq_compiler.") and module.split(".")[1] not in ("passes", "runtime", "errors")
    }
    assert driver == set()


def absolute_imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


FLOORS = [
    {
        "errors",
        "options",
        "budget",
        "progress",
        "divergence",
        "threads",
        "formats",
        "recipes",
        "unquantized",
        "problem",
        "failures",
        "interrupts",
        "children",
    },
    {"source"},
    {"calibrate"},
    {"plan"},
    {"emit"},
    {"report"},
    {"regenerate", "compile"},
    {"explore"},
    {"console"},
    {"cli"},
]
"""The driver from the ground up: a module imports from its own floor and from those below it."""


def test_no_module_of_the_driver_imports_upward() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    driver = ROOT / "pmkvq_compiler"
    upward = []
    for path in driver.rglob("*.py"):
        own = path.relative_to(driver).with_suffix("").parts[0]
        for module in absolute_imports(path) if own != "__init__" else ():
            parts = module.split(".")
            if parts[0] == "pmkvq_compiler" and len(parts) > 1 and parts[1] not in ("passes", "runtime", "templates"):
                upward += [f"{path.name}: {module}"] if floor[parts[1]] > floor[own] else []
    assert upward == []


RUNTIME_FLOORS = [
    {"errors", "experts", "fused", "library", "records", "streams"},
    {"claims", "inputs", "plan", "quantize", "rotation"},
    {"manifest"},
    {"cubins", "tuning", "weights"},
    {"layer_cache", "linear_attention", "states"},
    {"backend"},
    {"reference", "prefill"},
    {"kernels"},
    {"cache", "fused_kernels"},
    {"attention", "recurrence", "forward", "warm_up"},
    {"graph"},
    {"generate"},
    {"model"},
    {"load"},
]
"""The runtime from the ground up, likewise."""


def test_no_module_of_the_runtime_imports_upward() -> None:
    floor = {name: number for number, names in enumerate(RUNTIME_FLOORS) for name in names}
    imports = {path.stem: siblings(path, "runtime") for path in (ROOT / "runtime").glob("*.py")}
    del imports["__init__"]
    assert floor.keys() == imports.keys()
    assert [(name, one) for name, needed in imports.items() for one in needed if floor[one] > floor[name]] == []


@pytest.mark.parametrize("folder", ["runtime", "passes", *(name for names in FLOORS[1:6] for name in sorted(names))])
def test_no_modules_import_each_other_in_a_circle(folder: str) -> None:
    """Those of one package, wherever in a module the import stands, for a type checker's eyes only as well."""
    place = ROOT / folder if folder in ("runtime", "passes") else ROOT / "pmkvq_compiler" / folder
    imports = {path.stem: siblings(path, folder) for path in place.glob("*.py") if path.stem != "__init__"}
    assert left_in_circles(imports) == set()


def left_in_circles(imports: dict[str, set[str]]) -> set[str]:
    """Modules that are in a circle, or import one that is."""
    while free := {name for name, needed in imports.items() if not needed & imports.keys()}:
        imports = {name: needed for name, needed in imports.items() if name not in free}
    return set(imports)


def siblings(path: Path, folder: str) -> set[str]:
    """Modules of its own package that a module imports anywhere."""
    return {module.split(".")[2] for module in imported(path, folder) if module.startswith(f"pmkvq_compiler.{folder}.")}


def imported(path: Path, folder: str) -> Iterator[str]:
    """Dotted names of what a module of `pmkvq_compiler.<folder>` imports, and of what it takes out of it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ["pmkvq_compiler", folder][: 3 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{name.name}" for name in node.names)


@pytest.mark.parametrize(
    "back",
    [
        "from .first import thing",
        "from . import first",
        "import pmkvq_compiler.runtime.first",
        "from pmkvq_compiler.runtime import first",
        "from pmkvq_compiler.runtime.first import thing",
        "if TYPE_CHECKING:\n    from .first import thing",
        "if TYPE_CHECKING:\n    from ..runtime.first import thing",
        "def later() -> None:\n    from .first import thing",
    ],
)
def test_a_circle_is_seen_however_it_is_closed(back: str, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("from .second import other")
    (tmp_path / "second.py").write_text(back)
    (tmp_path / "alone.py").write_text("import torch\nfrom .third import thing")
    imports = {path.stem: siblings(path, "runtime") for path in tmp_path.glob("*.py")}
    assert left_in_circles(imports) == {"first", "second"}


TYPE_ERRORS = {
    "def untyped(x): ...": "no-untyped-def",
    "def half_typed(x: int, y) -> None: ...": "no-untyped-def",
    "def untyped(x): ...\nuntyped(1)": "no-untyped-call",
    "def bare() -> list: ...": "type-arg",
    "def anything(x: Any) -> int:\n    return x": "no-any-return",
    "import nowhere\nclass Child(nowhere.Parent): ...": "misc",
    "from pmkvq_compiler.runtime.callee import math": "attr-defined",
    "x: int = 'text'": "assignment",
    "x: int = 1  # type: ignore[misc]": "unused-ignore",
    "print(1 == 'text')": "comparison-overlap",
}
"""Lines that strict type checking complains of, and what it calls that."""


@pytest.fixture(scope="module")
def type_checked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `mypy` says of a small project with this one's settings, whose packages have all of `TYPE_ERRORS`."""
    place = tmp_path_factory.mktemp("types")
    shutil.copy(ROOT / "pyproject.toml", place)
    shutil.copytree(ROOT / ".ci", place / ".ci", symlinks=True)
    for folder in ("pmkvq_compiler", "runtime", "passes"):
        (place / folder).mkdir()
        (place / folder / "__init__.py").touch()
        for number, text in enumerate(TYPE_ERRORS):
            (place / folder / f"error_{number}.py").write_text(f"from typing import Any\n{text}\n")
    (place / "pmkvq_compiler" / "caller.py").write_text(
        "from pmkvq_compiler.runtime.callee import half\nhalf('text')\n"
    )
    (place / "runtime" / "callee.py").write_text(
        "import math\ndef half(x: int) -> float:\n    return math.fabs(x) / 2\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", place / "cache", "--no-color-output"]
    return subprocess.run(mypy, cwd=place, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("folder", ["runtime", "passes"])
@pytest.mark.parametrize(("number", "code"), list(enumerate(TYPE_ERRORS.values())))
def test_types_are_checked_strictly_where_the_arithmetic_is(
    type_checked: str, folder: str, number: int, code: str
) -> None:
    assert re.search(rf"{folder}/error_{number}\.py:\d+: error: .*\[{code}\]", type_checked), type_checked


def test_the_driver_is_checked_against_the_types_of_the_runtime(type_checked: str) -> None:
    assert re.search(r"pmkvq_compiler/caller\.py:2: error: Argument 1 to \"half\" has incompatible type", type_checked)
    assert re.search(r"^pmkvq_compiler/error_0\.py:2: error: .*\[no-untyped-def\]", type_checked, re.MULTILINE)


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_sets_up_its_own_environment(target: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "constraints.txt").touch()
    planned = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert planned.index("-m venv .venv") < planned.index("-c constraints.txt") < planned.rindex(".venv/bin/")


def test_what_is_installed_to_develop_has_hashes_and_is_what_the_constraints_pin() -> None:
    """But for torch, whose wheels without CUDA are not PyPI's, and what it needs of CUDA."""
    pinned = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    hashed: dict[str, str] = {}
    for file in ("build", "dev", "demo"):
        text = (ROOT / "requirements" / f"{file}.txt").read_text().replace("\\\n", " ")
        for line in text.splitlines():
            name, version = re.match(r"([\w.-]+)==(\S+)", line).groups()  # type: ignore[union-attr]
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), line
            if "sys_platform == 'emscripten'" not in line.replace("!=", ""):
                hashed[name] = version
    normal = {name.replace("_", "-").replace(".", "-"): version for name, version in pinned.items()}
    assert {name: hashed.get(name) for name in normal if name != "torch"} == {
        name: version for name, version in normal.items() if name != "torch"
    }
    assert "torch" not in hashed


def test_ci_passes_settings_of_pip_to_the_installation_alone(tmp_path: Path) -> None:
    """`make` is one that tells what it was given."""
    shutil.copytree(ROOT / ".ci", tmp_path / "clone" / ".ci")
    make = tmp_path / "make"
    make.write_text(
        f'#!/bin/sh\necho "$1 ${{PIP_INDEX_URL:-none}} ${{PYTHONDONTWRITEBYTECODE:-none}}" >> {tmp_path}/said\n'
    )
    make.chmod(0o755)
    variables = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables |= {"PIP_INDEX_URL": "mirror", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([tmp_path / "clone" / ".ci" / "run"], env=variables, check=True)
    assert (tmp_path / "said").read_text().splitlines() == ["venv mirror 1", "lint none none", "test none none"]
