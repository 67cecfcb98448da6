"""The command line: help, shared options, where settings come from, what is printed where."""

import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from expectations import STAGES
from folders import arrays
from typer.testing import CliRunner

from ocd_cli.app import app
from ocd_cli.progress import CURVE_WIDTH, Curve

COMMANDS = ("init", *STAGES, "run", "status", "verify")
SHARED = ("--config", "--run", "--set", "--device", "--seed", "--force", "--dry-run", "--json", "--quiet")


# Help


@pytest.fixture
def help_of(monkeypatch):
    # Wide enough that no option's name is cut.
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args):
        result = CliRunner().invoke(app, [*args, "--help"], prog_name="ocd")
        assert result.exit_code == 0
        return result.stdout

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_help(help_of, command):
    text = help_of(command)
    assert f"Example: ocd {command}" in text
    for option in SHARED:
        assert re.search(rf"{option}\b", text)
    assert command in help_of()
    assert "--install-completion" in help_of()
    assert "--show-completion" in help_of()


def test_the_module_is_the_command():
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    calls = [[sys.executable, "-m", "ocd_cli"], [sys.executable, "-c", "from ocd_cli.app import main; main()"]]
    texts = [subprocess.run([*call, "--help"], env=environment, capture_output=True, check=True).stdout for call in calls]
    assert texts[0] == texts[1]
    assert b"Usage: ocd" in texts[0]


@pytest.mark.parametrize(
    "args",
    [
        ["colect"],
        ["collect", "--nonsense"],
        ["infer", "--split", "other"],
        ["infer", "--ensemble=0"],
        ["infer", "--sample-steps=0"],
        ["collect", "--device", "tpu"],
        ["collect", "x"],
    ],
)
def test_unknown_words(args):
    result = CliRunner().invoke(app, args, prog_name="ocd")
    assert result.exit_code == 2
    assert args[-1].partition("=")[0] in result.stderr
    assert result.stdout == ""


def test_completion():
    """What a shell asks for is answered with the commands."""
    environment = os.environ | {"_OCD_COMPLETE": "complete_bash", "COMP_WORDS": "ocd tr", "COMP_CWORD": "1"}
    code = "from ocd_cli.app import main; main()"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["train-base", "train-diffusion", "train-scale"]


# Progress


def test_the_curve_is_one_line_of_averages():
    curve = Curve()
    assert str(curve) == ""
    for value in np.geomspace(1.0, 1e-3, 1000):
        curve.add(float(value))
    shown = str(curve)
    assert CURVE_WIDTH / 2 <= len(shown) <= CURVE_WIDTH
    assert (shown[0], shown[-1]) == ("█", "▁")
    assert list(shown) == sorted(shown, reverse=True)
    flat = Curve()
    for _ in range(3):
        flat.add(-2.0)
    flat.add(float("nan"))
    assert str(flat) == "▁▁▁"


# --dry-run


def test_dry_run_of_a_fresh_project(project, ocd):
    folder = project()
    result = ocd(folder, "train-base", "--dry-run")
    assert "2 epochs on 36 samples" in result.stdout
    assert "bytes" in result.stdout or "KiB" in result.stdout
    found = ocd.json(folder, "run", "--dry-run")
    assert list(found["stages"]) == list(STAGES)
    assert not folder.run.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_dry_run_says_how_much_and_writes_nothing(finished, ocd, stage):
    before = finished.files()
    found = ocd.json(finished, stage, "--force", "--dry-run")
    assert found["stage"] == stage
    assert found["bytes"] > 0
    assert found["what"]
    numbers = {
        "train-base": "36 samples",
        "select-layer": "50 draws",
        "collect": "36 samples",
        "train-diffusion": "40 steps",
        "train-scale": "40 steps",
        "infer": "24 inputs",
    }
    assert numbers[stage] in found["what"]
    assert numbers[stage] in ocd(finished, stage, "--force", "--dry-run").stdout
    assert finished.files() == before


