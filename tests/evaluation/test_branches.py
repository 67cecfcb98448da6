"""The trainings that some rows of evaluate take: branches that share what they can, seeds, and going on after a stop."""

import numpy as np
import pytest
from evaluating import COSTLY, evaluated, rows_of
from folders import states
from processes import before, interrupt

from stages import evaluate
from stages.evaluation import requested_rows


@pytest.fixture
def roomy(ocd, project):
    """A run with enough validation samples to fit strengths on."""
    folder = project(rows=120, until="train-scale")
    return folder


def test_costly_rows_come_from_branches_that_share_what_they_can(ocd, roomy):
    # The run's own denoiser knows of no neighbours, and is not tuned.
    asked = [name for name in COSTLY if name != "ocd by the paper's objective"]
    words = [word for name in asked for word in ("--add", name)]
    results = evaluated(ocd, roomy, *words)
    rows = rows_of(results)
    assert set(asked) <= set(rows)
    assert {entry["name"] for entry in results["left_out"]}.isdisjoint(asked)
    branches = roomy.run / "branches"
    shared = {
        "alternative-layer": ["train-base"],
        "deterministic-hypernetwork": ["train-base", "select-layer", "collect"],
        "conditioned-on-x": ["train-base", "select-layer"],
        "base-trained-longer": [],
        **{f"deep-ensemble-{seed}": [] for seed in range(2, 6)},
    }
    assert {path.name for path in branches.iterdir() if not path.name.startswith("plain-network-")} == set(shared)
    for name, stages in shared.items():
        for stage in stages:
            same = [(run / stage / "manifest.json").read_bytes() for run in (roomy.run, branches / name)]
            assert same[0] == same[1], (name, stage)
    assert rows["deterministic hypernetwork"]["members"] == 1
    layers = [roomy.read(f"{run}select-layer/layer.json")["layer"] for run in ("", "branches/alternative-layer/")]
    assert layers[0] != layers[1]
    ocd(roomy, "verify")
    # Nothing of a branch is made twice.
    times = {path: path.stat().st_mtime_ns for path in branches.rglob("*.safetensors")}
    ocd(roomy, "evaluate", "--quiet", "--force", *words)
    assert {path: path.stat().st_mtime_ns for path in branches.rglob("*.safetensors")} == times


@pytest.mark.parametrize(("base", "rest", "there"), [(50.0, 0.0, True), (60.0, 15.0, False), (900.0, 1000.0, True)])
def test_the_longer_base_is_there_where_it_took_less_time(ocd, finished, monkeypatch, base, rest, there):
    """Less than a minute, or than OCD's four stages took together, which is no chance of a small run's; and is a rival. Asked
    not to be there, it is not."""
    seconds = {"train-base": base} | dict.fromkeys(("select-layer", "collect", "train-diffusion", "train-scale"), rest / 4)
    monkeypatch.setattr(requested_rows, "stage_seconds", lambda context: dict(seconds))
    longer = "base trained for as long again"
    results = evaluated(ocd, finished, "--set", "evaluate.longer_base=true")
    left_out = {entry["name"]: entry["reason"] for entry in results["left_out"]}
    assert (longer in rows_of(results)) == (longer in results["comparisons"]) == there
    why = "the base's training took 60 s, OCD's stages 15 s; ask with --add 'base trained for as long again'"
    assert left_out.get(longer) == (None if there else why)
    without = evaluated(ocd, finished, "--set", "evaluate.longer_base=false")
    left_out = {entry["name"]: entry["reason"] for entry in without["left_out"]}
    assert left_out[longer] == "evaluate.longer_base is false; ask with --add 'base trained for as long again'"


def test_a_branch_follows_its_run(ocd, finished):
    words = ("--add", "deterministic hypernetwork", "--quiet")
    ocd(finished, "evaluate", *words)
    branch = "branches/deterministic-hypernetwork/train-diffusion"
    was = finished.manifest(branch)["identity"]["inputs"]["deltas"]
    changed = ("--set", "collect.lr=0.02")
    ocd(finished, "run", "--force", "--from", "collect", "--until", "train-scale", "--quiet", *changed)
    ocd(finished, "evaluate", *words, *changed)
    now = finished.manifest(branch)["identity"]["inputs"]["deltas"]
    assert now != was
    assert now == finished.manifest("collect")["content"]


def test_seeds_are_whole_trainings(ocd, finished):
    longer = "base trained for as long again"
    results = evaluated(ocd, finished, "--seeds", "3", "--add", longer, "--add", "deterministic hypernetwork")
    found = results["seeds"]
    assert found["seeds"] == [1, 2, 3]
    assert found["verdicts"][0] == results["verdict"]
    others = [finished.read(f"branches/seed-{seed}/evaluate/results.json") for seed in (2, 3)]
    # The verdict of each seed looks at the longer base; what else was asked for stands in the first table alone.
    names = {row["name"] for row in found["rows"]}
    assert longer in names
    assert "deterministic hypernetwork" not in names
    for row in found["rows"]:
        values = [rows_of(result)[row["name"]]["metrics"]["cross_entropy"]["mean"] for result in (results, *others)]
        entry = row["metrics"]["cross_entropy"]
        assert entry["values"] == values
        assert entry["mean"] == pytest.approx(np.mean(values))
        assert entry["standard_deviation"] == pytest.approx(np.std(values, ddof=1))
    assert len({row["metrics"]["cross_entropy"]["mean"] for result in (results, *others) for row in result["rows"][:1]}) == 3


def test_interrupted_it_begins_again_and_keeps_its_branches(ocd, finished):
    words = ("--add", "deterministic hypernetwork")
    with before(evaluate, "compare", interrupt):
        shown = ocd(finished, "evaluate", *words, code=4)
    assert "evaluate was interrupted" in shown.stderr
    assert "run the same command again" in shown.stderr
    assert not (finished.run / "evaluate").exists()
    branch = finished.run / "branches" / "deterministic-hypernetwork" / "train-diffusion" / "denoiser.safetensors"
    made = branch.stat().st_mtime_ns
    assert states(ocd, finished, 'evaluate.rows=["deterministic hypernetwork"]')["evaluate"] == "partial"
    results = evaluated(ocd, finished, *words)
    assert branch.stat().st_mtime_ns == made
    assert "deterministic hypernetwork" in rows_of(results)
    ocd(finished, "verify")
