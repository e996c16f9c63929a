"""This project against what people would use instead: true bits of the cache, what the model loses, and speed.

    python examples/benchmarks/rivals.py --model MODEL.gguf --lengths 2048,4096
    python examples/benchmarks/rivals.py --model MODEL.gguf --rivals llama.cpp --python llama.cpp=/opt/llama/bin/python
    python examples/benchmarks/rivals.py --model MODEL.gguf --plot

The rivals are llama.cpp with K and V of one of its types, transformers' `QuantizedCache` with HQQ and quanto, and
(`simulated`) the methods of `quality.py` and MiKV, in the number format of their papers. All read the same held-out
text of this package, in chunks, and the last tokens one by one; those are timed. Each is compared with its own run in
full precision, so that what else differs between engines does not count: perplexity, the mean KL divergence of
next-token distributions, and how often the greedy token is the same.

From packed weights, llama.cpp computes with activations of 8 bits, whose rounding changes whenever anything does, and
any change of the cache then looks larger. So `llama.cpp` has the file's weights in float32, and computes in float32,
and `llama.cpp-packed` has the file as it is, whose speed is what its users get.

True bits are measured: the bytes of the tensors that hold K and V at the end, with scales and tokens that are kept
exact, divided by the numbers that they stand for. What is simulated counts as many bytes as its plans say.

Each engine runs in a process of its own, with the Python that `--python` names. There, this project is installed, too.

Writes rivals.csv, rivals.md and rivals.svg into a folder of --output that is called like the model. Rows and artifacts
that are there already stay; rows are replaced where they are measured again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import quality
import torch
from mikv import MiKV
from rival_engines import LLAMA_TYPES, Row
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, observed
from pmkvq_compiler.calibrate.logits import logits_of
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.problem import pick_device
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.source.source import open_source
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits

ENGINES = Path(__file__).parent / "rival_engines.py"
PROJECT = "pmkvq_compiler"
NO_CALIBRATION = ("--calib-samples", "1", "--calib-len", "128")
"""As little as there can be, for where nothing is planned."""
TRANSFORMERS_CACHES: dict[str, dict[str, Any]] = {
    "HQQ": {"backend": "hqq", "axis_key": 1, "axis_value": 1},
    "HQQ, K by channel": {"backend": "hqq", "axis_key": 0, "axis_value": 1},
    "quanto": {"backend": "quanto", "axis_key": 0, "axis_value": 0},
    "quanto, K by channel": {"backend": "quanto", "axis_key": -1, "axis_value": 0},
}
"""Arguments of `QuantizedCache`, with its groups of 64 numbers and its window of 128 tokens. HQQ's groups of a channel
are tokens that lie far apart, of all heads; quanto's are 64 successive tokens of a head, as in KIVI. Where K is grouped
by token, these are the axes that transformers' documentation advises."""
GROUPS_OF_TOKENS, GROUP = "quanto, K by channel", 64
"""A cache that only takes whole groups of so many tokens at a time."""


@dataclass(frozen=True)
class Rival:
    """What has to be installed to measure a rival: modules, and how to get them."""

    modules: tuple[str, ...] = ()
    install: str = ""


