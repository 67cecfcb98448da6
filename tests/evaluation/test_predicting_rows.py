"""infer --row: predicting as a row of evaluate does, each under a name of its own."""

import numpy as np
import pytest
import torch
from evaluating import evaluated, rows_of
from folders import own_task, reader_of, states

TRAINED = (
    "alternative layer",
    "deterministic hypernetwork",
    "ocd conditioned on x",
    "plain network on I(x)",
    "base trained for as long again",
)
CONTROLS = ("random direction", "random training deltas", "shuffled conditioning")


@pytest.fixture(scope="module")
def judged(ocd, make_run):
    """A run with a row of the task's own, and rows that took a training, evaluated."""
    settings = {"task": own_task("task:ExtraRow", row="twice as sure", samples=150)}
    folder = make_run(settings, "tasks", "train-scale")
    words = [word for name in TRAINED for word in ("--add", name)]
    return folder, evaluated(ocd, folder, *words)


def predicting(results):
    """The rows that predict."""
    return [name for name in rows_of(results) if not name.startswith("overfitted") and name not in CONTROLS]


def test_every_row_that_needs_no_label_predicts_as_it_was_evaluated(ocd, judged):
    folder, results = judged
    names = predicting(results)
    assert {"nearest k blended", "temperature-scaled base", "mean delta of class", "twice as sure", *TRAINED} <= set(names)
    for name in names:
        found = ocd.json(folder, "infer", "--row", name)
        shown = rows_of(results)[name]
        assert (found["row"], found["strength"]) == (name, shown["strength"])
        for metric in ("cross_entropy", "accuracy"):
            # Rounding: their batches differ.
            assert found["metrics"][name][metric] == pytest.approx(shown["metrics"][metric]["mean"], rel=1e-4), name
    ocd(folder, "verify")


def test_each_has_a_name_of_its_own(ocd, judged):
    folder, _ = judged
    ocd(folder, "infer", "--quiet")
    plain = folder.files()
    shown = ocd(folder, "infer", "--row", "nearest k blended")
    assert f"infer: up to date ({folder.run / 'infer' / 'test+nearest-k-blended'})" in shown.stdout.replace("\n", "")
    ocd(folder, "infer", "--strength", "auto", "--quiet")
    same = {name: data for name, data in folder.files().items() if name in plain}
    assert same == plain
    found = folder.predictions("test+strength-auto")
    assert folder.summary("infer/test+strength-auto")["strength"] == folder.read("evaluate/strength.json")["strength"]
    assert found["output"].shape == folder.predictions()["output"].shape
    assert "test+strength-auto" in ocd(folder, "status").stdout


def test_auto_is_the_row_of_the_lowest_validation_loss(ocd, judged):
    """Not one of the task's own, which knows the validation samples; the base where the gain is not beyond doubt."""
    folder, results = judged
    losses = {name: row["validation_loss"] for name, row in rows_of(results).items() if name in predicting(results)}
    del losses["twice as sure"]
    best = results["best"]
    # Strengths of 0 give the base's loss but for rounding.
    assert best == "base" or losses[best] <= min(losses.values()) * (1 + 1e-6) < losses["base"]
    found = ocd.json(folder, "infer", "--row", "auto")
    assert found["row"] == best
    mine, named = (folder.predictions(f"test+{name}") for name in ("row-auto", best.replace(" ", "-").replace("'", "")))
    assert all(np.array_equal(mine[name], named[name]) for name in mine)
    assert states(ocd, folder, "infer.row=auto")["infer"] == "done"
    assert "up to date" in ocd(folder, "infer", "--row", "auto").stdout


@pytest.mark.parametrize("name", ["nearest k blended", "mean delta of class"])
def test_an_input_alone_decides(ocd, project, name):
    """Asked about the test inputs in another order and without labels, the answers are the same in that order."""
    folder = project(rows=90, until="train-scale")
    ocd(folder, "evaluate", "--quiet")
    ocd(folder, "infer", "--row", name, "--quiet")
    slug, x = name.replace(" ", "-"), np.load(folder.root / "test.npz")["x"]
    order = np.random.default_rng(0).permutation(len(x))
    found = ocd.json(folder, "infer", "--input", folder.save("other.npz", x[order]), "--row", name)
    assert found["metrics"] is None
    mine, its = folder.predictions(f"other+{slug}"), folder.predictions(f"test+{slug}")
    assert "rho" not in mine
    assert mine["member_output"].shape == (len(x), 1, 3)
    for array in ("output", "base_output", "probability", "class"):
        np.testing.assert_allclose(mine[array], its[array][order], rtol=1e-4, atol=1e-6)


