"""Several overfits of one sample, each with other parts of it: the store, who reads it, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import PROJECTS, blocks_of, own_task, put, reader_of, results, states, store
from processes import redone
from trainings import rows_of

from stages.evaluate import Evaluate
from stages.evaluation.neighbours import find_neighbours
from stages.evaluation.stored_deltas import StoredDeltas
from stages.evaluation.subject import Batch, EvaluatedSamples
from stages.foundation.seeds import generator
from stages.infer import open_run
from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project
from stages.tasks.modules import load_object
from stages.training.batches import NOTHING, WHOLE

SAMPLES, REPEATS = 18, 3
SETTINGS = {
    "task": own_task("mytask:Points"),
    "select-layer": {"layer": "0.weight", "draws": 0},
    "collect": {"lr": 0.02, "steps": 2, "repeats": REPEATS, "block_samples": 9, "batch_size": 9},
    "evaluate": {"resamples": 100, "strengths": [0.0, 1.0]},
}
ONCE = put("collect.repeats=1", "collect.block_samples=3", "collect.batch_size=3")


def known_task():
    return load_object(PROJECTS / "points", "mytask:Points", "task.class")()


@pytest.fixture(scope="module")
def repeated_run(make_run):
    """A project with everything done; not to be changed."""
    return make_run(SETTINGS, "points")


@pytest.fixture
def repeated(repeated_run, tmp_path):
    """A copy of it."""
    return repeated_run.copy(tmp_path / "repeated")


@pytest.fixture
def ready(repeated):
    """The same, about to collect."""
    return repeated.without("collect", "train-diffusion", "train-scale", "infer")


@pytest.fixture(scope="module")
def deltas(repeated_run):
    return StoredDeltas(reader_of(repeated_run))


@pytest.fixture
def evaluation(repeated_run):
    """The stage, about to work, four samples at a time."""
    return Evaluate(RunContext(load_project(repeated_run.config, overrides=["run.device=cpu", "evaluate.batch_size=4"])))


# The store


def test_rows_follow_one_another_by_sample(repeated_run):
    arrays = store(repeated_run)
    numbers = arrays["sample_index"].reshape(SAMPLES, REPEATS)
    assert (numbers == numbers[:, :1]).all()
    assert sorted(numbers[:, 0].tolist()) == list(range(SAMPLES)) != numbers[:, 0].tolist()
    each = arrays["delta"].reshape(SAMPLES, REPEATS, -1)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(each[:, one] - each[:, other]).max(1) > 1e-4).all()
    for name in ("layer_input", "activation", "base_output", "base_loss"):
        fields = arrays[name].reshape(SAMPLES, REPEATS, -1)
        np.testing.assert_allclose(fields, np.repeat(fields[:, :1], REPEATS, axis=1), rtol=1e-5, atol=1e-6)
    summary = repeated_run.summary("collect")
    assert (summary["samples"], summary["repeats"], summary["blocks"]) == (SAMPLES, REPEATS, 6)
    # Three rows are held out, of one sample.
    for stage in ("train-diffusion", "train-scale"):
        assert repeated_run.summary(stage)["held_out_samples"] == 1
        assert repeated_run.summary(stage)["samples"] == (SAMPLES - 1) * REPEATS


@pytest.mark.parametrize("row", [0, 1, 5, 30])
def test_a_row_is_what_a_plain_loop_gives(repeated_run, row):
    """Adam on one sample and the layer alone; the first repeat draws what there is to draw without repeats."""
    arrays, task = store(repeated_run), known_task()
    model = open_run(repeated_run.config, overrides=["run.device=cpu"]).model
    data, sample, repeat = task.train(), int(arrays["sample_index"][row]), row % REPEATS
    weight = model.get_parameter("0.weight").clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for step in range(2):
        seed = (1, "collect", sample, step, *([repeat] if repeat else []))
        x, y = task.view(data.x[sample], data.y[sample], generator(*seed))
        output = torch.func.functional_call(model, {"0.weight": weight}, (x.unsqueeze(0),))
        optimizer.zero_grad()
        (output[0] - y).square().mean().backward()
        optimizer.step()
    wanted = weight.detach() - model.get_parameter("0.weight")
    np.testing.assert_allclose(arrays["delta"][row], wanted.numpy(), atol=1e-5)


def test_the_first_of_them_is_what_there_is_without_repeats(ocd, ready):
    """One sample at a time, for in a batch a sample's place decides how its sums are rounded."""
    alone = ("--set", "collect.batch_size=1")
    ocd(ready, "collect", "--quiet", *ONCE, *alone)
    found = store(ready)
    assert "repeats" not in ready.summary("collect")
    ocd(ready, "collect", "--quiet", "--force", *alone)
    wanted = store(ready)
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted[name][::REPEATS], err_msg=name)


