"""What the project's Markdown files hold: commands, Python blocks, links and headings."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", ".github", "examples", "passes", "pmkvq_compiler", "requirements", "runtime", "templates", "tests")
PROGRAM = re.compile(r"(pmkvq-compile|python|pip|make) ")
"""What a line of prose or of a docstring begins with when it is a command."""
ASSIGNMENT = re.compile(r"(?:export )?([A-Z_]+)=(.*)")
SHELL = ("sh", "bash")
"""What a fenced block of commands says that it is written in; an indented one is always of commands."""


@dataclass(frozen=True)
class Guide:
    """One Markdown file."""

    path: Path
    commands: list[list[str]] = field(default_factory=list)
    """Words of every command, in the order of the file, with the shell variables that earlier lines set in place."""
    blocks: list[tuple[int, str]] = field(default_factory=list)
    """Line number and text of every Python block."""
    options: set[str] = field(default_factory=set)
    """Options that prose names, such as `--budget`."""
    files: list[str] = field(default_factory=list)
    """Files and folders of the project that prose names, such as `runtime/plan.py`."""
    links: list[str] = field(default_factory=list)
    headings: set[str] = field(default_factory=set)
    """Anchors of the headings, as GitHub makes them."""

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()


def guides() -> list[Guide]:
    """Every Markdown file of the project."""
    nested = [path for name in FOLDERS for path in (ROOT / name).rglob("*.md")]
    return [read_guide(path) for path in sorted([*ROOT.glob("*.md"), *nested])]


def read_guide(path: Path) -> Guide:
    guide, variables = Guide(path), dict[str, str]()
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type == "code_block" or (token.type == "fence" and token.info in SHELL):
            guide.commands.extend(commands(token.content, variables))
        elif token.type == "fence" and token.info == "python":
            assert token.map is not None
            guide.blocks.append((token.map[0] + 2, token.content))
        elif token.type == "inline":
            if before is not None and before.type == "heading_open":
                guide.headings.add(anchor(token.content))
            for part in token.children or []:
                guide.links.extend(targets(part))
                if part.type == "code_inline":
                    guide.options.update(re.findall(r"^--[\w-]+", part.content))
                    guide.files.extend(re.findall(rf"^(?:{'|'.join(FOLDERS)})/[\w./-]*$", part.content))
                    if PROGRAM.match(part.content):
                        guide.commands.extend(commands(part.content, variables))
        elif token.type == "html_block":
            guide.links.extend(re.findall(r'(?:src|srcset|href)="([^"]+)"', token.content))
    return guide


def commands(text: str, variables: dict[str, str]) -> Iterator[list[str]]:
    """The commands of a block; what it assigns to shell variables is added to `variables`."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(Template(line).safe_substitute(variables), comments=True)
        if len(words) <= 2 and words and (found := ASSIGNMENT.fullmatch(" ".join(words))):
            variables[found[1]] = found[2]
        elif words:
            yield words


def docstring_commands(path: Path) -> list[list[str]]:
    """The commands in the docstring of a Python file."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = [line.strip() for line in text.splitlines()]
    return [words for line in lines if PROGRAM.match(line) for words in commands(line, {})]


def targets(token: Token) -> Iterator[str]:
    for name in ("href", "src"):
        if value := token.attrs.get(name):
            yield str(value)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