def test_a_training_sample_is_no_neighbour_of_its_own(ocd, project):
    folder = project(rows=90, until="train-scale")
    ocd(folder, "evaluate", "--quiet")
    ocd(folder, "infer", "--row", "nearest neighbour", "--split", "train", "--quiet")
    found = folder.predictions("train+nearest-neighbour")
    x, store = np.load(folder.root / "train.npz")["x"], reader_of(folder)
    rows = store.read("sample_index")
    at = {row: place for place, row in enumerate(rows.tolist())}
    deltas = store.read("delta")
    for place in range(5):
        row = int(found["sample_index"][place])
        distance = ((x[rows] - x[row]) ** 2).sum(1)
        distance[at[row]] = np.inf
        moved = np.abs(found["member_output"][place, 0] - found["base_output"][place]).max()
        assert (moved > 0) == bool(np.abs(deltas[distance.argmin()]).max() > 0)


def test_a_classifiers_answer_has_classes_and_probabilities(judged):
    folder, _ = judged
    found = folder.predictions()
    probability = torch.softmax(torch.from_numpy(found["output"]).double(), dim=1).numpy()
    assert found["class"].dtype == np.int64
    np.testing.assert_array_equal(found["class"], probability.argmax(1))
    np.testing.assert_allclose(found["probability"], probability.max(1), rtol=1e-6)


@pytest.mark.parametrize("name", [*CONTROLS, "overfitted on test"])
def test_controls_and_rows_of_labels_predict_nothing(ocd, judged, name):
    folder, _ = judged
    before, why = folder.files(), "it takes labels" if name.startswith("overfitted") else "it is there to compare with"
    shown = ocd(folder, "infer", "--row", name, code=2)
    assert f"infer.row = {name!r}: evaluate has no such row to predict with: {why}" in shown.stderr
    assert folder.files() == before


def test_a_row_that_is_not_there(ocd, judged):
    folder, _ = judged
    shown = ocd(folder, "infer", "--row", "nearest k blnded", code=2).stderr
    assert "infer.row = 'nearest k blnded': evaluate has no such row to predict with" in shown
    assert "did you mean 'nearest k blended'? There are: base, " in " ".join(shown.split())
    shown = ocd(folder, "infer", "--row", "nearest k blended", "--save-deltas", code=2)
    assert "infer.save_deltas keeps the deltas that are sampled" in shown.stderr


def test_it_takes_an_evaluation(ocd, project):
    folder = project(until="train-scale")
    shown = ocd(folder, "infer", "--row", "nearest k blended", code=3)
    assert "infer needs stages that are not done" in shown.stderr
    assert "evaluate is missing" in shown.stderr
    # Four validation samples are too few to choose by.
    ocd(folder, "evaluate", "--quiet")
    shown = ocd(folder, "infer", "--row", "auto", code=3)
    assert "infer.row = 'auto': evaluate had no validation samples to choose a row by" in shown.stderr


def test_parts_of_a_row(ocd, judged):
    folder, _ = judged
    row = ("--row", "nearest k blended")
    ocd(folder, "infer", *row, "--quiet")
    whole = folder.predictions("test+nearest-k-blended")
    small = ("--set", "infer.batch_size=8", "--force", "--quiet")
    ocd(folder, "infer", *row, *small)
    ocd(folder, "infer", *row, "--part", "1/2", *small)
    # Asked again it has nothing left to do.
    ocd(folder, "infer", *row, "--part", "1/2", *small[:2])
    ocd(folder, "infer", *row, "--part", "2/2", *small)
    found = folder.predictions("test+nearest-k-blended")
    for name, values in whole.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


def test_an_answer_is_redone_where_evaluate_has_other_neighbours(ocd, project):
    # So few samples would favour none.
    folder, row = project({"evaluate": {"strengths": [1.0]}}, rows=90, until="train-scale"), ("--row", "nearest k blended")
    ocd(folder, "evaluate", "--quiet")
    ocd(folder, "infer", *row, "--quiet")
    before = folder.predictions("test+nearest-k-blended")
    fewer = ("--set", "evaluate.neighbours=2")
    ocd(folder, "evaluate", *fewer, "--quiet")
    assert "infer is redone: evaluate.neighbours was 5, is now 2" in ocd(folder, "infer", *row, *fewer).stderr
    assert not np.array_equal(before["output"], folder.predictions("test+nearest-k-blended")["output"])


def test_run_evaluates_where_a_row_is_asked_for(ocd, project):
    folder = project({"infer": {"row": "nearest neighbour"}}, rows=90)
    stages = ocd.json(folder, "run")["stages"]
    assert list(stages)[-2:] == ["evaluate", "infer"]
    assert stages["infer"]["row"] == "nearest neighbour"
    assert "evaluate" not in ocd.json(folder, "run", "--set", "infer.row=ocd ensemble")["stages"]
