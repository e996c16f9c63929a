"""The command `pmkvq-compile`: arguments in, progress and a table out, errors as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
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
"""The most digits of a number: longer ones do not fit 64 bits, and no count of tokens or texts is that large."""

DESCRIPTION = """\
Compile a causal language model into an artifact whose KV cache never takes
more memory than you allow. An artifact is a folder with Python code, weights
and kernels; it generates text without transformers and without this compiler.
By default, the cache starts at 16 bits a number and gives up bits only when it
is full."""

CALIBRATION = """\
The compiler runs the model on a few texts to measure what quantization costs
in each layer. It keeps the measurements beside OUT and uses them again when
only the budget or the batch size changes."""

BUDGETS = """\
the budget
  It is the memory for the caches of all layers together, for --batch-size
  sequences of --max-len tokens each. Everything counts: codes, the parameters
  of every group, and the first and most recent tokens, which stay in the
  model's own dtype. In float32, which small GGUF files are read as, those
  tokens take twice as much as with --dtype bfloat16.
    512MiB    bytes (KiB, MiB, GiB; KB, MB, GB)
    25%       a share of what the cache takes at 16 bits a number
    3.2bits   bits that a number takes on average, with everything counted
"""

EXAMPLES = """\
examples
  pmkvq-compile demo --budget 22MiB --max-len 4096
      compile SmolLM2-135M-Instruct, whose cache needs 90 MiB for 4,096 tokens
      at 16 bits
  pmkvq-compile Qwen/Qwen2.5-1.5B-Instruct --budget 25% --max-len 32768 --dry-run
      show what each layer would get, and write nothing
  pmkvq-compile demo --max-len 4096 --dry-run --budgets 3bits,3.5bits,4bits,5bits
      compare what each of four budgets would cost the model
  pmkvq-compile demo --budget 22MiB --max-len 4096 --aot sm_80,sm_90
      compile the kernels, too, for an A100 and for an H100 or H200
  pmkvq-compile ./my-model --budget 3.2bits --calib my-text.jsonl -o my-artifact
      measure on your own text
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a failed compile, 2 for wrong usage, or 128 plus the number of
    the signal that ended it (130 after Ctrl-C)."""
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
    """A parsed command line. If it names `budgets`, their plans are compared; else `options` say what to compile."""

    options: CompileOptions
    budgets: tuple[str, ...]
    as_json: bool


def parse(argv: Sequence[str] | None) -> Request:
    """Parse a command line. Raises `UsageError`."""
    chosen = vars(_parser().parse_args(argv))
    as_json, budgets = chosen.pop("json"), chosen.pop("budgets")
    if budgets and not chosen["dry_run"]:
        raise UsageError("--budgets compares plans and writes nothing; add --dry-run, or give one --budget")
    name, quantizes = chosen["recipe"], RECIPES[chosen["recipe"]].quantizes
    if budgets and chosen["budget"] is not None:
        raise UsageError("--budgets takes the place of --budget; leave one of them out")
    if budgets and not quantizes:
        raise UsageError(
            f"--recipe {name} leaves the cache unquantized, so it has no plans to compare; choose another recipe, or "
            f"leave --budgets out"
        )
    if quantizes and chosen["budget"] is None and not budgets:
        raise UsageError("--budget is missing; say how much memory the cache may take: 512MiB, 25% or 3.2bits")
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
        epilog="\n".join([BUDGETS, _recipes(), EXAMPLES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_request(parser, defaults)
    _add_plan(parser, defaults)
    _add_calibration(parser, defaults)
    _add_output(parser, defaults)
    return parser


def _add_request(parser: argparse.ArgumentParser, defaults: CompileOptions) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id (org/name), folder of a Hugging Face model, .gguf file, or `demo` (SmolLM2-135M-Instruct)",
    )
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="SIZE",
        help="memory for the cache: 512MiB, 25%% or 3.2bits (see below); every recipe but none needs it",
    )
    parser.add_argument(
        "--budgets",
        type=_budgets,
        default=(),
        metavar="LIST",
        help="with --dry-run, in place of --budget: compare the plans for several budgets, such as 3bits,3.5bits,4bits",
    )
    parser.add_argument(
        "--max-len",
        type=_count,
        metavar="N",
        help="tokens of the longest sequence, prompt and answer together (default: the model's own limit)",
    )
    parser.add_argument(
        "--batch-size",
        type=_count,
        default=defaults.batch_size,
        metavar="N",
        help="sequences that the cache holds at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="plan for vLLM: the budget is then also the size of its cache, in which the same sequences take more, "
        "because it consists of blocks of one size",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="folder to write the artifact into (default: NAME-pmkvq here, after the model's name)",
    )
    parser.add_argument("--force", action="store_true", help="replace the artifact that is in OUT")


def _recipes() -> str:
    """The section of the help that explains every recipe."""
    width = max(map(len, RECIPES)) + 4
    lines = ["the recipes"]
    for name, recipe in RECIPES.items():
        first = f"  {name}".ljust(width)
        lines.append(textwrap.fill(recipe.summary, 79, initial_indent=first, subsequent_indent=" " * width))
    return "\n".join(lines) + "\n"


def _add_plan(parser: argparse.ArgumentParser, defaults: CompileOptions) -> None:
    plan = parser.add_argument_group("plan")
    plan.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default=defaults.recipe,
        help="method that chooses the plan (see below; default: %(default)s)",
    )
    plan.add_argument(
        "--bits",
        type=_bits,
        metavar="LIST",
        help="bits that the numbers of a layer may end at when its cache is full, such as 8,4 (default: all widths)",
    )
    plan.add_argument(
        "--window",
        type=_count,
        metavar="N",
        help="most recent tokens that are not quantized, in every layer (default: the recipe's choice)",
    )
    plan.add_argument(
        "--sink",
        type=_count_or_zero,
        metavar="N",
        help="first tokens of a sequence that are not quantized (default: the recipe's choice)",
    )


def _add_calibration(parser: argparse.ArgumentParser, defaults: CompileOptions) -> None:
    calibration = parser.add_argument_group("calibration", CALIBRATION)
    calibration.add_argument(
        "--calib",
        default=defaults.calib,
        metavar="FILE",
        help='text file, or JSON lines with "text", "messages" or "input_ids"; `builtin` is English prose, programming '
        "and mathematics (default: %(default)s)",
    )
    calibration.add_argument(
        "--calib-samples",
        type=_count,
        default=defaults.calib_samples,
        metavar="N",
        help="pieces of the text to measure on (default: %(default)s); 8 take twice as long as 4, and their plans lost "
        "6 to 13%% less in our benchmark",
    )
    calibration.add_argument(
        "--calib-len",
        type=_count,
        default=defaults.calib_len,
        metavar="N",
        help="tokens of each piece (default: %(default)s)",
    )
    calibration.add_argument(
        "--effective-len",
        type=_count,
        metavar="N",
        help="with --recipe pm-kvq: number of positions that the tokens of a piece are spread over, so that it stands "
        "for a longer text (default: --max-len)",
    )
    calibration.add_argument(
        "--device",
        default=defaults.device,
        metavar="NAME",
        help="device to measure on: cpu, cuda, cuda:1 ... (default: %(default)s, the GPU if there is one). cuda is all "
        "GPUs if the model does not fit one; a model that fits nowhere is read layer by layer",
    )
    calibration.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default=defaults.dtype,
        help="dtype of the artifact's weights and of its unquantized tokens (default: %(default)s, the checkpoint's "
        "own; for .gguf files float32, or bfloat16 above 1 billion parameters unless the file is in float32)",
    )


def _add_output(parser: argparse.ArgumentParser, defaults: CompileOptions) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--aot",
        type=_targets,
        default=defaults.aot,
        metavar="LIST",
        help=f"compile the CUDA kernels now for these GPU architectures, out of {', '.join(TARGETS)}; this needs no "
        f"GPU (default: Triton compiles each kernel when it is first launched)",
    )
    output.add_argument(
        "--onnx",
        action="store_true",
        help="also write model.onnx, whose cache has its final bits from the start; needs pmkvq-compiler[onnx]",
    )
    output.add_argument(
        "--whole",
        action="store_true",
        help="of a multimodal model, keep what turns images into embeddings: transformers and vLLM then load the whole "
        "model from OUT (default: OUT holds the language model alone)",
    )
    output.add_argument(
        "--dump-passes",
        type=Path,
        metavar="DIR",
        help="write the graph after each pass into this folder, as readable Python (for work on the compiler)",
    )
    output.add_argument(
        "--dry-run", action="store_true", help="measure and plan, print the plan as a table, write nothing"
    )
    output.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")


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
    """Check that the text is a budget and return it; how many bytes it means depends on the model."""
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
