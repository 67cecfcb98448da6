"""The row of a plain network on the conditioning: what it learns, that it is trained once, and where there is none."""

import re

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


TUNED = {"max_steps": 300, "tune_after": 100, "evaluate_steps": 50, "batch_size": 64}


def verdict_with_it(ocd, make_run, task, collect, base):
    """What is said of a denoiser that is tuned, beside a plain network."""
    tuned = HELPING["train-diffusion"] | TUNED
    settings = HELPING | {"task": task, "train-base": base, "collect": collect, "train-diffusion": tuned}
    folder = make_run(settings, "planted", "collect")
    ocd(folder, "run", "--until", "train-diffusion")
    return ocd.json(folder, "evaluate", *ADD)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_ties_where_a_sample_is_one_row(ocd, make_run, seed):
    """As much of the label is chance as both can find: a change of weights says no more than a change of the output."""
    task = own_task("mytask:Seeded", seed=seed, known=1.0, noise=1.0)
    collect, base = {"optimizer": "sgd", "lr": 0.1, "steps": 3}, {"epochs": 12, "lr": 0.03, "batch_size": 40}
    found = verdict_with_it(ocd, make_run, task, collect, base)
    assert found["outcome"] == "helps"
    assert re.search(rf"; {re.escape(PLAIN)} \([0-9.]+\) cannot be told from the ensemble$", found["verdict"])


def test_it_cannot_do_as_much_where_a_sample_is_many_rows(ocd, make_run):
    """One delta serves all rows of a sample, of which the conditioning, pooled over them, shows none."""
    collect, base = {"optimizer": "sgd", "lr": 0.3, "steps": 5}, {"epochs": 20, "lr": 1e-2, "batch_size": 40}
    found = verdict_with_it(ocd, make_run, own_task("mytask:Several"), collect, base)
    assert found["outcome"] == "helps"
    assert re.search(rf"; {re.escape(PLAIN)} \([0-9.]+\) is worse than the ensemble$", found["verdict"])
    rows = {one["name"]: one["metrics"]["mse"]["mean"] for one in found["rows"]}
    assert rows["ocd ensemble"] < 0.1 * rows[PLAIN]


def test_where_samples_come_in_parts_there_is_none(ocd, project):
    folder = project({"task": own_task("task:Paired")}, code="tasks", rows=90, until="train-scale")
    results = ocd.json(folder, "evaluate", *ADD)
    left_out = {one["name"]: one["reason"] for one in results["left_out"]}
    assert left_out[PLAIN] == "the task shows samples in parts, of which a network of the conditioning alone knows nothing"
