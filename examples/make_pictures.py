"""Draw the README's pictures: an artifact's plan, and its cache while a text goes through it.

python examples/make_pictures.py out/demo examples/pictures
"""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer

from pmkvq_compiler import runtime
from pmkvq_compiler.charts import Sample, filling_chart, plan_chart
from pmkvq_compiler.runtime.plan import original_bytes

PIECE = 16


def main(artifact: Path, folder: Path) -> None:
    report = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
    style = files("pmkvq_compiler.templates").joinpath("charts.css.j2").read_text(encoding="utf-8")
    pictures = {
        "plan.svg": plan_chart(report["rows"]),
        "filling.svg": filling_chart(measured(artifact), report["budget"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        head, body = picture.split("\n", 1)
        standalone = f"{head}\n<style>{style}</style>\n<rect width='100%' height='100%' fill='var(--paper)'/>\n{body}\n"
        (folder / name).write_text(standalone, encoding="utf-8")


def measured(artifact: Path) -> list[Sample]:
    """What the cache held after every piece of a text of `max_len` tokens."""
    model = runtime.load(artifact)
    plan, cache = model.plan, model.new_cache()
    text = files("pmkvq_compiler").joinpath("data/heldout.txt").read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(artifact)(text, return_tensors="pt").input_ids[:, : plan.max_len]
    trace: list[Sample] = [{"tokens": 0, "used": 0, "original": 0, "bits": [list(bits) for bits in cache.bits]}]
    for piece in tokens.split(PIECE, dim=1):
        model(piece, cache)
        length = cache.length[0]
        trace.append(
            {
                "tokens": length,
                "used": cache.bytes_used,
                "original": sum(original_bytes(layer, length) for layer in plan.layers),
                "bits": [list(bits) for bits in cache.bits],
            }
        )
    return trace


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
