"""The command `pmkvq-compile`: arguments in, progress and a table out, errors as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pmkvq_compiler.budget import read_budget
from pmkvq_compiler.console import print_json, print_text, progress_bars
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.failures import FAILED, explain
from pmkvq_compiler.interrupts import Signals, ignore_from_now_on, watched
from pmkvq_compiler.options import TARGETS, CompileOptions
from pmkvq_compiler.recipes import RECIPES

if TYPE_CHECKING:
    from pmkvq_compiler.compile import CompileResult
    from pmkvq_compiler.explore import Explored


LONGEST_NUMBER = 18
"""Digits of a whole number: what has more does not fit 64 bits, and nothing is ever counted in it."""

DESCRIPTION = """\
Compile a causal language model and a memory budget for its key/value cache into an artifact: a directory that loads and
generates by itself and keeps its cache inside that budget, in 16 bits a number and, when it is full, in fewer."""


EXAMPLES = """\
the budget
  What the caches of all layers together may take with --batch-size sequences of --max-len tokens. Everything counts:
  codes, the parameters of every group, and the first and most recent tokens, which stay in the model's own dtype.
  In float32, in which GGUF files are read, these weigh twice what they do with --dtype bfloat16.
    512MiB    bytes (KiB, MiB, GiB; KB, MB, GB)
    25%       of the cache at 16 bits a number
    3.2bits   a number of the cache, on average