def test_more_samples_keep_the_blocks_there_are(ocd, ready, repeated_run):
    ocd(ready, "collect", "--quiet", "--set", "collect.samples=12")
    assert store(ready)["delta"].shape[0] == 12 * REPEATS
    assert redone(ocd, ready, "collect", "--quiet") == [4, 5]
    assert results(ready, "collect") == results(repeated_run, "collect")
    assert states(ocd, ready)["collect"] == "done"


def test_a_block_that_ends_within_a_sample(ocd, ready, repeated_run):
    """Blocks count rows: samples need not be whole in them."""
    uneven = ("--set", "collect.block_samples=7", "--set", "collect.batch_size=4")
    ocd(ready, "collect", "--quiet", "--set", "collect.samples=5", *uneven)
    ocd(ready, "collect", "--quiet", *uneven)
    found, wanted = store(ready), store(repeated_run)
    np.testing.assert_array_equal(found["sample_index"], wanted["sample_index"])
    np.testing.assert_allclose(found["delta"], wanted["delta"], atol=1e-6)


def test_two_parts_make_the_whole(ocd, ready, repeated_run):
    for part in ("2/2", "1/2"):
        ocd(ready, "collect", "--quiet", "--part", part)
    assert results(ready, "collect") == results(repeated_run, "collect")


def test_what_the_commands_say(ocd, ready):
    plan = ocd.json(ready, "collect", "--dry-run")
    assert plan["what"] == "overfit 0.weight (6, 3) on 18 samples, 3 times each, 6 blocks"
    assert (plan["samples"], plan["blocks"]) == (SAMPLES, 6)
    assert "deltas: 54 of 0.weight (6×3), 3 of each sample, by substitution\n" in ocd(ready, "collect").stdout
    assert "deltas: 18 of 0.weight (6×3), by substitution\n" in ocd(ready, "collect", "--force", *ONCE).stdout


def test_samples_left_out_are_named_once(ocd, ready, monkeypatch, repeated_run):
    monkeypatch.setenv("SPOILED", str(float(known_task().train().x[11, 0, 0])))
    summary = ocd.json(ready, "collect", "--set", "collect.skip_bad=true")
    assert summary["skipped"] == [11]
    arrays, whole = store(ready), store(repeated_run)
    bad = arrays["sample_index"] == 11
    assert bad.sum() == REPEATS
    assert arrays["degenerate"][bad].all()
    assert summary["overfit_loss"] == pytest.approx(whole["overfit_loss"][~bad].mean(), rel=1e-5)


# Refusals and states


def test_other_repeats_are_another_store(ocd, repeated):
    found = states(ocd, repeated, "collect.repeats=2")
    assert {name: state for name, state in found.items() if state != "done"} == dict.fromkeys(
        ("collect", "train-diffusion", "train-scale", "infer"), "stale"
    )
    shown = ocd(repeated, "collect", "--quiet", "--set", "collect.repeats=2", code=3).stderr
    assert "collect.repeats was 3, is now 2" in shown


# Who reads it


def test_the_delta_of_a_sample_is_the_mean_of_its_rows(deltas, repeated_run):
    arrays = store(repeated_run)
    assert deltas.first_rows.tolist() == list(range(0, SAMPLES * REPEATS, REPEATS))
    places = torch.tensor([4, 0, 17, 4])
    wanted = arrays["delta"].reshape(SAMPLES, REPEATS, 6, 3).mean(1)[places.numpy()]
    np.testing.assert_allclose(deltas.of_samples(places).numpy(), wanted, atol=1e-7)
    np.testing.assert_allclose(deltas.mean.numpy(), arrays["delta"].mean(0), atol=1e-6)


def test_without_repeats_it_is_the_row(ocd, ready):
    ocd(ready, "collect", "--quiet", *ONCE)
    found = StoredDeltas(reader_of(ready))
    assert found.first_rows.tolist() == list(range(SAMPLES))
    assert torch.equal(found.of_samples(torch.tensor([3, 1])), found.take(torch.tensor([3, 1])))


