"""Pictures of what `ocd infer` answered: strips whose panes are the arrays, and what happens where there can be none."""

import itertools
import sys

import numpy as np
import pytest
import reference
import torch
from folders import flip, own_task, results
from processes import before, interrupt, redone
from strips import drawn, panes

from stages.evaluation import pictures
from stages.evaluation.pictures import enlarged, picture_of, strip
from stages.foundation.errors import TaskError
from stages.infer import open_run
from stages.tasks.losses import mse
from stages.tasks.modules import load_object
from stages.tasks.protocol import Task

WEIGHT, LR, STEPS = "2.weight", 0.03, 3


@pytest.fixture(scope="module")
def painted_run(make_run):
    """A project that draws, with everything done; not to be changed."""
    settings = {
        "task": own_task("mytask:Painting"),
        "select-layer": {"layer": WEIGHT, "draws": 0},
        "collect": {"lr": LR, "steps": STEPS},
        "infer": {"pictures": 5, "batch_size": 2},
    }
    return make_run(settings, "painting")


@pytest.fixture
def painted(painted_run, tmp_path):
    """A copy of it."""
    return painted_run.copy(tmp_path / "painted")


@pytest.fixture
def ready(painted):
    """The same, about to infer."""
    return painted.without("infer")


def names(folder, answer="test"):
    return sorted(path.name for path in (folder.run / "infer" / answer / "pictures").glob("*"))


# What is drawn


def test_panes_are_base_overfitted_ensemble_and_truth(painted_run):
    assert names(painted_run) == [f"{row:06d}.png" for row in range(5)]
    assert painted_run.summary("infer/test")["pictures"] == 5
    found, model = painted_run.predictions(), open_run(painted_run.config).model
    data = load_object(painted_run.root, "mytask:Painting", "task.class")().test()
    fitted = reference.overfit_loop(
        model, WEIGHT, lambda output, y: mse(output["colour"], y), data.x[:5], data.y[:5], "adam", LR, STEPS
    )
    assert (found["base_output.colour"] < 0).any()
    for row in range(5):
        base, overfitted, ours, truth = panes(painted_run, row, 6)
        np.testing.assert_array_equal(base, drawn(found["base_output.colour"][row]))
        np.testing.assert_array_equal(ours, drawn(found["output.colour"][row]))
        np.testing.assert_array_equal(truth, drawn(data.y[row].numpy()))
        with torch.no_grad():
            moved = torch.func.functional_call(
                model, {WEIGHT: model.get_parameter(WEIGHT) + fitted.delta[row]}, data.x[row : row + 1]
            )
        wanted = drawn(moved["colour"][0].numpy()).astype(int)
        # A last digit may round otherwise.
        assert np.abs(overfitted.astype(int) - wanted).max() <= 1
        assert np.abs(base.astype(int) - wanted).max() > 5


def test_without_labels_there_are_two_panes_named_after_the_row(painted, ocd):
    rng = np.random.default_rng(0)
    bare = painted.save("bare.npz", rng.normal(size=(3, 4)).astype("float32"))
    ocd(painted, "infer", "--input", bare)
    assert len(names(painted, "bare")) == 3
    found = painted.predictions("bare")
    np.testing.assert_array_equal(
        panes(painted, 2, 6, "bare"), drawn(np.stack([found["base_output.colour"][2], found["output.colour"][2]]))
    )
    ocd(painted, "infer", "--split", "validation", "--set", "infer.pictures=2")
    rows = painted.predictions("validation")["sample_index"][:2]
    assert names(painted, "validation") == [f"{row:06d}.png" for row in rows] != ["000000.png", "000001.png"]
    assert len(panes(painted, rows[1], 6, "validation")) == 4


@pytest.mark.parametrize(("asked", "count"), [("grey", 4), ("no truth", 3)])
def test_grey_pictures_and_outputs_without_one(ready, ocd, monkeypatch, asked, count):
    monkeypatch.setenv("PICTURE", asked)
    ocd(ready, "infer", "--set", "infer.pictures=1")
    found = panes(ready, 0, 6)
    assert len(found) == count
    if asked == "grey":
        mean = ready.predictions()["base_output.colour"][0].mean(2, keepdims=True).repeat(3, 2)
        assert np.abs(found[0].astype(int) - drawn(mean)).max() <= 1


def test_what_the_command_says(ready, ocd):
    where = ready.run / "infer" / "test" / "pictures"
    result = ocd(ready, "infer")
    assert f"pictures of 5 inputs: {where}\n" in result.stdout
    assert "infer: 5 of 5 pictures" in result.stderr
    assert f"pictures of 5 inputs: {where}\n" in ocd(ready, "infer").stdout
    assert ocd.json(ready, "infer")["pictures"] == 5