examples
  pmkvq-compile demo --budget 22MiB --max-len 4096
      SmolLM2-135M-Instruct, which needs 90 MiB for 4,096 tokens at 16 bits
  pmkvq-compile Qwen/Qwen2.5-1.5B-Instruct --budget 25% --max-len 32768 --dry-run
      see what each layer would get, write nothing
  pmkvq-compile demo --max-len 4096 --dry-run --budgets 3bits,3.5bits,4bits,5bits
      what each budget would cost the model
  pmkvq-compile demo --budget 22MiB --max-len 4096 --aot sm_80,sm_90
      with kernels that are ready for an A100 and an H100 or H200
  pmkvq-compile ./my-model --budget 3.2bits --calib my-text.jsonl -o my-artifact
      calibrate with your own text
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 for a failed compile, 2 for wrong usage, 128 and the signal's number
    (130 after Ctrl-C) when a signal ended it."""
    with watched() as signals:
        try:
            return _run(argv, signals)
        except KeyboardInterrupt:
            if argv is None:  # the process is this command, and about to end
                ignore_from_now_on()
            return _fail(signals.sentence, signals.exit_code)


def _run(argv: Sequence[str] | None, signals: Signals) -> int:
    try:
        with signals.not_disguised():
            request = parse(argv)
            result = _explore(request) if request.budgets else _compile(request.options)
            (print_json if request.as_json else print_text)(result)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _fail(*explain(error))
    return 0


@dataclass(frozen=True)
class Request:
    """A command line: `budgets` are to be compared, if there are any; else `options` say what to compile."""

    options: CompileOptions
    budgets: tuple[str, ...]
    as_json: bool


def parse(argv: Sequence[str] | None) -> Request:
    """What a command line asks for. Raises `UsageError`."""
    chosen = vars(_parser().parse_args(argv))
    as_json, budgets = chosen.pop("json"), chosen.pop("budgets")
    if budgets and not chosen["dry_run"]:
        raise UsageError("--budgets compares plans and writes nothing; add --dry-run, or give one --budget")
    name, quantizes = chosen["recipe"], RECIPES[chosen["recipe"]].quantizes
    if budgets and (chosen["budget"] is not None or not quantizes):
        raise UsageError("--budgets takes the place of --budget and compares plans of one recipe that has any")
    if quantizes and chosen["budget"] is None and not budgets:
        raise UsageError("--budget is missing: say what the cache may take, such as --budget 512MiB, 25% or 3.2bits")
    if not quantizes and chosen["budget"] is not None:
        raise UsageError(
            f"--recipe {name} leaves the cache unquantized, so it takes no --budget; leave one of them out"
        )
    if chosen["dump_passes"] is not None and chosen["dry_run"]:
        raise UsageError("--dump-passes writes files and --dry-run writes nothing; leave one of them out")
    if chosen["output"] is None:
        chosen["output"] = Path(f"{Path(chosen['model']).name.removesuffix('.gguf') or 'model'}-pmkvq")
    return Request(CompileOptions(**chosen), budgets, as_json)


def _fail(message: str, code: int) -> int:
    print(f"pmkvq-compile: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see pmkvq-compile --help")


def _parser() -> argparse.ArgumentParser:
    defaults = CompileOptions(model="", output=Path())
    parser = _Parser(
        prog="pmkvq-compile",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, Hugging Face folder, .gguf file, or `demo`")
    parser.add_argument(
        "--budget", type=_budget, metavar="SIZE", help="memory for the cache: 512MiB, 25%% or 3.2bits (see below)"
    )
    parser.add_argument(
        "--budgets",
        type=_budgets,
        default=(),
        metavar="LIST",
        help="with --dry-run: compare the plans for several, such as 3bits,3.5bits,4bits",
    )
    parser.add_argument(
        "--max-len", type=_count, metavar="N", help="tokens a sequence may have (default: the model's own limit)"
    )
    parser.add_argument(
        "--batch-size", type=_count, default=defaults.batch_size, metavar="N", help="sequences at once (%(default)s)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder to write (default: the model's name and -pmkvq)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it is not empty")
    _add_plan(parser, defaults)
    _add_calibration(parser, defaults)
    _add_output(parser, defaults)
    return parser


def _add_plan(parser: argparse.ArgumentParser, defaults: CompileOptions) -> None:
    plan = parser.add_argument_group("plan")
    summaries = "; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items())
    plan.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default=defaults.recipe,
        help=f"{summaries.replace('%', '%%')} (%(default)s)",
    )
    plan.add_argument(
        "--bits",
        type=_bits,
        metavar="LIST",
        help="final widths to choose from, such as 8,4 (all of them)",
    )
    plan.add_argument("--window", type=_count, metavar="N", help="most recent tokens kept in the model's dtype")
    plan.add_argument("--sink", type=_count_or_zero, metavar="N", help="first tokens kept in the model's dtype")


def _add_calibration(parser: argparse.ArgumentParser, defaults: CompileOptions) -> None:
    calibration = parser.add_argument_group("calibration (kept beside OUT and used again when only the budget changes)")
    calibration.add_argument(
        "--calib", default=defaults.calib, metavar="FILE", help="text or JSON lines, or `builtin` (%(default)s)"
    )
    calibration.add_argument(
        "--calib-samples", type=_count, default=defaults.calib_samples, metavar="N", help="pieces of it (%(default)s)"
    )
    calibration.add_argument(
        "--calib-len", type=_count, default=defaults.calib_len, metavar="N", help="tokens a piece (%(default)s)"
    )
    calibration.add_argument(
        "--effective-len",
        type=_count,
        metavar="N",
        help="length that the positions of a piece are stretched to (default: decided from --max-len)",
    )
    calibration.add_argument(
        "--device",
        default=defaults.device,
        metavar="NAME",
        help="where the model runs: auto, cpu, cuda:0 ...",
    )
    calibration.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default=defaults.dtype,
        help="of the model and of the artifact (auto: the checkpoint's own)",
    )


def _add_output(parser: argparse.ArgumentParser, defaults: CompileOptions) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--aot",
        type=_targets,
        default=defaults.aot,
        metavar="LIST",
        help=f"compile the CUDA kernels now, so that nothing is compiled where the model runs, for devices out of "
        f"{', '.join(TARGETS)}; no GPU is needed (default: Triton compiles each kernel at its first launch)",
    )
    output.add_argument(
        "--onnx", action="store_true", help="write model.onnx too, with the cache at its final bits (needs [onnx])"
    )
    output.add_argument(
        "--dump-passes",
        type=Path,
        metavar="DIR",
        help="write the graph after each pass into this folder, as Python to read (for work on the compiler)",
    )
    output.add_argument("--dry-run", action="store_true", help="plan and print the table, write nothing")
    output.add_argument("--json", action="store_true", help="print the result as JSON")


def _count(text: str) -> int:
    return _integer(text, least=1)


def _count_or_zero(text: str) -> int:
    return _integer(text, least=0)


def _integer(text: str, least: int) -> int:
    if len(text) > LONGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"'{text[:LONGEST_NUMBER]}...' is too long for a number of tokens or texts")
    if not text.isascii() or not text.lstrip("-").isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _bits(text: str) -> tuple[int, ...]:
    from pmkvq_compiler.runtime.plan import FINAL_BITS  # loads torch, for which `--help` does not wait

    widths, known = text.split(","), [str(bits) for bits in FINAL_BITS]
    if not set(widths) <= set(known) or len(set(widths)) < len(widths):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of different widths out of {', '.join(known[:-1])} and {known[-1]}, "
            f"such as {','.join(known[-2:])}"
        )
    return tuple(sorted(map(int, widths), reverse=True))


def _targets(text: str) -> tuple[str, ...]:
    targets = text.split(",")
    if not set(targets) <= set(TARGETS) or len(set(targets)) < len(targets):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different targets out of {', '.join(TARGETS)}")
    return tuple(sorted(targets, key=TARGETS.index))


def _budget(text: str) -> str:
    """The text itself, if it is a budget at all; how many bytes it stands for depends on the model."""
    return read_budget(text).text


def _budgets(text: str) -> tuple[str, ...]:
    return tuple(_budget(part) for part in text.split(","))


def _compile(options: CompileOptions) -> CompileResult:
    with progress_bars() as progress:
        from pmkvq_compiler.compile import compile_model

        return compile_model(options, progress)


def _explore(request: Request) -> list[Explored]:
    with progress_bars() as progress:
        from pmkvq_compiler.explore import explore

        return explore(request.options, request.budgets, progress)


if __name__ == "__main__":
    sys.exit(main())
