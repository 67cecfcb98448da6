"""Tuning that begins when the held-out loss on deltas has all but stopped falling."""

import pytest
from folders import put_all
from planted import HELPING
from trainings import Counter, run_of

from stages.foundation.errors import ComputeError
from stages.training.tuning_start import TuningStart

# At steps 5, 10, … 40; within two evaluations by 50 % or more, 20 %, 9 %; then it no longer matters.
FALLING = (1.0, 0.99, 0.5, 0.49, 0.4, 0.445, 0.1, 0.01)


def trained(folder, counter, **plan):
    """A training with these losses on deltas: what tuning was told, and how it ended."""
    told = []
    found = run_of(
        folder, counter, score=lambda: FALLING[counter.step // 5 - 1], start=TuningStart(told.append), max_steps=40, **plan
    )
    return told, found


def test_it_begins_where_the_loss_has_all_but_stopped_falling(tmp_path):
    told, run = trained(tmp_path, Counter())
    assert (run.run().tuned_from, told) == (30, [30])


@pytest.mark.parametrize("lost", [8, 23, 29, 31, 38])
def test_what_was_stopped_goes_on_with_the_same_beginning(tmp_path, lost):
    """Before it, at the evaluation itself, and after it."""
    with pytest.raises(ComputeError):
        trained(tmp_path, Counter({lost: float("nan")}))[1].run()
    told, run = trained(tmp_path, Counter())
    assert (run.run().tuned_from, told) == (30, [30])


def test_patience_waits_for_it(tmp_path):
    """Evaluations before it do not count as those without a gain."""
    told, run = trained(tmp_path, Counter(), patience=1)
    assert (run.run().steps, told) == (40, [30])


def test_it_may_never_begin(tmp_path):
    counter, told = Counter(), []
    run = run_of(tmp_path, counter, score=lambda: 1 / counter.step, start=TuningStart(told.append))
    assert (run.run().tuned_from, told) == (None, [])


# Evaluated often: the loss on deltas falls by less than a tenth in so few steps long before it ends.
AUTO = {"tune_after": "auto", "tune_samples": 16, "evaluate_steps": 5, "max_steps": 200, "conditioning_noise": 0.05}


def planted(ocd, project):
    folder = project(HELPING, "collect", code="planted")
    ocd(folder, "train-scale")
    return folder


def test_a_training_begins_tuning_by_itself(ocd, project):
    folder = planted(ocd, project)
    words = put_all("train-diffusion", AUTO)
    shown = ocd(folder, "train-diffusion", *words).stdout
    found = ocd.json(folder, "train-diffusion", *words)
    assert 0 < found["tuned_from"] < 200
    assert found["tuned_from"] % 5 == 0
    assert "tuned by that loss, deltas need not be near the true ones\n" in shown
    before, after = (
        [row["score"] for row in folder.read("train-diffusion/metrics.jsonl") if (row["step"] <= found["tuned_from"]) == early]
        for early in (True, False)
    )
    assert min(after) < min(before)


def test_one_that_goes_on_is_the_same_as_a_whole_one(ocd, project):
    """Stopped before tuning begins, and after it."""
    folder = planted(ocd, project)
    words, weights = put_all("train-diffusion", AUTO), folder.run / "train-diffusion" / "denoiser.safetensors"
    ocd(folder, "train-diffusion", *words)
    whole, began = weights.read_bytes(), ocd.json(folder, "train-diffusion", *words)["tuned_from"]
    for steps in (began - 7, began + 9):
        ocd(folder, "train-diffusion", "--force", *words, "--set", f"train-diffusion.max_steps={steps}")
        assert weights.read_bytes() != whole
        ocd(folder, "train-diffusion", *words)
        assert weights.read_bytes() == whole


def test_one_that_has_not_begun_says_so(ocd, project):
    folder = planted(ocd, project)
    done = ocd(folder, "train-diffusion", *put_all("train-diffusion", AUTO | {"max_steps": 9}))
    assert "nothing is tuned: the training ended before tuning began\n" in done.stdout
    assert (
        "nothing is tuned: by step 9 it had not begun; go on with a larger --set train-diffusion.max_steps=N, or name the "
        "step with --set train-diffusion.tune_after=N" in done.stderr
    )


def test_one_that_would_begin_at_its_last_step_has_not_begun(ocd, project):
    folder = planted(ocd, project)
    words = put_all("train-diffusion", AUTO)
    ocd(folder, "train-diffusion", *words)
    last = ocd.json(folder, "train-diffusion", *words)["tuned_from"]
    ocd(folder, "train-diffusion", "--force", *words, *put_all("train-diffusion", {"max_steps": last}))
    assert ocd.json(folder, "train-diffusion", *words, *put_all("train-diffusion", {"max_steps": last}))["tuned_from"] is None


def test_naming_the_step_that_it_came_to_changes_nothing(ocd, project):
    """Nor when it goes on so, and back."""
    folder = planted(ocd, project)
    words, weights = put_all("train-diffusion", AUTO), folder.run / "train-diffusion" / "denoiser.safetensors"
    further = put_all("train-diffusion", {"max_steps": 220})
    ocd(folder, "train-diffusion", *words, *further)
    whole = weights.read_bytes()
    ocd(folder, "train-diffusion", "--force", *words)
    named = [*words, *put_all("train-diffusion", {"tune_after": ocd.json(folder, "train-diffusion", *words)["tuned_from"]})]
    assert "up to date" in ocd(folder, "train-diffusion", *named).stdout
    ocd(folder, "train-diffusion", *named, *further)
    assert weights.read_bytes() == whole
    for again in (named, words):
        assert "up to date" in ocd(folder, "train-diffusion", *again, *further).stdout


def test_an_objective_is_one_word(ocd, project):
    """It stands for two settings, which may still be named, and are what makes a denoiser stale."""
    folder = project(HELPING, "collect", code="planted")
    few = put_all("train-diffusion", {"max_steps": 40, "evaluate_steps": 10})
    by_task = [*few, *put_all("train-diffusion", {"objective": "task"})]
    ocd(folder, "run", "--until", "train-diffusion", *by_task)
    begun = folder.read("train-diffusion/manifest.json")["identity"]["settings"]
    assert (begun["train-diffusion.neighbours"], begun["train-diffusion.tune_after"]) == (5, "auto")
    assert begun["train-diffusion.tune_samples"] == 64
    same = [*few, *put_all("train-diffusion", {"neighbours": 5, "tune_after": "auto", "conditioning_noise": 0.3})]
    assert "up to date" in ocd(folder, "train-diffusion", *same).stdout
    fewer = [*by_task, *put_all("train-diffusion", {"neighbours": 3})]
    assert "stale: train-diffusion.neighbours was 5, is now 3\n" in ocd(folder, "train-diffusion", *fewer, code=3).stderr
    paper = "train-diffusion.neighbours was 5, is now 0; train-diffusion.tune_after was 'auto', is now 0\n"
    assert paper in ocd(folder, "train-diffusion", *few, code=3).stderr
