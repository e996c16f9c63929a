"""Print constraints for pip that name the oldest release of every package that pyproject.toml allows.

`make test OLDEST=1` runs the tests with them. Of a release it is the newest repair: 3.6.2 for 3.6.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[.+\])?(>=|==)(?P<version>[\d.]+)")


def main() -> None:
    file = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
        if found := REQUIREMENT.match(requirement):
            major, minor, patch = [*found["version"].split("."), "0", "0"][:3]
            print(f"{found['name']}~={major}.{minor}.{patch}")


if __name__ == "__main__":
    main()
