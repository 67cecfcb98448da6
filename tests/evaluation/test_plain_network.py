"""The row of a plain network on the conditioning: what it learns, that it is trained once, and where there is none."""

import numpy as np
import pytest
from folders import own_task
from planted import HELPING

from stages.evaluation.rows import PLAIN

ADD = ("--set", "evaluate.longer_base=false", "--add", PLAIN)


@pytest.fixture(scope="module")
def evaluated(ocd, make_run):
    folder = make_run(HELPING, "planted", "train-scale")
    return folder, ocd.json(folder, "evaluate", *ADD)


def test_it_learns_what_the_conditioning_tells(evaluated):
    """The residual is a known function of what the layer sees, so that a network finds it, and the verdict says so."""
    _, results = evaluated
    rows = {one["name"]: one["metrics"]["mse"]["mean"] for one in results["rows"]}
    assert rows[PLAIN] < 0.2 * rows["base"]
    assert f"{PLAIN} (" in results["verdict"]
    assert PLAIN in results["comparisons"]


def test_it_is_trained_once(ocd, evaluated):
    folder, results = evaluated
    (branch,) = (folder.run / "branches").glob("plain-network-*")
    before = {path: path.stat().st_mtime_ns for path in branch.rglob("*.safetensors")}
    again = ocd.json(folder, "evaluate", *ADD, "--set", "evaluate.neighbours=3")
    assert {path: path.stat().st_mtime_ns for path in branch.rglob("*.safetensors")} == before
    losses = [next(one for one in found["rows"] if one["name"] == PLAIN)["metrics"] for found in (results, again)]
    assert losses[0] == losses[1]
    # Of another denoiser there is another one, of as many steps.
    ocd(folder, "train-diffusion", "--force", "--set", "train-diffusion.max_steps=50")
    ocd(folder, "evaluate", *ADD, "--set", "train-diffusion.max_steps=50")
    (other,) = (folder.run / "branches").glob("plain-network-*")
    assert other != branch
    assert '"step": 50,' in (other / "metrics.jsonl").read_text().splitlines()[-1]


def test_it_predicts(ocd, make_run):
    folder = make_run(HELPING, "planted", "train-scale")
    results = ocd.json(folder, "evaluate", *ADD)
    answer = ocd.json(folder, "infer", "--row", PLAIN, "--set", "evaluate.longer_base=false")
    rows = {one["name"]: one["metrics"]["mse"]["mean"] for one in results["rows"]}
    assert answer["metrics"][PLAIN]["mse"] == pytest.approx(rows[PLAIN], rel=1e-5)
    (name,) = (path.name for path in (folder.run / "infer").glob("test+plain-network*"))
    found = folder.predictions(name)
    assert not np.array_equal(found["output"], found["base_output"])


def test_where_samples_come_in_parts_there_is_none(ocd, project):
    folder = project({"task": own_task("task:Paired")}, code="tasks", rows=90, until="train-scale")
    results = ocd.json(folder, "evaluate", *ADD)
    left_out = {one["name"]: one["reason"] for one in results["left_out"]}
    assert left_out[PLAIN] == "the task shows samples in parts, of which a network of the conditioning alone knows nothing"
