"""Collect the programs from answers that lm-evaluation-harness has logged, for LiveCodeBench's custom evaluator.

python examples/evaluation/programs.py samples_livecodebench.jsonl > programs.json
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROGRAM = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)


def programs(samples: Iterable[str]) -> list[dict[str, Any]]:
    """The last program in each answer of the JSON lines `samples`; an empty text where an answer has none."""
    found = []
    for sample in map(json.loads, samples):
        answers = [answer for answers in sample["resps"] for answer in answers]
        code = [(PROGRAM.findall(answer) or [""])[-1] for answer in answers]
        found.append({"question_id": sample["doc"]["question_id"], "code_list": code})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="JSON lines that lm_eval --log_samples wrote")
    with parser.parse_args().samples.open(encoding="utf-8") as file:
        print(json.dumps(programs(file)))
