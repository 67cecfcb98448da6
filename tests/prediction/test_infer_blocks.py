"""`ocd infer` block by block: killed, continued, divided into parts, grown."""

import shutil
import signal

import numpy as np
import pytest
import zarr
from folders import blocks_of, flip, results, status
from processes import INTERRUPTED, counted_blocks, redone, stopped_at, wait_until

from stages.prediction.personalised import PersonalisedModel
from stages.store.predictions import PredictionBlocks

BLOCKS = 12
WIP = "infer/test.wip"


@pytest.fixture(scope="module")
def answered_run(make_run):
    """A project of the slow model with everything done, the answer in twelve blocks, with its deltas; not to be changed."""
    return make_run({"select-layer": {"layer": "2.weight"}, "infer": {"batch_size": 2, "save_deltas": True}}, "slow")


@pytest.fixture
def answered(answered_run, tmp_path):
    """A copy of it."""
    return answered_run.copy(tmp_path / "answered")


@pytest.fixture
def ready(answered):
    """The same, about to infer."""
    return answered.without("infer")


@pytest.fixture
def whole(answered_run, ocd):
    """Asserts that an answer is the unbroken run's, byte for byte, with nothing beside it."""

    def check(folder):
        assert results(folder, "infer/test") == results(answered_run, "infer/test")
        assert {path.name for path in (folder.run / "infer").iterdir()} == {"test"}
        assert folder.summary("infer/test") == answered_run.summary("infer/test")
        ocd(folder, "verify")

    return check


def stop_infer(ocd, folder, *words):
    """Four blocks are there."""
    with stopped_at(4, kind=PredictionBlocks):
        ocd(folder, "infer", *words, code=4)


# Killed and continued


@pytest.mark.parametrize("kept", [3, 9])
def test_killed_and_continued(ready, start, ocd, whole, kept):
    dead = start(ready, "infer", delay=0.01)
    wait_until(lambda: len(blocks_of(ready, WIP)) >= kept)
    dead.die()
    there = {path.name: path.stat().st_mtime_ns for path in blocks_of(ready, WIP)}
    assert kept <= len(there) < BLOCKS
    entry = status(ocd, ready)["infer"]
    assert entry["state"] == "partial"
    assert entry["progress"] == {"done": len(there), "total": BLOCKS, "unit": "blocks"}
    with counted_blocks(PredictionBlocks) as written:
        result = ocd(ready, "infer", "--set", "infer.batch_size=5")
    # The batch it was begun with is kept, so that the bits are.
    assert sorted(written) == list(range(len(there), BLOCKS))
    assert f"continues: {2 * len(there)} of 24 inputs are there" in result.stderr
    whole(ready)


def test_terminated(ready, start, ocd, whole):
    process = start(ready, "infer", "--quiet", delay=0.02)
    wait_until(lambda: blocks_of(ready, WIP))
    process.kill(signal.SIGTERM)
    assert process.wait(4).stderr == INTERRUPTED.format("infer")
    assert blocks_of(ready, WIP)
    ocd(ready, "infer")
    whole(ready)


