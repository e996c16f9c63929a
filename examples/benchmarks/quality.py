"""What a model can still do inside a budget: recipes and budgets, scored on chains of thought and on text.

    python examples/benchmarks/quality.py                                   # the project's own reasoner
    python examples/benchmarks/quality.py --model demo --text held-out.txt  # perplexity of a language model
    python examples/benchmarks/quality.py --model FOLDER --problems p.jsonl --calib c.jsonl

`best` and its ablations are scored in the number format of the runtime, `pmkvq_compiler.runtime.quantize`. PM-KVQ and
the baselines are calibrated, planned and scored in that of their papers, `papers_format`: two fp16 numbers per group,
which count as bytes, steps of `range / (2^b - 1)`, and the equivalent right shift. An artifact that is compiled with
one of these recipes has the runtime's format.

Chains are scored by teacher forcing under the progressive cache (`pmkvq_compiler.plan.teacher_forcing`), which gives
the same result as greedy decoding: a chain is right if and only if every argmax is. Problems are JSON lines with
"prompt" and "chain". Those of the project's reasoner are drawn from seed 1, its calibration texts from seed 2, at most
half as long. All recipes see the same problems, so differences are paired: the interval is the 95% bootstrap interval
of the difference in exact chains to the first recipe.

`--decode 4` compiles each plan of the runtime's format and lets the artifact decode four of the chains. Half of these
are chains that were scored as wrong, as far as there are any. Scores are computed in float32 and the artifact decodes
in its own dtype; with `--dtype float32` both round alike.

Writes DIR/quality.csv, quality.md and quality.svg: quality against true bits a number. At the end it prints Kendall's
rank correlation of the predicted losses with the measured divergences, over all plans.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from papers_format import papers_format
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, observed
from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.logits import Logits, logits_of
from pmkvq_compiler.calibrate.measure import calibrate
from pmkvq_compiler.calibrate.texts import read_samples
from pmkvq_compiler.divergence import divergences
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.plan.feasible import check_feasible
from pmkvq_compiler.plan.propose import propose
from pmkvq_compiler.plan.rerank import Tried, try_plans
from pmkvq_compiler.plan.solution import Folds, Solution, plan_table
from pmkvq_compiler.plan.teacher_forcing import progressive
from pmkvq_compiler.problem import pick_device, resolve
from pmkvq_compiler.recipes import RECIPES, Recipe
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.source.source import open_source
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits

OWN = Path(__file__).parent.parent / "reasoner"
RECIPES["kivi-128"] = replace(RECIPES["kivi"], block=128)
PM_KVQ = RECIPES["pm-kvq"]
PAPERS_ABLATIONS = {
    "pm-kvq": PM_KVQ,
    "  not progressive": replace(PM_KVQ, progressive=False),
    "  same bits in every layer": replace(PM_KVQ, per_layer=False),
    "  no positional interpolation": PM_KVQ,
    "  no scales": replace(PM_KVQ, key_transforms=("none",)),
}
"""The paper's ablations. Positional interpolation is an option of the calibration, not of the recipe."""

BEST = RECIPES["best"]
ABLATIONS = PAPERS_ABLATIONS | {
    "best": BEST,
    "  windows of 128 tokens": replace(BEST, windows=(128,)),
    "  K by token": replace(BEST, key_axes=("token",)),
    "  K as it is": replace(BEST, key_transforms=("none",)),
    "  V as it is": replace(BEST, value_transforms=("none",)),
    "  not progressive ": replace(BEST, progressive=False),
}
IN_PAPERS_FORMAT = {"kivi", "kivi-128", "rotation", "uniform", *PAPERS_ABLATIONS}


@dataclass(frozen=True)
class Item:
    """A text to score: the tokens of the prompt, and those that the model should reproduce."""

    prompt: list[int]
    chain: list[int]


