"""The command line: what it accepts, what it says, what it prints."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from pmkvq_compiler.cli import Request, _parser, main, parse
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.recipes import RECIPES
from tests.folders import model_folder, tree

FLAGS = [
    "--json",
    *(f"--{field.name.replace('_', '-')}" for field in fields(CompileOptions)[1:] if field.name != "block"),
]

SMALL = ["--max-len", "256", "--window", "64", "--sink", "4", "--calib-samples", "2", "--calib-len", "96"]


def test_help_of_the_installed_command_teaches() -> None:
    command = Path(sys.executable).with_name("pmkvq-compile")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert [flag for flag in FLAGS if flag not in done.stdout] == []
    for example in ("512MiB", "25%", "3.2bits", "pmkvq-compile demo --budget 22MiB --max-len 4096"):
        assert example in done.stdout


def test_defaults_are_those_of_the_options() -> None:
    assert parse(["demo", "--budget", "1GiB"]).options == CompileOptions("demo", Path("demo-pmkvq"), budget="1GiB")


@pytest.mark.parametrize(
    ("model", "folder"),
    [("org/Model-1B", "Model-1B-pmkvq"), ("./here/model", "model-pmkvq"), ("x/m.Q4.gguf", "m.Q4-pmkvq")],
)
def test_output_is_named_after_the_model(model: str, folder: str) -> None:
    assert parse([model, "--budget", "25%"]).options.output == Path(folder)


def test_every_flag_reaches_the_options() -> None:
    command = """m --budget 3.2bits --max-len 512 --batch-size 3 -o out --force --recipe pm-kvq --bits 2,8 --sink 0
    --window 96 --calib text.txt --calib-samples 5 --calib-len 128 --effective-len 4096 --device cuda:1
    --dtype bfloat16 --aot sm_90,sm_80 --onnx --dump-passes dump --json"""
    expected = CompileOptions(
        model="m",
        output=Path("out"),
        budget="3.2bits",
        max_len=512,
        batch_size=3,
        recipe="pm-kvq",
        bits=(8, 2),
        sink=0,
        window=96,
        calib="text.txt",
        calib_samples=5,
        calib_len=128,
        effective_len=4096,
        device="cuda:1",
        dtype="bfloat16",
        aot=("sm_80", "sm_90"),
        onnx=True,
        dump_passes=Path("dump"),
        force=True,
    )
    assert parse(shlex.split(command)) == Request(expected, (), as_json=True)
    dry = shlex.split(command.replace("--dump-passes dump", "--dry-run"))
    assert parse(dry) == Request(replace(expected, dump_passes=None, dry_run=True), (), as_json=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL"),
        (["demo"], "--budget is missing"),
        (["demo", "--recipe", "none", "--budget", "1GiB"], "takes no --budget"),
        (["demo", "--budget", "lots"], "budget 'lots'"),
        (["demo", "--budget=-25%"], "budget '-25%'"),
        (["demo", "--budget", "0MiB"], "budget '0MiB'"),
        (["demo", "--budget", "1GiB", "--max-len", "0"], "'0' is not a whole number of at least 1"),
        (["demo", "--budget", "1GiB", "--max-len", "4k"], "'4k' is not a whole number"),
        (["demo", "--budget", "1GiB", "--batch-size", "-2"], "'-2' is not a whole number of at least 1"),
        (["demo", "--budget", "1GiB", "--calib-samples", "0"], "--calib-samples"),
        (["demo", "--budget", "1GiB", "--calib-len", "1.5"], "--calib-len"),
        (["demo", "--budget", "1GiB", "--sink", "-1"], "'-1' is not a whole number of at least 0"),
        (["demo", "--budget", "1GiB", "--window", "0"], "--window"),
        (["demo", "--budget", "1GiB", "--bits", "3"], "'3' is not a list"),
        (["demo", "--budget", "1GiB", "--bits", "4,4"], "'4,4' is not a list"),
        (["demo", "--budget", "1GiB", "--bits", ""], "'' is not a list"),
        (["demo", "--budget", "1GiB", "--recipe", "magic"], "'magic'"),
        (["demo", "--budget", "1GiB", "--dtype", "int8"], "'int8'"),
        (["demo", "--budget", "1GiB", "--bit", "4"], "--bit"),
        (["demo", "--budget", "1GiB", "--aot", "sm_75"], "'sm_75' is not a list of different targets out of sm_80"),
        (["demo", "--budget", "1GiB", "--aot", "sm_80,sm_80"], "'sm_80,sm_80' is not a list"),
        (["demo", "--budget", "1GiB", "--dump-passes", "x", "--dry-run"], "--dump-passes writes files"),
        (["demo", "--budgets", "3bits,4bits"], "add --dry-run"),
        (["demo", "--budgets", "3bits,lots", "--dry-run"], "budget 'lots'"),
        (["demo", "--budgets", "3bits", "--budget", "1GiB", "--dry-run"], "takes the place of --budget"),
        (["demo", "--budgets", "3bits", "--recipe", "none", "--dry-run"], "no plans to compare"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert len([line for line in shown.err.splitlines() if line.strip()]) == 1
    assert shown.out == ""
    assert tree(tmp_path) == {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("cli") / "tiny-llama")


def test_summary_has_a_row_a_layer_and_names_the_artifact(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "artifact"
    dump = ["--dump-passes", str(tmp_path / "dump")]
    assert main([str(model), "--recipe", "pm-kvq", "--budget", "90%", *SMALL, "-o", str(out), *dump]) == 0
    assert len(list((tmp_path / "dump").iterdir())) == 12, "the graph as captured and after each of eleven passes"
    shown = capsys.readouterr()
    header, *lines = shown.out.splitlines()
    assert " ".join(header.split()) == "layer K bits V bits K axis window bytes loss K map V map"
    assert [line.split()[0] for line in lines[:3]] == ["0", "1", "2"]
    assert all(line.split()[-2:] == ["scale", "none"] for line in lines[:3])
    assert f"artifact             {out}" in lines
    assert (out / "report.html").is_file()
    assert "calibrate" in shown.err.lower(), "progress goes to stderr"


def test_dry_run_as_json_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(model), "--budget", "70%", *SMALL, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] is None
    assert [row["layer"] for row in result["rows"]] == [0, 1, 2]
    assert result["arena_bytes"] <= result["budget"]
    assert sum(row["arena_bytes"] for row in result["rows"]) == result["arena_bytes"]
    assert tree(tmp_path) == {}


def test_budgets_are_compared_and_nothing_is_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    explore = [str(model), *SMALL, "--dry-run", "--budgets", "95%,5%,70%"]
    assert main([*explore, "--json"]) == 0
    found = {one["budget"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["5%"]["predicted_loss"] is None
    assert 0 < found["95%"]["predicted_loss"] < found["70%"]["predicted_loss"]
    assert main([str(model), "--budget", "70%", *SMALL, "--dry-run", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert {name: alone[name] for name in found["70%"] if name != "budget"} == {
        name: value for name, value in found["70%"].items() if name != "budget"
    }
    assert main(explore) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [line.split()[0] for line in rows] == ["95%", "5%", "70%"]
    assert rows[1].strip().endswith("no plan fits")
    bars = {line.split()[0]: line.count("\u2588") for line in rows}
    assert 0 < bars["95%"] < bars["70%"]
    assert tree(tmp_path) == {}


def test_budgets_none_of_which_holds_a_plan_end_in_one_sentence(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model), *SMALL, "--dry-run", "--budgets", "2%,5%"]) == 1
    assert "smallest feasible budget" in capsys.readouterr().err


def test_a_recipe_is_told_with_its_summary_in_the_order_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "halves", replace(RECIPES["uniform"], summary="50% of everything"))
    told = " ".join(_parser().format_help().split())
    assert " ".join(f"{name} {recipe.summary}" for name, recipe in RECIPES.items()) in told
    assert parse(["demo", "--recipe", "halves", "--budget", "25%"]).options.recipe == "halves"
