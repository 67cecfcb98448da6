"""The loop of a training: when it stops, which checkpoints it keeps, and what it goes on from."""

import json

import pytest
from refusals import refusal
from trainings import Counter, run_of

from stages.foundation.errors import ComputeError


@pytest.mark.parametrize(("until", "steps"), [(0, 15), (12, 20), (20, 30)])
def test_patience_waits_no_sooner_than_it_is_told(tmp_path, until, steps):
    ended = run_of(tmp_path, Counter(), max_steps=60, patience=2, patient_until=until).run()
    assert (ended.steps, ended.stopped_early) == (steps, True)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    kept = []

    class Watched(Counter):
        def start(self):
            kept.append(sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.json")))
            return super().start()

    run_of(tmp_path, Watched()).run()
    assert kept[-1] == ["00000012", "00000018"]
    assert max(map(len, kept)) == 2
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.json")] == ["00000020"]


def test_there_is_a_checkpoint_every_few_minutes(tmp_path):
    counter = Counter(losses={9: float("nan")}, delay=0.02)
    with pytest.raises(ComputeError):
        run_of(tmp_path, counter, checkpoint_steps=10**6, checkpoint_minutes=0.03 / 60).run()
    # Two steps take longer than three hundredths of a second.
    assert max(int(path.stem) for path in (tmp_path / "checkpoints").glob("*.json")) >= 6


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (float("nan"), "the loss of step 9 is nan (blamed); the checkpoint of step 6 is kept"),
        (float("inf"), "the loss of step 9 is inf (blamed); the checkpoint of step 6 is kept"),
        (123.0, "the loss of step 9 is 123, more than 100: it has exploded (blamed); the checkpoint of step 6 is kept"),
    ],
)
def test_a_lost_loss_stops(tmp_path, loss, says):
    run = run_of(tmp_path, Counter({9: loss}), lambda step: " (blamed)", largest_loss=100.0, advice="try this")
    assert refusal(ComputeError, run.run) == (says, "try this")
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.json")] == ["00000006"]
    assert run_of(tmp_path, Counter()).run().steps == 20


def test_tensors_without_their_record_go(tmp_path):
    """What a kill between the two leaves."""
    counter = Counter(losses={19: float("nan")})
    with pytest.raises(ComputeError):
        run_of(tmp_path, counter).run()
    (tmp_path / "checkpoints" / "00000014.safetensors").write_bytes(b"half")
    run_of(tmp_path, Counter()).run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("0*")) == ["00000020.json", "00000020.safetensors"]


def test_a_damaged_snapshot_falls_back(tmp_path):
    counter = Counter(losses={19: float("nan")})
    with pytest.raises(ComputeError):
        run_of(tmp_path, counter).run()
    best = tmp_path / "checkpoints" / "best-00000005.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    assert run_of(tmp_path, Counter()).run().snapshot.read_bytes()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 5


@pytest.mark.parametrize("stop", [30, 45])
def test_going_on_after_an_evaluation_off_the_grid_equals_never_stopping(tmp_path, stop):
    """The best score lies where only the shorter training looked; the longer one must not know of it."""
    done = []
    for name, ends in (("whole", [80]), ("continued", [stop, 80])):
        (tmp_path / name).mkdir()
        for end in ends:
            counter = Counter({step: 1.0 / step for step in range(1, 81)})
            plan = {"max_steps": end, "evaluate_steps": 20, "checkpoint_steps": 7}
            trained = run_of(tmp_path / name, counter, score=lambda counter=counter: 1.0 + abs(counter.step - 37), **plan).run()
        done.append((trained.best, trained.steps, (tmp_path / name / "metrics.jsonl").read_bytes()))
    assert done[0] == done[1]
