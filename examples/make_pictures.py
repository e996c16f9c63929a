"""Draw the pictures of the guides: an artifact's plan, its cache while it reads a text, and its report in Chromium.

python examples/make_pictures.py out/demo examples/pictures
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer

from pmkvq_compiler import runtime
from pmkvq_compiler.report.charts import Sample, filling_chart, plan_chart
from pmkvq_compiler.report.contents import ReportRow
from pmkvq_compiler.runtime.plan import original_bytes

PIECE = 16
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DARK, LIGHT = 0, 1
"""The browser's numbers of the colour schemes."""


def main(artifact: Path, folder: Path) -> None:
    report = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
    style = files("pmkvq_compiler.templates").joinpath("charts.css.j2").read_text(encoding="utf-8")
    pictures = {
        "plan.svg": plan_chart([ReportRow(**row) for row in report["rows"]]),
        "filling.svg": filling_chart(measured(artifact), report["budget"]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        head, body = picture.split("\n", 1)
        standalone = f"{head}\n<style>{style}</style>\n<rect width='100%' height='100%' fill='var(--paper)'/>\n{body}\n"
        (folder / name).write_text(standalone, encoding="utf-8")
    for name, scheme in (("report.png", LIGHT), ("report-dark.png", DARK)):
        print(photograph(artifact / "report.html", folder / name, scheme), end="")


def photograph(page: Path, picture: Path, scheme: int, width: int = 1060, height: int = 1400) -> str:
    """Write a PNG of the upper part of a page as a browser shows it; returns what the page wrote to its console.

    Raises `RuntimeError` where none of `BROWSERS` is installed.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RuntimeError(f"none of {', '.join(BROWSERS)} is installed; install one")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    shown = [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},{height}"]
    output = [f"--screenshot={picture.absolute()}", page.absolute().as_uri()]
    done = subprocess.run([*command, *shown, *output], capture_output=True, text=True, check=True, timeout=120)
    return "".join(line for line in done.stderr.splitlines(keepends=True) if ":CONSOLE" in line)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder that pmkvq-compile wrote")
    parser.add_argument("pictures", type=Path, help="folder to write them into")
    arguments = parser.parse_args()
    main(arguments.artifact, arguments.pictures)