@dataclass(frozen=True)
class Row:
    """Scores of one plan; `worse_by_low` and `worse_by_high` bound the exact chains lost to the first recipe."""

    recipe: str
    budget: str
    true_bits: float
    predicted_loss: float
    exact: float
    worse_by_low: float
    worse_by_high: float
    first_error: float
    perplexity: float
    divergence: float
    agreement: float


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    if arguments.plot:
        plot(read_rows(arguments.output / "quality.csv"), arguments.output / "quality.svg")
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    rows = bench.ablations() if arguments.ablations else bench.recipes()
    write(rows, arguments.output, f"{arguments.model}, {len(bench.items)} texts of up to {bench.max_len:,} tokens")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(OWN / "model"), help="hub id, folder, .gguf file or `demo`")
    parser.add_argument("--problems", type=Path, help='JSON lines with "prompt" and "chain"')
    parser.add_argument("--text", type=Path, help="held-out text: perplexity instead of chains")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a piece of --text (%(default)s)")
    parser.add_argument("--count", type=int, default=48, help="problems or pieces (%(default)s)")
    parser.add_argument("--calib", help="calibration text as for pmkvq-compile")
    parser.add_argument("--calib-len", type=int, default=2048)
    parser.add_argument("--calib-samples", type=int, default=8)
    parser.add_argument(
        "--effective-len", type=int, help="tokens that calibration texts are stretched to (default: --max-len)"
    )
    parser.add_argument("--max-len", type=int, help="tokens that plans are made for (default: the longest item)")
    parser.add_argument("--recipes", default="best,pm-kvq,kivi,kivi-128,rotation,uniform")
    parser.add_argument("--budgets", default="2.6bits,2.8bits,3bits,3.3bits,3.7bits,4.3bits")
    parser.add_argument("--ablations", action="store_true", help="leave one thing out at a time, at each budget")
    parser.add_argument("--dtype", default="auto", help="dtype of sink and window in the byte counts (%(default)s)")
    parser.add_argument(
        "--decode", type=int, default=0, help="how many chains of each plan a compiled artifact decodes step by step"
    )
    parser.add_argument("--batch", type=int, default=12, help="items scored at once (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/quality"))
    parser.add_argument("--plot", action="store_true", help="only draw --output's quality.csv again")
    return parser.parse_args(argv)