def test_a_delta_is_not_compared_with_others_of_its_sample(deltas, repeated_run):
    arrays = store(repeated_run)
    flat = torch.from_numpy(arrays["delta"]).flatten(1).double()
    cosines = torch.nn.functional.normalize(flat, dim=1) @ torch.nn.functional.normalize(flat, dim=1).T
    numbers = torch.from_numpy(arrays["sample_index"])
    rows = torch.tensor([0, 1, 7, 53])
    found = deltas.nearest_cosines(deltas.take(rows), rows)
    others = numbers[rows].unsqueeze(1) != numbers
    wanted = torch.where(others, cosines[rows], -1.0).max(1).values
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    assert (deltas.nearest_cosines(deltas.take(rows), torch.full((4,), -1)) > 1 - 1e-5).all()


@pytest.mark.parametrize("with_deltas", [True, False])
def test_trainings_hold_out_whole_samples(repeated_run, with_deltas):
    rows = rows_of(repeated_run, deltas=WHOLE if with_deltas else NOTHING, held_out=0.2)
    numbers = torch.from_numpy(store(repeated_run)["sample_index"])
    held = rows.held_out.numbers
    assert len(held) == round(0.2 * SAMPLES) * REPEATS
    assert len(numbers[held].unique()) == round(0.2 * SAMPLES)
    stream = rows.batches(0)
    drawn = torch.cat([next(stream).numbers for _ in range(20)])
    assert set(drawn.tolist()) == set(range(len(numbers))) - set(held.tolist())
    assert torch.equal(rows_of(repeated_run, held_out=0.2, batch_size=4, memory=0.0).held_out.numbers, held)


def test_neighbours_are_samples_not_rows(evaluation):
    split, rows = evaluation.context.splits["all"], evaluation.training.first_rows
    first = evaluation.training.sample_index[rows]
    evaluated = EvaluatedSamples(evaluation.context.test_split, torch.arange(7))
    found, missing = find_neighbours(evaluation.subject, evaluation.training, evaluated, split, 5, 4, print)
    assert missing == {}
    evaluated = replace(evaluated, neighbours=found)
    known, asked = split.inputs(first).flatten(1), evaluation.context.test_split.inputs(range(7)).flatten(1)
    wanted = torch.cdist(asked.double(), known.double()).sort(dim=1)
    batch = Batch(evaluation.subject, evaluated, torch.arange(7))
    for kind in ("x", "layer_input"):
        found = batch.neighbours(kind).row
        assert found.shape == (7, 5)
        assert all(len(set(row)) == 5 for row in found.tolist())
        # The first layer sees x itself.
        assert torch.equal(found, wanted.indices[:, :5])
        torch.testing.assert_close(batch.neighbours(kind).distance.double(), wanted.values[:, :5])
        torch.testing.assert_close(
            batch.neighbour_deltas(kind).flatten(0, 1), evaluation.training.of_samples(found.flatten()), rtol=0, atol=0
        )


def test_training_samples_are_not_their_own_neighbours(evaluation):
    """Where training samples are evaluated, none of their rows counts."""
    training = evaluation.training
    evaluated = EvaluatedSamples(evaluation.context.splits["all"], torch.tensor([3, 0, 5]))
    numbers = training.sample_index[training.first_rows]
    whole = evaluation.context.splits["all"]
    found, missing = find_neighbours(evaluation.subject, training, evaluated, whole, 17, 2, print)
    assert missing == {}
    for kind in ("x", "layer_input"):
        for position in (3, 0, 5):
            row = found[kind].row[position]
            assert sorted(numbers[row].tolist()) == [number for number in range(SAMPLES) if number != position]


def test_evaluate_blends_neighbours(ocd, repeated):
    found = {row["name"] for row in ocd.json(repeated, "evaluate")["rows"]}
    assert {"nearest neighbour", "nearest k blended", "nearest k blended in layer input", "random training deltas"} <= found
    assert "ocd validated strength" in found


def test_everything_is_whole(ocd, repeated_run):
    assert set(states(ocd, repeated_run).values()) == {"done"}
    ocd(repeated_run, "verify")
    assert len(blocks_of(repeated_run, "collect")) == 6
    log = (repeated_run.run / "collect" / "log.txt").read_text()
    assert re.search(r"54/54 samples", log)
