"""Names from outside, made fit for where they are written: a Python package, a project, a line of text.

A model may be called anything that a folder or a repository can be. What Python imports is chosen here; the model's own
name is data, kept as it is where a serializer writes it.
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
"""Characters of a package's name; the file of its wheel has more."""
SUFFIX = "_pmkvq"
NEEDED = {"torch", "safetensors", "tokenizers", "jinja2", "triton", "transformers", "huggingface_hub", "hatchling"}
"""What an artifact imports where it runs or is built. It may be missing here."""
OURS = {"pmkvq_compiler"}
"""Installed in a way that the search below may not see."""
IN_THE_FOLDER = {"modeling_pmkvq", "modeling_compiled", "additional_chat_templates", "build", "dist", "artifact"}
"""Names that mean something else in an artifact's folder."""
NOT_LISTED = {"test"}
"""What `sys.stdlib_module_names` leaves out."""
WINDOWS = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
"""Names that no folder can have on Windows."""


def package_name(name: str) -> str:
    """The import name of the package for a model called `name`: ASCII, and nobody else's.

    `SmolLM2-135M-Instruct` becomes `smollm2_135m_instruct`. A name that loses letters, or its end, gets a few digits of
    its digest, so that two such names stay two.
    """
    decomposed = unicodedata.normalize("NFKD", name)  # takes accents off their letters
    package = "_".join(re.findall(r"[a-z0-9]+", "".join(filter(str.isascii, decomposed)).lower()))
    lost = any(not letter.isascii() and unicodedata.category(letter)[0] in "LN" for letter in decomposed)
    if lost or len(package) > LONGEST:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
        package = "_".join(filter(None, [package[: LONGEST - 7].strip("_"), digest]))
    if not package[:1].isalpha():
        package = f"model_{package}".strip("_")
    return package + SUFFIX if _is_taken(package) else package


def _is_taken(package: str) -> bool:
    """Whether the name already means something: to Python, to what is installed here, or to an artifact."""
    known = sys.stdlib_module_names | NOT_LISTED | NEEDED | OURS | IN_THE_FOLDER | WINDOWS
    if package in known or keyword.iskeyword(package):
        return True
    here = Path.cwd()
    found = PathFinder.find_spec(package, [path for path in sys.path if path and Path(path) != here])
    if found is None:
        return False
    places = [Path(place) for place in found.submodule_search_locations or ()]
    return not any((place / "artifact" / MANIFEST).is_file() for place in places)  # that is an artifact's wheel


def project_name(package: str) -> str:
    """What pip calls a package."""
    return package.replace("_", "-")


def one_line(name: str) -> str:
    """A name for reading, without line breaks and other characters that do not print."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())


def in_markdown(name: str) -> str:
    """A name for reading in Markdown, in which it is text whatever it contains."""
    if re.fullmatch(r"[^\W_]+([-._:/+ ][^\W_]+)*", name):  # nothing in such a name means anything
        return name
    return "".join(f"\\{letter}" if letter in string.punctuation else letter for letter in one_line(name))
