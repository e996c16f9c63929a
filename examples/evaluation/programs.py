"""The programs in answers that lm-evaluation-harness has logged, as LiveCodeBench's custom evaluator reads them.

python examples/evaluation/programs.py samples_livecodebench_....jsonl > programs.json
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

PROGRAM = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)


def programs(samples: Iterable[str]) -> list[dict[str, Any]]:
    """The last program of each answer in JSON `samples`, an empty one where an answer has none."""
    found = []
    for sample in map(json.loads, samples):
        answers = [answer for answers in sample["resps"] for answer in answers]
        code = [(PROGRAM.findall(answer) or [""])[-1] for answer in answers]
        found.append({"question_id": sample["doc"]["question_id"], "code_list": code})
    return found


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        print(json.dumps(programs(file)))
