"""What a public host reads: workflows, templates of issues, the packages that are asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")
SOURCES = ("pmkvq_compiler", "passes", "runtime", "templates")


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return read(ROOT / ".github" / "workflows" / "checks.yml")["jobs"]


def test_the_workflow_runs_make_and_nothing_else(jobs: dict[str, Any]) -> None:
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert {run.split()[1] for run in runs} == {"lint", "test", "test-serve"}
    for run in runs:
        assert run.startswith("make ")
        subprocess.run([*run.split(), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_the_workflow_tests_every_supported_python(jobs: dict[str, Any], project: dict[str, Any]) -> None:
    versions = jobs["test"]["strategy"]["matrix"]["python-version"]
    supported = SpecifierSet(project["requires-python"])
    assert versions == ["3.11", "3.12", "3.13"]
    assert all(version in supported for version in versions)
    assert jobs["oldest"]["steps"][1]["with"]["python-version"] == versions[0]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms_that_ask_for_something(template: Path) -> None:
    form = read(template)
    assert {"name", "description", "body"} <= set(form)
    questions = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["type"] in ("input", "textarea", "dropdown", "checkboxes") for part in questions)
    assert all(part["attributes"]["label"] for part in questions)
    names = [part["id"] for part in questions]
    assert len(set(names)) == len(names) > 2
    assert any(part["validations"]["required"] for part in questions)


def test_a_bug_report_asks_for_command_versions_and_traceback() -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml")
    assert {"command", "versions", "traceback"} <= {part.get("id") for part in form["body"]}


def requirements(project: dict[str, Any]) -> list[Requirement]:
    """Everything that the project asks for, extras included, but itself."""
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = [Requirement(text) for group in groups for text in group]
    return [one for one in asked if one.name != project["name"]]


def test_the_oldest_packages_are_those_of_the_project(project: dict[str, Any]) -> None:
    command = [sys.executable, ROOT / ".ci" / "oldest.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {requirement.name: requirement.specifier for requirement in map(Requirement, printed)}
    for requirement in requirements(project):
        (lower,) = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==")]
        assert lower in found[requirement.name]
        assert Version(f"{lower.major}.{lower.minor + 1}") not in found[requirement.name]


def test_the_pinned_versions_are_supported(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(one.name): one.specifier for one in pins}
    for requirement in requirements(project):
        (pin,) = pinned[canonicalize_name(requirement.name)]
        assert pin.version in requirement.specifier, requirement


def test_every_required_package_is_imported_by_the_project(project: dict[str, Any]) -> None:
    """What only examples or tests import is an extra."""
    providers = packages_distributions()
    imported = {
        canonicalize_name(name)
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*.py")
        for module in imported_modules(path)
        for name in providers.get(module, [])
    }
    assert {canonicalize_name(Requirement(one).name) for one in project["dependencies"]} <= imported


def imported_modules(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    others = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in plain | others}