def test_dry_run_tells_about_enough_bytes(finished, ocd):
    """What is foreseen for the store is what its arrays take, uncompressed."""
    found = ocd.json(finished, "collect", "--force", "--dry-run")
    store = finished.manifest("collect")["store"]
    sizes = {"float32": 4, "int32": 4, "int64": 8, "bool": 1}
    assert found["bytes"] == sum(math.prod(entry["shape"]) * sizes[entry["dtype"]] for entry in store["arrays"].values())


# --json and --quiet


@pytest.mark.parametrize("stage", STAGES)
def test_second_run_is_up_to_date(project, finished, ocd, stage):
    first = ocd.json(finished, stage, "--force")
    result = ocd(finished, stage, "--json")
    assert json.loads(result.stdout) == first
    assert f"{stage}: up to date" in result.stderr
    text = ocd(finished, stage)
    assert f"{stage}: up to date" in text.stdout
    assert str(finished.run) in text.stdout


def test_second_run_of_everything(project, ocd):
    folder = project()
    first = ocd.json(folder, "run")
    assert list(first["stages"]) == list(STAGES)
    before = folder.files()
    assert ocd.json(folder, "run") == first
    assert folder.files() == before
    assert ocd(folder, "run").stdout.count("up to date") == 6


def test_json_of_init(ocd, tmp_path):
    assert ocd.json(None, "init", "--config", tmp_path)["written"] is True


def test_results_on_stdout_the_rest_on_stderr(project, ocd):
    folder = project()
    result = ocd(folder, "run")
    assert "settings:" in result.stderr
    assert "settings:" not in result.stdout
    assert "ocd ensemble of 2" in result.stdout
    assert "ensemble" not in result.stderr


def test_quiet(project, ocd):
    folder = project()
    for words in (["run"], ["run", "--json"], ["status"], ["verify"]):
        assert ocd(folder, *words, "--quiet").stderr == ""
    # An answer that is redone has a note, too.
    assert ocd(folder, "infer", "-q", "--strength", 0.5).stderr == ""


def test_each_stage_keeps_a_log(finished):
    for stage in STAGES:
        folder = finished.run / ("infer/test" if stage == "infer" else stage)
        assert f"start {stage}" in (folder / "log.txt").read_text()


# run


def test_run_from_and_until_are_inclusive(project, ocd):
    folder = project()
    assert list(ocd.json(folder, "run", "--until", "collect")["stages"]) == list(STAGES[:3])
    assert not (folder.run / "train-diffusion").exists()
    found = ocd.json(folder, "run", "--from", "collect", "--until", "train-scale")["stages"]
    assert list(found) == list(STAGES[2:5])
    assert list(ocd.json(folder, "run", "--from", "infer")["stages"]) == ["infer"]


def test_run_stops_at_what_is_stale(finished, ocd):
    result = ocd(finished, "run", "--set", "collect.lr=0.02", code=3)
    assert "collect.lr was 0.01, is now 0.02" in result.stderr
    assert "ocd collect --set collect.lr=0.02 --force" in result.stderr


# infer


def test_infer_options(finished, ocd):
    args = ("--ensemble", 3, "--sample-steps", 4, "--sampler", "ddpm", "--strength", 0.5, "--save-deltas")
    found = ocd.json(finished, "infer", *args)
    assert found["ensemble"] == 3
    manifest = finished.manifest("infer/test")
    settings = manifest["identity"]["settings"]
    assert settings["infer.sample_steps"] == 4
    assert settings["infer.sampler"] == "ddpm"
    assert settings["infer.strength"] == 0.5
    assert (finished.run / "infer" / "test" / "deltas.zarr").is_dir()


@pytest.mark.parametrize(
    ("file", "name"), [("test.npz", "input-test"), ("new pictures.npz", "new-pictures"), ("a.b.npz", "a-b")]
)
def test_infer_names_its_answer(finished, ocd, file, name):
    (finished.root / "inputs").mkdir()
    path = finished.save(f"inputs/{file}", arrays(5, 2)[0])
    result = ocd.json(finished, "infer", "--input", path)
    assert result["query"] == name
    assert result["metrics"] is None
    assert (finished.run / "infer" / name / "predictions.npz").exists()
