"""Virtual environments that hold some installed distributions and what those need, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def environment(folder: Path, *names: str) -> Path:
    """The interpreter of a new environment in `folder` with the distributions `names`, linked from this one's."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for found in _closure(names).values():
        tops = {Path(file).parts[0] for file in found.files or [] if ".." not in Path(file).parts}
        for top in tops - {"__pycache__"}:
            place = Path(str(found.locate_file(top)))
            if place.exists() and not (site / top).exists():
                (site / top).symlink_to(place)
    return folder / "bin" / "python"


def build_wheel(artifact: Path, folder: Path) -> Path:
    """The wheel of an artifact, built in `folder`."""
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, artifact]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(python: Path, wheel: Path) -> None:
    """Install a wheel, and only that, into the environment of `python`."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)


def _closure(names: tuple[str, ...]) -> dict[str, Distribution]:
    """The distributions `names` and all that they require without extras, as far as they are installed."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found