def test_killed_while_it_is_put_together(ready, ocd, whole, monkeypatch):
    def stop(self, path):
        path.with_name("predictions.npz.1-2.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PredictionBlocks, "put_together", stop)
        ocd(ready, "infer", code=4)
    assert redone(ocd, ready, "infer") == []
    whole(ready)


def test_killed_between_manifest_and_exchange(answered, ocd, whole):
    wip = answered.run / "infer" / "test.wip"
    (answered.run / "infer" / "test").rename(wip)
    (wip / "blocks").mkdir()
    (wip / "blocks" / "000000.json").write_text("{}")
    assert redone(ocd, answered, "infer") == []
    whole(answered)


@pytest.mark.parametrize("harm", [flip, lambda path, **_: path.unlink()], ids=["changed", "gone"])
@pytest.mark.parametrize("name", ["blocks/000001.npz", "deltas.zarr/delta/c.1.0.0.0"])
def test_a_damaged_block_is_redone(ready, ocd, whole, name, harm):
    stop_infer(ocd, ready)
    harm(ready.run / WIP / name, keep_time=True)
    problems = ocd.json(ready, "verify", code=3)["stages"][WIP]["problems"]
    assert any("000001" in text for text in problems)
    assert redone(ocd, ready, "infer") == [1, *range(4, BLOCKS)]
    whole(ready)


def test_other_settings_discard_what_was_begun(ready, ocd):
    stop_infer(ocd, ready)
    assert redone(ocd, ready, "infer", "--strength", 0.5) == list(range(BLOCKS))


# Parts


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_one_part_after_another(ready, ocd, whole, order):
    for place, number in enumerate(order, 1):
        result = ocd(ready, "infer", "--part", f"{number}/3")
        if place < 3:
            says = f"infer: part {number}/3 is done; {4 * place} of 12 blocks are there, the others are other parts' work\n"
            assert result.stdout == says
            assert not (ready.run / "infer" / "test").exists()
    whole(ready)
    assert "infer: up to date" in ocd(ready, "infer", "--part", "2/3").stdout


def test_all_parts_at_once(ready, start, ocd, whole):
    parts = [start(ready, "infer", "--part", f"{number}/3", delay=0.05) for number in (1, 2, 3)]
    named = [f" (part {number}/3)" for number in (1, 2, 3)]
    wait_until(lambda: [text[-11:] for text in status(ocd, ready)["infer"].get("in_use_by", [])] == named)
    for part in parts:
        part.wait()
    whole(ready)


def test_parts_take_up_what_a_plain_command_left(ready, ocd, whole):
    stop_infer(ocd, ready)
    assert redone(ocd, ready, "infer", "--part", "1/2") == [4, 6, 8, 10]
    assert redone(ocd, ready, "infer", "--part", "2/2") == [5, 7, 9, 11]
    whole(ready)


def test_parts_redo_a_stale_answer(answered, ocd):
    for number in (2, 1):
        ocd(answered, "infer", "--part", f"{number}/2", "--strength", 0)
    found = answered.predictions()
    np.testing.assert_array_equal(found["member_output"][:, 0], found["base_output"])


def test_what_a_running_part_keeps_off(ready, start, ocd, whole):
    # Slow enough to be at work until the last of the others has been turned away, also on a busy machine.
    part = start(ready, "infer", "--part", "1/2", delay=0.5)
    wait_until(lambda: (ready.run / WIP / "blocks").exists())
    for words, says in (
        (["--part", "1/2"], "infer/test --part 1/2 is in use by process {pid} on "),
        (["--part", "1/3"], "infer/test --part 1/3: others have divided the work in another way: process {pid} on "),
        (
            ["--part", "2/2", "--strength", "0.5"],
            "infer/test was begun with other settings, and is in use by process {pid} on ",
        ),
        ([], "infer/test is in use by process {pid} on "),
    ):
        result = ocd(ready, "infer", "--quiet", *words, code=4)
        assert says.format(pid=part.pid) in result.stderr
    # Another answer is no business of it.
    ocd(ready, "infer", "--split", "validation")
    part.wait()
    shutil.rmtree(ready.run / "infer" / "validation")
    ocd(ready, "infer", "--part", "2/2")
    whole(ready)


# Larger ensembles

BARE = ("--set", "infer.save_deltas=false")


@pytest.fixture
def drawn(monkeypatch):
    """Which members were sampled, a batch each."""
    predict, found = PersonalisedModel.predict, []

    def counted(self, x, ensemble=None, *, first_member=0, **named):
        found.append(range(first_member, first_member + ensemble))
        return predict(self, x, ensemble, first_member=first_member, **named)

    monkeypatch.setattr(PersonalisedModel, "predict", counted)
    return found


@pytest.mark.parametrize("words", [[[]], [["--part", "2/2"], ["--part", "1/2"]]], ids=["whole", "parts"])
def test_a_larger_ensemble(ready, ocd, drawn, words):
    ocd(ready, "infer", *BARE)
    before = ready.predictions()
    drawn.clear()
    for more in words:
        ocd(ready, "infer", *BARE, "--ensemble", 5, *more)
    assert set(drawn) == {range(2, 5)}
    grown = ready.predictions()
    np.testing.assert_array_equal(grown["member_output"][:, :2], before["member_output"])
    assert {path.name for path in (ready.run / "infer" / "test").iterdir()} == {"log.txt", "manifest.json", "predictions.npz"}
    ocd(ready, "infer", *BARE, "--ensemble", 5, "--force")
    for name, value in ready.predictions().items():
        np.testing.assert_allclose(grown[name], value, rtol=1e-5, atol=1e-6)


def test_a_larger_ensemble_that_was_interrupted(ready, ocd, drawn):
    ocd(ready, "infer", *BARE)
    stop_infer(ocd, ready, *BARE, "--ensemble", 3)
    drawn.clear()
    ocd(ready, "infer", *BARE, "--ensemble", 3)
    assert drawn == [range(2, 3)] * (BLOCKS - 4)
    found = ready.predictions()
    ocd(ready, "infer", *BARE, "--ensemble", 3, "--force")
    np.testing.assert_allclose(found["member_output"], ready.predictions()["member_output"], rtol=1e-5, atol=1e-6)


def test_blocks_of_fewer_members_do_not_count(ready, ocd):
    stop_infer(ocd, ready)
    ocd(ready, "infer", "--ensemble", 4, "--set", "infer.batch_size=5")
    assert ready.predictions()["member_output"].shape == (24, 4, 3)
    deltas = zarr.open_group(ready.run / "infer" / "test" / "deltas.zarr", mode="r")["delta"]
    assert deltas.shape == (24, 4, 3, 6)
    assert np.isfinite(deltas[:]).all()