def test_strips_of_unlike_pictures():
    unlike = [("low", np.zeros((2, 300, 3), np.uint8)), ("tall", np.zeros((900, 3, 3), np.uint8))]
    assert strip(unlike).startswith(b"\x89PNG")
    assert [enlarged(picture).shape for _, picture in unlike] == [(2, 300, 3), (1800, 6, 3)]
    assert enlarged(np.zeros((6, 6, 3), np.uint8)).shape == (204, 204, 3)


# Kept, continued, damaged


def test_drawing_that_was_interrupted(ready, painted_run, ocd):
    made = itertools.count()
    with before(pictures, "strip", lambda _: next(made) < 2 or interrupt()):
        ocd(ready, "infer", code=4)
    assert not (ready.run / "infer" / "test").exists()
    assert redone(ocd, ready, "infer") == []
    assert results(ready, "infer/test") == results(painted_run, "infer/test")
    ocd(ready, "verify")


def test_the_last_of_the_parts_draws(ready, painted_run, ocd):
    for part in ("2/2", "1/2"):
        ocd(ready, "infer", "--part", part)
    assert results(ready, "infer/test") == results(painted_run, "infer/test")


def test_a_larger_ensemble_is_drawn_again(painted, painted_run, ocd):
    ocd(painted, "infer", "--ensemble", 4)
    for row in range(5):
        before, found = panes(painted_run, row, 6), panes(painted, row, 6)
        np.testing.assert_array_equal(found[2], drawn(painted.predictions()["output.colour"][row]))
        np.testing.assert_array_equal(found[[0, 1, 3]], before[[0, 1, 3]])
    assert not np.array_equal(found[2], before[2])


def test_a_changed_picture_is_noticed(painted, ocd):
    flip(painted.run / "infer" / "test" / "pictures" / "000003.png", keep_time=True)
    assert "content changed: test/pictures/000003.png" in ocd(painted, "verify", code=3).stdout
    ocd(painted, "infer")
    ocd(painted, "verify")


# None


def test_no_pictures_where_none_are_asked_for(painted, ocd, monkeypatch):
    monkeypatch.setenv("PICTURE", "sums")
    found = ocd.json(painted, "infer", "--set", "infer.pictures=0")
    assert found["pictures"] == 0
    assert not (painted.run / "infer" / "test" / "pictures").exists()


def test_no_pictures_of_a_task_without_any(finished_run):
    assert not (finished_run.run / "infer" / "test" / "pictures").exists()
    assert "pictures" not in finished_run.summary("infer/test")


def test_without_pillow_the_answer_comes_all_the_same(ready, ocd, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        result = ocd(ready, "infer")
    hint = 'no pictures: Pillow is missing; to have them: pip install "torch-ocd[examples]", then ocd infer --force'
    assert hint in result.stderr
    assert not (ready.run / "infer" / "test" / "pictures").exists()
    assert ready.summary("infer/test")["pictures"] == 0
    ocd(ready, "infer", "--force")
    assert len(names(ready)) == 5


def test_a_bad_picture_is_refused_before_anything_is_written(ready, ocd, monkeypatch):
    monkeypatch.setenv("PICTURE", "sums")
    assert ocd(ready, "infer", "--quiet", code=2).stderr == (
        "error: picture() returned shape (6,), expected (H, W, 3) or (H, W)\n"
        "  let it return a tensor (H, W, 3) or (H, W) of floats in [0, 1], or None for no picture\n"
    )
    assert not (ready.run / "infer").exists()


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\), expected \(H, W, 3\) or \(H, W\)"),
        (torch.zeros(0, 4), r"shape \(0, 4\)"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"uint8 of shape \(4, 4\), expected floats"),
        (torch.full((2, 2), torch.nan), r"shape \(2, 2\) with 4 NaN"),
        ([[0.0]], "list, expected a tensor"),
    ],
)
def test_bad_pictures(picture, says):
    task = Task()
    task.picture = lambda x, output: picture
    with pytest.raises(TaskError, match=rf"picture\(\) returned {says}"):
        picture_of(task, torch.zeros(1), torch.zeros(1))


def test_numbers_that_an_output_does_not_have_are_black():
    task = Task()
    task.picture = lambda x, output: output
    output = torch.tensor([[torch.nan, torch.inf], [-torch.inf, 0.5]])
    assert picture_of(task, torch.zeros(1), output)[:, :, 0].tolist() == [[0, 255], [0, 128]]