class Bench:
    """The source model (in float32 to score, in its own dtype to plan), the items with their full-precision scores, and
    the calibrations."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source = open_source(arguments.model, arguments.dtype)
        program = capture(self.source.config)
        run_passes(program, [LocateAttention()])
        self.sites: list[AttentionSite] = program.sites
        self.states = program.states
        self.calib = arguments.calib or self._own_calibration()
        self.items = sorted(self._items(), key=lambda item: len(item.prompt) + len(item.chain))[-arguments.count :]
        self.max_len = arguments.max_len or max(len(item.prompt) + len(item.chain) for item in self.items)
        self.effective_len = arguments.effective_len or self.max_len
        self.planning_model = self._model()
        exact = self.planning_model.dtype == torch.float32
        self.model = self.planning_model if exact else self._model(torch.float32)
        self.calibrations: dict[tuple[Recipe, int], Calibration] = {}
        self.references: dict[int, list[Logits]] = {}
        self.scored: dict[tuple[Any, ...], list[Score]] = {}
        self.exact: dict[str, list[bool]] = {}
        self.full = self._score_all(None)

    def _model(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return self.source.load_model(ATTENTION, pick_device("auto"), dtype).requires_grad_(False)

    def _own_calibration(self) -> str:
        if self.arguments.text or self.arguments.problems:
            return "builtin"
        problems = own_problems()
        path, rng = self.arguments.output / "calibration.jsonl", random.Random(2)
        entries = problems.most_entries(self.arguments.calib_len)
        texts = ["".join(problems.ledger(rng, entries)) for _ in range(self.arguments.calib_samples)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return str(path)

    def _items(self) -> list[Item]:
        tokenizer, arguments = self.source.tokenizer, self.arguments
        assert tokenizer is not None
        if arguments.text:
            ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False)
            pieces = [ids[start : start + arguments.length] for start in range(0, len(ids), arguments.length)]
            whole = [piece for piece in pieces if len(piece) == arguments.length]
            return [Item(piece[:1], piece[1:]) for piece in whole]
        if arguments.problems:
            lines = [json.loads(line) for line in arguments.problems.read_text(encoding="utf-8").splitlines()]
            pairs = [(line["prompt"], line["chain"]) for line in lines]
        else:
            problems = own_problems()
            rng, entries = random.Random(1), problems.most_entries(4096)
            pairs = [problems.ledger(rng, entries) for _ in range(arguments.count)]
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        return [Item(begin + ids(prompt), ids(chain) + end) for prompt, chain in pairs]

    def recipes(self) -> list[Row]:
        """A row for each recipe and each budget that the recipe can meet."""
        rows = [self._full_row()]
        for recipe in self.arguments.recipes.split(","):
            for budget in self.arguments.budgets.split(","):
                with number_format(recipe):
                    rows += self._row(recipe, budget, self.effective_len)
        return rows

    def ablations(self) -> list[Row]:
        rows = [self._full_row()]
        for budget in self.arguments.budgets.split(","):
            for name, recipe in ABLATIONS.items():
                RECIPES[name] = recipe
                effective = self.arguments.calib_len if "interpolation" in name else self.effective_len
                with number_format(name):
                    rows += self._row(name, budget, effective)
        return rows

    def _options(self, recipe: str, effective_len: int) -> CompileOptions:
        arguments = self.arguments
        return CompileOptions(
            model=arguments.model,
            output=arguments.output,
            budget="100%",
            recipe=recipe,
            calib=self.calib,
            calib_len=arguments.calib_len,
            calib_samples=arguments.calib_samples,
            effective_len=max(effective_len, arguments.calib_len),
            dtype=arguments.dtype,
        )

    def plan(self, recipe: str, budget: str, effective_len: int) -> tuple[Tried, Calibration]:
        """The plan that a compile with this recipe would choose, and the calibration that it is based on. Recipes that
        measure the same share a calibration. Raises `CompileError` where no plan fits the budget."""
        options = self._options(recipe, effective_len)
        problem = resolve(replace(options, budget=budget), self.sites, self.max_len, self.source.dtype, self.states)
        check_feasible(problem)
        measured = replace(RECIPES[recipe], progressive=True, per_layer=True, exact_layers=True)
        if (measured, effective_len) not in self.calibrations:
            self.calibrations[measured, effective_len] = calibrate(self.source, problem, lambda *_: None)
        calibration = self.calibrations[measured, effective_len]
        proposals = propose(problem, calibration)
        samples = read_samples(self.source, problem)
        (best,) = try_plans(self.planning_model, samples, [proposals], calibration, lambda *_: None)
        return best, calibration

    def _row(self, recipe: str, budget: str, effective_len: int) -> list[Row]:
        start = time.perf_counter()
        try:
            tried, calibration = self.plan(recipe, budget, effective_len)
        except CompileError as error:
            print(f"{recipe:30} {budget:8} {error}", flush=True)
            return []
        solution = tried.solution
        plan = (calibration.fingerprint, solution.plan.layers, solution.formats)
        if plan not in self.scored:
            self.scored[plan] = self._score_all(solution, calibration)
        scores = self.scored[plan]
        table = plan_table(solution, self.sites, calibration)
        bits = 16 * solution.plan.arena_bytes / cache_bytes_at_16_bits(self.sites, self.max_len, 1)
        row = self._summary(recipe, budget, bits, tried.loss, scores)
        layout = " ".join(f"{e.key_bits}{e.key_axis[0]}{e.value_bits}w{e.window}" for e in table)
        seconds = time.perf_counter() - start
        print(
            f"{recipe:30} {budget:8} true {bits:.3f}  exact {row.exact:.1%}  perplexity {row.perplexity:.4f}  "
            f"KL {row.divergence:.2e}  predicted {row.predicted_loss:.2e}  {seconds:.0f} s  {layout}",
            flush=True,
        )
        if self.arguments.decode and recipe not in IN_PAPERS_FORMAT:
            self._decode(self._options(recipe, effective_len), budget, solution, scores)
        return [row]

    def _decode(self, options: CompileOptions, budget: str, solution: Solution, scores: list[Score]) -> None:
        """Print whether the compiled artifact, decoding step by step, makes the chains that the scores say."""
        from stepwise import first_errors

        wrong = [index for index, score in enumerate(scores) if score.first_error is not None]
        right = [index for index, score in enumerate(scores) if score.first_error is None]
        count = self.arguments.decode
        chosen = (wrong[: max(count // 2, count - len(right))] + right)[:count]
        options = replace(options, budget=budget, max_len=self.max_len)
        items = [(self.items[index].prompt, self.items[index].chain) for index in chosen]
        for index, found in zip(
            chosen, first_errors(options, solution.plan, items, str(self.model.device)), strict=True
        ):
            expected = scores[index].first_error
            print(
                f"  chain {index}: first error {expected} scored, {found} decoded, "
                f"{'agree' if expected == found else 'differ'}",
                flush=True,
            )

    def _full_row(self) -> Row:
        return self._summary("full precision", "", 16.0, 0.0, self.full)

    def _summary(self, name: str, budget: str, bits: float, predicted: float, scores: list[Score]) -> Row:
        exact = [score.first_error is None for score in scores]
        first = self.exact.setdefault(budget, exact)
        low, high = paired_interval([int(a) - int(b) for a, b in zip(first, exact, strict=True)])
        tokens = sum(score.tokens for score in scores)
        errors = [score.first_error for score in scores if score.first_error is not None]
        return Row(
            recipe=name,
            budget=budget,
            true_bits=bits,
            predicted_loss=predicted,
            exact=sum(exact) / len(exact),
            worse_by_low=low,
            worse_by_high=high,
            first_error=sum(errors) / len(errors) if errors else math.nan,
            perplexity=math.exp(sum(score.nll for score in scores) / tokens),
            divergence=sum(score.divergence for score in scores) / tokens,
            agreement=sum(score.agreed for score in scores) / tokens,
        )

    @torch.no_grad()
    def _score_all(self, solution: Solution | None, calibration: Calibration | None = None) -> list[Score]:
        scores = []
        for start in range(0, len(self.items), self.arguments.batch):
            batch = self.items[start : start + self.arguments.batch]
            reference = self._reference(start, batch)
            found = reference if solution is None else self._logits(batch, solution, calibration)
            scores += [score(item, reference[row], found[row]) for row, item in enumerate(batch)]
        return scores

    def _reference(self, start: int, batch: list[Item]) -> list[Logits]:
        """Full-precision logits of a batch; kept for the next plan."""
        if start not in self.references:
            self.references[start] = self._logits(batch, None, None)
        return self.references[start]

    def _logits(self, batch: list[Item], solution: Solution | None, calibration: Calibration | None) -> list[Logits]:
        """The logits of each item of a batch."""
        width = max(len(item.prompt) + len(item.chain) for item in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long, device=self.model.device)
        for row, item in enumerate(batch):
            ids[row, : len(item.prompt) + len(item.chain)] = torch.tensor(item.prompt + item.chain)
        positions = torch.arange(width, device=self.model.device).unsqueeze(0)
        if solution is None or calibration is None:
            with observed(lambda call: None):  # one at a time: exact attention holds all its scores in memory
                return [logits_of(self.model, row, positions) for row in ids.split(1)]
        folds = Folds.of(solution, calibration)
        attention = progressive(solution.plan, folds, [len(item.prompt) for item in batch])
        with observed(attention):
            logits = logits_of(self.model, ids, positions)
        return [logits.of_text(row) for row in range(len(batch))]


def own_problems() -> ModuleType:
    """The module `problems.py` of the project's reasoner."""
    sys.path.insert(0, str(OWN))
    import problems

    return problems


