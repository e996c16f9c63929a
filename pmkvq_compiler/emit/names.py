"""Turns the names of models into names of Python packages and projects, and into text for Markdown.

A model may have any name that a folder or a repository can have. The name of its package is derived from it here.
Elsewhere the model's name is data, and whatever serializes it writes it unchanged.
"""

from __future__ import annotations

import hashlib
import keyword
import re
import string
import sys
import unicodedata
from importlib.machinery import PathFinder
from pathlib import Path

from pmkvq_compiler.runtime.manifest import MANIFEST

LONGEST = 64
"""The most characters of a package's name, so that the file name of its wheel does not get too long."""
SUFFIX = "_pmkvq"
NEEDED = {
    "fla",
    "hatchling",
    "huggingface_hub",
    "jinja2",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
}
"""Packages that an artifact imports when it runs or is built. They may be missing on this machine."""
OURS = {"pmkvq_compiler"}
"""May be installed in a way that `_is_taken` does not find."""
IN_THE_FOLDER = {"modeling_pmkvq", "modeling_compiled", "additional_chat_templates", "build", "dist", "artifact"}
"""Names that have another meaning in an artifact's folder."""
NOT_LISTED = {"test"}
"""Modules that `sys.stdlib_module_names` leaves out."""
WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
"""Names that no folder can have on Windows."""


def package_name(name: str) -> str:
    """The import name of the package for a model called `name`: ASCII, and not the name of another package.

    `SmolLM2-135M-Instruct` becomes `smollm2_135m_instruct`. A name that would lose letters or its end gets a few digits
    of its digest, so that two such names stay different.
    """
    decomposed = unicodedata.normalize("NFKD", name)  # separates accents from their letters
    package = "_".join(re.findall(r"[a-z0-9]+", "".join(filter(str.isascii, decomposed)).lower()))
    lost = any(not letter.isascii() and unicodedata.category(letter)[0] in "LN" for letter in decomposed)
    if lost or len(package) > LONGEST:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
        package = "_".join(filter(None, [package[: LONGEST - 7].strip("_"), digest]))
    if not package[:1].isalpha():
        package = f"model_{package}".strip("_")
    return package + SUFFIX if _is_taken(package) else package


def _is_taken(package: str) -> bool:
    """Whether the name is taken by Python, by a package that is installed here, or by a file of an artifact."""
    known = sys.stdlib_module_names | NOT_LISTED | NEEDED | OURS | IN_THE_FOLDER | WINDOWS
    if package in known or keyword.iskeyword(package):
        return True
    here = Path.cwd()
    found = PathFinder.find_spec(package, [path for path in sys.path if path and Path(path) != here])
    if found is None:
        return False
    places = [Path(place) for place in found.submodule_search_locations or ()]
    return not any((place / "artifact" / MANIFEST).is_file() for place in places)  # installed artifacts do not count


def project_name(package: str) -> str:
    """The name that pip has for a package."""
    return package.replace("_", "-")


def one_line(name: str) -> str:
    """A name without line breaks and other characters that do not print."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def in_markdown(name: str) -> str:
    """A name escaped for Markdown, so that it reads as plain text."""
    if re.fullmatch(r"[^\W_]+([-._:/+ ][^\W_]+)*", name):  # such a name has no Markdown syntax
        return name
    return "".join(f"\\{letter}" if letter in string.punctuation else letter for letter in one_line(name))
