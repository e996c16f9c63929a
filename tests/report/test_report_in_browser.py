"""The report in a real browser: dark and light, nothing on its console, nothing from the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from examples.make_pictures import BROWSERS, DARK, LIGHT, photograph
from pmkvq_compiler.report.page import write_report
from tests.report.test_report import sample_plan, sample_report

pytestmark = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    write_report(sample_report(sample_plan()), tmp_path)
    return tmp_path / "report.html"


@pytest.mark.parametrize(("scheme", "paper", "two_bits"), [(LIGHT, "#ffffff", "#cfe1f9"), (DARK, "#14171b", "#1f3d6e")])
def test_report_is_shown_in_the_readers_colours(page: Path, scheme: int, paper: str, two_bits: str) -> None:
    picture = page.with_suffix(".png")
    assert photograph(page, picture, scheme) == "", "the page writes nothing to its console"
    pixels = imread(picture)[..., :3]
    assert pixels.shape == (1400, 1060, 3)
    assert pixels[0, 0] == pytest.approx(to_rgb(paper), abs=1e-3)
    cells = (abs(pixels - to_rgb(two_bits)) < 1e-3).all(-1)
    assert cells.sum() > 2 * 200 * 20, "K and V of the layer at 2 bits are drawn in the colour of 2 bits"


def test_report_may_load_nothing(page: Path) -> None:
    text = page.read_text()
    page.write_text(text.replace("<main>", '<main><img src="http://localhost:9/picture.png">'))
    assert "violates the following Content Security Policy" in photograph(page, page.with_suffix(".png"), LIGHT)
