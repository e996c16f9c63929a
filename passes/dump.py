"""A program as text. `--dump-passes` writes it after each pass, for people who want to see what the pass did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from .program import AttentionSite, Edit, Program, RowScale


def write_dump(program: Program, folder: Path) -> None:
    """Write `dump_text(program)` into `folder`. The file is named after the number and name of the pass that ran last.

    Before any pass has run, the file is `00-capture.py`. The folder is created if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = program.history[-1] if program.history else "capture"
    (folder / f"{len(program.history):02}-{name}.py").write_text(dump_text(program), encoding="utf-8")


def dump_text(program: Program) -> str:
    """Attention sites and weight edits as comments, then the graph as Python, with the shape and dtype of every value.

    Layers that OutlineLayers has moved into submodules follow as classes.
    """
    facts = [
        f"passes: {', '.join(program.history) or 'none yet'}",
        f"inputs: {', '.join(_inputs(program))}",
        f"{len(program.weights)} weights, {len(program.constants)} constants",
        *("site: " + _site(site) for site in program.sites),
        *(f"state {state.index} of layer {state.layer}: {list(state.shape)}" for state in program.states),
        *("edit: " + _edit(edit) for edit in program.edits),
        f"plan: {'none yet' if program.plan is None else f'{program.plan.arena_bytes:,} bytes'}",
    ]
    code: str = program.graph_module.print_readable(print_output=False)
    return "".join(f"# {fact}\n" for fact in facts) + "\n" + code + "\n"


def _inputs(program: Program) -> Iterator[str]:
    names: Iterable[str] = (node.name for node in program.graph.find_nodes(op="placeholder"))
    return (name for name in names if name not in program.weights and name not in program.constants)


def _site(site: AttentionSite) -> str:
    heads = f"{site.num_attention_heads} query heads, {site.num_key_value_heads} key/value heads"
    fold = "key scales can be folded" if site.reason is None else f"key scales cannot be folded: {site.reason}"
    return f"layer {site.layer} at {site.node}, {heads}, head_dim {site.key_head_dim} and {site.value_head_dim}; {fold}"


def _edit(edit: Edit) -> str:
    if isinstance(edit, RowScale):
        rows = f"rows {edit.start} to {edit.start + edit.scale.shape[0] - 1}"
        return f"{edit.tensor}: {rows} are multiplied by scales from {edit.scale.min():.3g} to {edit.scale.max():.3g}"
    heads, dim, _ = edit.matrices.shape
    return f"{edit.tensor}: {heads} heads of {dim} {edit.side} from {edit.start} on are each multiplied by a matrix"