LLAMA_CPP = Rival(
    ("llama_cpp",),
    'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" {python} -m pip install '
    "llama-cpp-python",
)
RIVALS = {
    "pmkvq-compile": Rival(),
    "llama.cpp": LLAMA_CPP,
    "llama.cpp-packed": LLAMA_CPP,
    "transformers": Rival(("hqq", "optimum.quanto"), "{python} -m pip install hqq optimum-quanto"),
    "simulated": Rival(),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    table = arguments.folder / "rivals.csv"
    if not arguments.plot:
        for rival in arguments.rivals:
            check_installed(rival, python_of(rival, arguments))
        bench = Bench(arguments)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for rival in arguments.rivals:
            print(rival, flush=True)
            add_rows(bench.measure(rival), table)
    if not table.is_file():
        raise SystemExit(f"there is no {table} to draw; run this without --plot first")
    rows = sorted(read_rows(table), key=lambda row: row.tokens)
    (arguments.folder / "rivals.md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, arguments.folder / "rivals.svg")
    print(markdown(rows))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    def listed(text: str) -> list[str]:
        return text.split(",")

    def separated(text: str) -> list[str]:
        return text.split(";")

    def whole_numbers(text: str) -> list[int]:
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0, such as 2048,4096")
        return numbers

    def shares(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    def interpreter(text: str) -> tuple[str, str]:
        rival, _, path = text.partition("=")
        return rival, path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help=".gguf file, which all engines read")
    parser.add_argument(
        "--lengths", type=whole_numbers, default=[2048, 4096], help="tokens of text (default: 2048,4096)"
    )
    parser.add_argument(
        "--budgets", type=listed, default=["2.5bits", "3bits", "4bits"], help="of this project's caches"
    )
    parser.add_argument("--types", type=listed, default=["f16", "q8_0", "q5_1", "q4_0"], help="of llama.cpp's caches")
    parser.add_argument(
        "--caches",
        type=separated,
        default=list(TRANSFORMERS_CACHES),
        help="of transformers, with ; between (default: all)",
    )
    parser.add_argument("--bits", type=whole_numbers, default=[4, 2], help="of these (default: 4,2)")
    parser.add_argument("--recipes", default="pm-kvq,kivi,kivi-128,rotation,uniform", help="that are simulated")
    parser.add_argument("--simulated-budgets", default="3.7bits,6bits,10bits", help="for these (%(default)s)")
    parser.add_argument("--rivals", type=listed, default=list(RIVALS), help=f"of {', '.join(RIVALS)} (default: all)")
    parser.add_argument(
        "--python", type=interpreter, action="append", default=[], metavar="RIVAL=PATH", help="of an environment"
    )
    parser.add_argument(
        "--mikv-shares", type=shares, default=[0.1, 0.25, 0.5], help="of tokens at 8 bits (default: 0.1,0.25,0.5)"
    )
    parser.add_argument("--calib-samples", type=int, default=4, help="texts to calibrate on (%(default)s)")
    parser.add_argument("--calib-len", type=int, default=1024, help="tokens of each (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and exact tokens (%(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens that are read at once (%(default)s)")
    parser.add_argument("--decode", type=int, default=64, help="last tokens, read one by one (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each engine (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/rivals"), help="folder of folders")
    parser.add_argument("--plot", action="store_true", help="only draw the model's rivals.csv again")
    arguments = parser.parse_args(argv)
    arguments.python = dict(arguments.python)
    for option, names, known in (
        ("--rivals", arguments.rivals, RIVALS),
        ("--python", arguments.python, RIVALS),
        ("--types", arguments.types, LLAMA_TYPES),
        ("--caches", arguments.caches, TRANSFORMERS_CACHES),
    ):
        for name in names:
            if name not in known:
                parser.error(f"{option}: {name!r} is not known; choose among {', '.join(known)}")
    for rival, path in arguments.python.items():
        if shutil.which(path) is None:
            parser.error(f"--python: {path!r} of {rival} is no program; give the path of a Python")
    grouped = "transformers" in arguments.rivals and GROUPS_OF_TOKENS in arguments.caches
    for option, numbers in (
        ("--lengths", arguments.lengths),
        ("--chunk", [arguments.chunk]),
        ("--decode", [arguments.decode]),
    ):
        if grouped and any(number % GROUP for number in numbers):
            parser.error(
                f"{option} is not a multiple of {GROUP}, and {GROUPS_OF_TOKENS!r} only takes whole groups of so many "
                f"tokens; choose a multiple, or leave it out of --caches"
            )
    if not arguments.plot and not Path(arguments.model).is_file():
        parser.error(f"--model: {arguments.model!r} is not a file; name a .gguf file")
    arguments.folder = arguments.output / Path(arguments.model).stem
    return arguments


def python_of(rival: str, arguments: argparse.Namespace) -> str:
    """The interpreter that measures a rival."""
    return arguments.python.get(rival.removesuffix("-packed"), sys.executable)


def check_installed(rival: str, python: str) -> None:
    """End the program with a sentence if an interpreter does not have this project and what a rival needs."""
    for module in (PROJECT, *RIVALS[rival].modules):
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
        if subprocess.run([python, "-c", look], capture_output=True, check=False).returncode:
            install = "{python} -m pip install ." if module == PROJECT else RIVALS[rival].install
            raise SystemExit(
                f"{rival} needs the module {module}, which {python} does not have; install it with "
                f"`{install.format(python=python)}`, name another interpreter with --python "
                f"{rival}=PATH, or leave it out of --rivals"
            )


class Bench:
    """The text in the model's tokens, and how many numbers a token has in its cache."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.calibration = ["--calib-samples", str(arguments.calib_samples), "--calib-len", str(arguments.calib_len)]
        source = open_source(arguments.model, arguments.dtype)
        program = capture(source.config)
        run_passes(program, [LocateAttention()])
        self.numbers = cache_bytes_at_16_bits(program.sites, 1, 1) // 2
        self.tokenizer = source.tokenizer
        if self.tokenizer is None:
            raise SystemExit(f"{arguments.model} has no tokenizer, so it cannot read text; choose another model")
        self.tokens = self._held_out(max(arguments.lengths) + 1)[1]

    def _held_out(self, count: int) -> tuple[str, list[int]]:
        """The first `count` tokens of the package's held-out text, and the text that they stand for."""
        text = files("pmkvq_compiler").joinpath("data/heldout.txt").read_text(encoding="utf-8")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if len(found.input_ids) < count:
            raise SystemExit(f"the held-out text has {len(found.input_ids):,} tokens; choose --lengths below that")
        return text[: found.offset_mapping[count - 1][1]], found.input_ids[:count]

    def measure(self, rival: str) -> list[Row]:
        arguments = self.arguments
        match rival:
            case "pmkvq-compile":
                return [row for length in arguments.lengths for row in self._own(length)]
            case "llama.cpp" | "llama.cpp-packed":
                packed = Path(arguments.model)
                model = packed if rival.endswith("-packed") else unpacked(packed, arguments.folder / "float32.gguf")
                options = {"rival": rival, "model": str(model), "caches": arguments.types}
                return self._run("llama.cpp", arguments.lengths, options)
            case "transformers":
                caches = [
                    (name, f"{bits} bits", {**TRANSFORMERS_CACHES[name], "nbits": bits})
                    for name in arguments.caches
                    for bits in arguments.bits
                ]
                options = {"model": arguments.model, "dtype": arguments.dtype, "caches": caches}
                return self._run(rival, arguments.lengths, options)
            case _:
                return [row for length in arguments.lengths for row in self._simulated(length)]

    def _own(self, length: int) -> list[Row]:
        full = self._artifact(max(self.arguments.lengths), None)
        if full is None:
            raise SystemExit("without an artifact in full precision there is nothing to compare; use another model")
        made = {budget: self._artifact(length, budget) for budget in self.arguments.budgets}
        caches = {budget: folder for budget, folder in made.items() if folder is not None}
        return self._run("pmkvq-compile", [length], {"full": full, "caches": caches}) if caches else []

    def _artifact(self, length: int, budget: str | None) -> str | None:
        """The folder of an artifact, which is compiled unless it is there; None if that fails, which the compiler
        explains: a few tokens may not fit a small budget."""
        chosen = ["--budget", budget, *self.calibration] if budget else ["--recipe", "none", *NO_CALIBRATION]
        name = "-".join(word for word in chosen if not word.startswith("--"))
        folder = self.arguments.folder / "artifacts" / f"{length}-{self.arguments.dtype}-{name}"
        if not (folder / "pmkvq.json").is_file():
            command = [sys.executable, "-m", "pmkvq_compiler.cli", self.arguments.model, *chosen]
            options = ["--dtype", self.arguments.dtype, "--max-len", str(length), "-o", str(folder)]
            if subprocess.run([*command, *options], check=False).returncode:
                return None
        return str(folder)

    def _run(self, engine: str, lengths: list[int], options: Mapping[str, Any]) -> list[Row]:
        """Run an engine in a process of its own."""
        arguments = self.arguments
        text = {"tokens": self.tokens, "lengths": lengths, "chunk": arguments.chunk, "decoded": arguments.decode}
        task = {"engine": engine, "options": options, "text": text, "numbers": self.numbers}
        path = arguments.folder / f"{engine}.json"
        path.write_text(json.dumps({**task, "threads": arguments.threads}), encoding="utf-8")
        command = [python_of(engine, arguments), str(ENGINES), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        if subprocess.run(command, env=environment, check=False).returncode:
            raise SystemExit(f"{engine} failed for the reason above; leave it out with --rivals")
        return [Row(**row) for row in json.loads(path.with_suffix(".rows.json").read_text(encoding="utf-8"))]

    def _simulated(self, length: int) -> list[Row]:
        """What `quality.py` finds for the recipes of others and the first `length` tokens, and MiKV."""
        arguments, folder = self.arguments, self.arguments.folder / f"simulated-{length}"
        folder.mkdir(exist_ok=True)
        some_more = self._held_out(length + length // 2)[0]  # so that there is one whole piece, whatever is cut off
        (folder / "text.txt").write_text(some_more, encoding="utf-8")
        model = ["--model", arguments.model, "--dtype", arguments.dtype]
        text = ["--text", str(folder / "text.txt"), "--length", str(length), "--count", "1"]
        plans = ["--recipes", arguments.recipes, "--budgets", arguments.simulated_budgets]
        quality.main([*model, *text, *plans, *self.calibration, "--output", str(folder)])
        full, *rows = quality.read_rows(folder / "quality.csv")
        found = [
            Row(row.recipe, row.budget, length, row.true_bits, row.perplexity, full.perplexity, row.divergence,
                row.agreement)
            for row in rows
        ]  # fmt: skip
        source = open_source(arguments.model, arguments.dtype)
        loaded = source.load_model(ATTENTION, pick_device("auto"), torch.float32).requires_grad_(False)
        return found + mikv_rows(loaded, self.tokens[:length], arguments.mikv_shares)


@torch.no_grad()
def mikv_rows(model: PreTrainedModel, tokens: list[int], shares: Iterable[float]) -> list[Row]:
    """MiKV with some shares of tokens at 8 bits, as `quality.py` scores others."""
    ids = torch.tensor([tokens], device=model.device)
    positions, item = torch.arange(len(tokens), device=model.device)[None], quality.Item(tokens[:1], tokens[1:])
    with observed(lambda call: None):
        full = logits_of(model, ids, positions)
    rows = []
    for share in shares:
        with observed(method := MiKV(share)):
            found = logits_of(model, ids, positions)
        own, exact = quality.score(item, full, found), quality.score(item, full, full)
        perplexity, full_perplexity = (math.exp(score.nll / score.tokens) for score in (own, exact))
        losses = own.divergence / own.tokens, own.agreed / own.tokens
        row = Row("mikv", f"{share:.0%} at 8 bits", len(tokens), method.true_bits, perplexity, full_perplexity, *losses)
        rows.append(row)
    return rows


def unpacked(model: Path, path: Path) -> Path:
    """Write a .gguf file with the weights of `model` in float32 to `path`, unless it is there."""
    if path.is_file():
        return path
    reader, partial = gguf.GGUFReader(model), path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(path)


# ---- what is shown ----


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(line.pop("rival"), line.pop("cache"), int(line.pop("tokens")), **{k: float(v) for k, v in line.items()})
            for line in csv.DictReader(file)
        ]


def add_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows to a file, in place of those of the same cache and length that are in it."""
    before = read_rows(path) if path.is_file() else []
    kept = {(row.rival, row.cache, row.tokens): row for row in (*before, *rows)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in kept.values())


def markdown(rows: Sequence[Row]) -> str:
    """One table for each length."""
    tables = []
    for tokens in dict.fromkeys(row.tokens for row in rows):
        lines = [
            f"| {tokens:,} tokens | true bits | perplexity | its own in full precision | KL, nats a token | "
            "in the second half | same greedy token | tokens/s | its own in full precision |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {row.rival}, {row.cache} | {row.true_bits:.2f} | {row.perplexity:.3f} | {row.full_perplexity:.3f} | "
            f"{row.divergence:.1e} | {_known(row.late_divergence, '.1e')} | {row.agreement:.1%} | "
            f"{_known(row.tokens_per_second, '.1f')} | {_known(row.full_tokens_per_second, '.1f')} |"
            for row in rows
            if row.tokens == tokens
        ]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _known(number: float, form: str) -> str:
    return "" if math.isnan(number) else format(number, form)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw divergence against true bits at the longest length, with a line for each rival."""
    longest = [row for row in rows if row.tokens == max(each.tokens for each in rows)]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in longest:
        lines.setdefault(row.rival, []).append((row.true_bits, row.divergence))
    quality.draw(lines, "KL to its own full precision, nats a token", "log", path)


if __name__ == "__main__":
    main()