def number_format(recipe: str) -> AbstractContextManager[None]:
    """The context in which a recipe is calibrated, planned and scored: its authors' number format, or the runtime's."""
    return papers_format() if recipe in IN_PAPERS_FORMAT else nullcontext()


@dataclass(frozen=True)
class Score:
    """The scores of one item: how many tokens, which is the first wrong one, and sums over the tokens."""

    tokens: int
    first_error: int | None
    nll: float
    divergence: float
    agreed: int


def score(item: Item, reference: Logits, found: Logits) -> Score:
    """Compare the logits of an item's tokens, `found` against `reference`."""
    first, last = len(item.prompt) - 1, len(item.prompt) + len(item.chain) - 1
    right = torch.tensor(item.chain, device=found.hidden.device)
    wrong, nll, divergence, agreed = [], 0.0, 0.0, 0
    for part in reference.parts():
        part = slice(max(part.start, first), min(part.stop, last))
        if part.start >= part.stop:
            continue
        labels = right[part.start - first : part.stop - first]
        expected, logits = reference[part], found[part]
        wrong += [part.start - first + int(index) for index in (logits.argmax(-1) != labels).nonzero()]
        nll += F.cross_entropy(logits, labels, reduction="sum").item()
        divergence += divergences(logits, expected, torch.float32).sum().item()
        agreed += int((expected.argmax(-1) == logits.argmax(-1)).sum())
    return Score(len(item.chain), wrong[0] if wrong else None, nll, divergence, agreed)


