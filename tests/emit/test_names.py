"""A model may be called anything; what Python imports, pip installs and the hub reads is well formed."""

from __future__ import annotations

import keyword
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pmkvq_compiler.emit.artifact import write_manifest
from pmkvq_compiler.emit.names import in_markdown, one_line, package_name, project_name
from pmkvq_compiler.emit.package import emit_package, write_project
from pmkvq_compiler.source.source import open_source
from tests.emit.test_emit import lowered
from tests.folders import model_folder, tree
from tests.models import tiny_folder

ORDINARY = {
    "SmolLM2-135M-Instruct": "smollm2_135m_instruct",
    "Qwen2.5-1.5B-Instruct": "qwen2_5_1_5b_instruct",
    "tiny-llama": "tiny_llama",
    "gpt2": "gpt2",
    "Mistral": "mistral",
    "Modèle-7B": "modele_7b",
    "1.5B": "model_1_5b",
}
TAKEN = ["torch", "Tokenizers", "json", "NumPy", "transformers", "safetensors", "jinja2", "triton", "hatchling", "yaml"]
TAKEN += ["huggingface-hub", "huggingface_hub", "pmkvq-compiler", "class", "Import", "lambda", "test", "con", "lpt1"]
TAKEN += ["modeling.pmkvq", "typing extensions", "dist", "regex", "re", "ast", "site", "FLA"]
HOSTILE = [
    'a"b',
    "it's",
    '"""\nimport os; os.abort()\n"""',
    'x"\nversion = "9',
    "line\nbreak\r\nand\ttab",
    "{{ 7 * 7 }}{% raw %}",
    "back\\slash\\",
    "<script>alert(1)</script>",
    "---\nlicense: mit\n---",
    "модель 1.5",
    "模型",
    "🐋",
    "\x7f\x1b[31m",
    "..." + "_" * 9,
    "n" * 300,
    "!",
    "None",
    "_",
    " ",
    "&amp;",
    "[a](http://b)",
    "#",
    "- item",
    "\u2028\u202e",
]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_names_stay_as_they_are(name: str) -> None:
    assert package_name(name) == ORDINARY[name]


@pytest.mark.parametrize("name", TAKEN)
def test_a_name_that_means_something_else_to_python_gets_a_suffix(name: str) -> None:
    package = package_name(name)
    assert package.endswith("_pmkvq")
    assert re.fullmatch(r"[a-z][a-z0-9_]*", package)


@pytest.mark.parametrize("name", [*HOSTILE, *TAKEN, *ORDINARY])
def test_a_package_is_an_identifier_and_a_project_name(name: str) -> None:
    package = package_name(name)
    assert package.isidentifier()
    assert package.isascii()
    assert len(package) <= 80
    assert not keyword.iskeyword(package)
    assert package not in sys.stdlib_module_names
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", project_name(package)), "as pip writes it"
    assert package_name(package) in (package, package + "_pmkvq")


def test_names_that_lose_letters_stay_apart() -> None:
    names = ["модель", "данные", "模型", "模型 2", "n" * 300, "n" * 301, "é", "e"]
    assert len({package_name(name) for name in names}) == len(names) - 1, "an accent alone makes no other name"


def test_a_name_stays_free_that_an_artifact_of_the_same_model_was_installed_under(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("tiny_whale", "tiny_ship"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "tiny_whale" / "artifact").mkdir()
    (tmp_path / "tiny_whale" / "artifact" / "pmkvq.json").touch()
    assert package_name("tiny-whale") == "tiny_whale"
    assert package_name("tiny-ship") == "tiny_ship_pmkvq"


def markdown_text(source: str) -> str:
    """What Markdown shows of a line in which only backslashes mean something."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", source)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_in_markdown(name: str) -> None:
    shown = in_markdown(name)
    assert markdown_text(shown) == one_line(name)
    assert shown.isprintable()
    assert not re.search(r"(?<!\\)[<>`*\[\]&{}|]", shown)
    assert in_markdown("SmolLM2-135M_Instruct v1.5") == "SmolLM2-135M_Instruct v1.5"


@pytest.mark.parametrize("name", ['x"""\\\n[project]\nname = "evil"\n<b>{{ 7 }}', "модель 1.5", "torch"])
def test_a_wheel_of_any_name_is_built_and_imported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="builds the artifact's wheel")
    source = open_source(str(model_folder(tmp_path / name, num_hidden_layers=1)))
    assert source.name == name
    package, folder = package_name(name), tmp_path / "artifact"
    written = emit_package(lowered("llama"), source, folder, package)
    (folder / "pmkvq.json").touch()
    write_manifest(folder, {"package": package}, [*written, *write_project(folder, package, name)])
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == project_name(package)
    assert project["description"] == f"{one_line(name)} with a progressively quantized KV cache"
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["model_name"] == name, "the true name is data"
    assert card.data.license is None
    assert markdown_text(card.text.strip().splitlines()[0]).startswith(f"# {one_line(name)}, KV cache within")
    before = tree(folder)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    assert tree(folder) == before
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert {path.name for path in (tmp_path / "site").iterdir() if path.suffix != ".dist-info"} == {package}
    program = f"import sys; sys.path.append('site'); import {package}; print({package}.FOLDER)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(str(Path(package) / "artifact"))


def test_code_of_an_artifact_does_not_depend_on_the_models_name(tmp_path: Path) -> None:
    trees = []
    for name in ("one", 'two"""'):
        source = open_source(str(tiny_folder(tmp_path / name, "llama")))
        emit_package(lowered("llama"), source, tmp_path / f"of {name}", "package")
        trees.append({file: text for file, text in tree(tmp_path / f"of {name}").items() if file.endswith(".py")})
    assert trees[0] == trees[1]