def paired_interval(differences: list[int], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of the mean of paired differences."""
    rng, count = random.Random(0), len(differences)
    means = sorted(sum(rng.choices(differences, k=count)) / count for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def kendall_tau(pairs: Collection[tuple[float, float]]) -> float:
    """Kendall's rank correlation (tau-a) of pairs: 1 where both rank alike; nan for fewer than two pairs."""
    orders = [
        math.copysign(1, (a - c) * (b - d)) if (a - c) * (b - d) else 0
        for (a, b), (c, d) in itertools.combinations(pairs, 2)
    ]
    return sum(orders) / len(orders) if orders else math.nan


def rank_agreement(rows: Sequence[Row]) -> dict[str, float]:
    """Kendall's tau of predicted loss and measured divergence, over all plans and over those of each recipe that has
    several."""
    plans = {(row.predicted_loss, row.divergence): row.recipe for row in rows if row.budget}
    agreement = {"all": kendall_tau(plans)}
    for recipe in dict.fromkeys(plans.values()):
        own = [pair for pair, name in plans.items() if name == recipe]
        if len(own) > 1:
            agreement[recipe.strip()] = kendall_tau(own)
    return agreement


def write(rows: list[Row], folder: Path, title: str) -> None:
    with (folder / "quality.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    lines = [
        f"{title}\n",
        "| recipe | budget | true bits | exact chains | lost to the first recipe (95%) | perplexity | KL a token | "
        "greedy agreement |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.recipe} | {row.budget} | {row.true_bits:.2f} | {row.exact:.1%} | "
        f"{row.worse_by_low:+.1%} to {row.worse_by_high:+.1%} | {row.perplexity:.4f} | {row.divergence:.2e} | "
        f"{row.agreement:.2%} |"
        for row in rows
    ]
    taus = ", ".join(f"{name} {tau:.2f}" for name, tau in rank_agreement(rows).items())
    lines.append(f"\nKendall's tau of predicted loss and measured KL: {taus}")
    print(lines[-1].strip(), flush=True)
    (folder / "quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(rows, folder / "quality.svg")


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{name: value if name in ("recipe", "budget") else float(value) for name, value in line.items()})  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        ]


def plot(rows: list[Row], path: Path) -> None:
    """Draw quality against true bits, with a line for each recipe."""
    chains = any(row.exact > 0 for row in rows)
    lines: dict[str, list[tuple[float, float]]] = {}
    for recipe in dict.fromkeys(row.recipe for row in rows if row.budget):
        own = [row for row in rows if row.recipe == recipe]
        lines[recipe.strip()] = [(row.true_bits, 100 * row.exact if chains else row.divergence) for row in own]
    if chains:
        draw(lines, "exact chains, %", "linear", path)
    else:
        draw(lines, "KL to full precision, nats a token", "log", path)


def draw(lines: Mapping[str, Sequence[tuple[float, float]]], what: str, scale: str, path: Path) -> None:
    """Draw `what` was found, on an axis of this scale, against true bits: the points of each line."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xlabel("true bits a number")
    axes.set_ylabel(what)
    axes.set_yscale(scale)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
