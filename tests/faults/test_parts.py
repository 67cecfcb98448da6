"""`ocd collect --part i/n`: several processes at one store, which is then the one that a single process makes."""

import json
import os
import signal
import time

import pytest
from folders import blocks_of, results, status
from processes import INTERRUPTED, counted_blocks, redone, stopped_at, wait_until

from stages.overfitting.collector import Collector

BLOCKS = 9


def test_one_part_after_another(ready, start, whole, collected_run):
    for number in (2, 3, 1):
        words = start(ready, "collect", "--part", f"{number}/3", "--json", "--quiet").wait()
        done = {2: 3, 3: 6, 1: 9}[number]
        found = json.loads(words.stdout)
        if done < BLOCKS:
            part = {"stage": "collect", "state": "partial", "part": f"{number}/3"}
            assert found == {**part, "done": done, "total": BLOCKS, "unit": "blocks"}
    assert found == collected_run.summary("collect")
    whole(ready)


def test_what_an_unfinished_part_says(ready, ocd):
    text = "collect: part 1/4 is done; 3 of 9 blocks are there, the others are other parts' work\n"
    assert ocd(ready, "collect", "--part", "1/4").stdout == text
    # Once more: nothing is left to do for it.
    with counted_blocks() as written:
        assert ocd(ready, "collect", "--part", "1/4").stdout == text
    assert written == []


@pytest.mark.parametrize("attempt", range(3))
@pytest.mark.parametrize("count", [4, 9])
def test_all_parts_at_once(ready, start, whole, count, attempt):
    parts = [start(ready, "collect", "--part", f"{number + 1}/{count}") for number in range(count)]
    for part in parts:
        part.wait()
    whole(ready)


@pytest.mark.parametrize("attempt", range(5))
def test_two_parts_that_finish_together(ready, start, whole, monkeypatch, attempt):
    """Both have written their last block before either looks whether the store is whole."""
    work = Collector.work

    def and_wait(self, *args):
        work(self, *args)
        (ready.root / f"finished.{os.getpid()}").touch()
        wait_until(lambda: len(list(ready.root.glob("finished.*"))) == 2)

    monkeypatch.setattr(Collector, "work", and_wait)
    parts = [start(ready, "collect", "--part", f"{number}/2", "--json", "--quiet") for number in (1, 2)]
    found = [json.loads(part.wait().stdout) for part in parts]
    whole(ready)
    # Whichever was first to look, the store was whole by then: both tell its summary.
    assert found[0] == found[1]


@pytest.mark.parametrize("again", [["--part", "2/2"], []], ids=["its part", "plain"])
def test_a_dead_part(ready, start, whole, ocd, again):
    dead = start(ready, "collect", "--part", "2/2", held_after=1)
    wait_until(lambda: blocks_of(ready))
    ocd(ready, "collect", "--part", "1/2")
    dead.die()
    kept = {path.name: path.stat().st_mtime_ns for path in blocks_of(ready)}
    assert 6 <= len(kept) < BLOCKS
    assert status(ocd, ready)["collect"]["state"] == "partial"
    assert len(redone(ocd, ready, "collect", *again)) == BLOCKS - len(kept)
    whole(ready)
    found = {path.name: path.stat().st_mtime_ns for path in blocks_of(ready, "collect")}
    assert {name: found[name] for name in kept} == kept


def test_a_terminated_part(ready, start, whole, ocd):
    part = start(ready, "collect", "--part", "1/2", "--quiet", held_after=1)
    wait_until(lambda: blocks_of(ready))
    part.kill(signal.SIGTERM)
    assert part.wait(4).stderr == INTERRUPTED.format("collect")
    for number in (1, 2):
        ocd(ready, "collect", "--part", f"{number}/2")
    whole(ready)


def test_rerunning_a_part_of_a_whole_store(collected, ocd, whole):
    with counted_blocks() as written:
        assert "collect: up to date" in ocd(collected, "collect", "--part", "2/3").stdout
        summary = ocd.json(collected, "collect", "--part", "1/5")
    assert summary["samples"] == 36
    assert written == []
    whole(collected)


# Refusals


@pytest.fixture
def running(ready, start):
    """Part 1/2 under way for as long as the test takes."""
    part = start(ready, "collect", "--part", "1/2", held_after=1)
    wait_until(lambda: blocks_of(ready))
    return part


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--part", "1/2"], "collect --part 1/2 is in use by process {pid} on "),
        (["--part", "1/3"], "collect --part 1/3: others have divided the work in another way: process {pid} on "),
        (["--part", "2/2", "--force", "--set", "collect.lr=0.5"], "process {pid} on "),
        ([], "collect is in use by process {pid} on "),
        (["--force"], "collect is in use by process {pid} on "),
    ],
    ids=["the same part", "another count", "forced with other settings", "plain", "forced"],
)
def test_what_a_running_part_keeps_off(ready, running, ocd, words, says):
    result = ocd(ready, "collect", "--quiet", *words, code=4)
    assert says.format(pid=running.pid) in result.stderr
    assert result.stderr.endswith("\n  wait for it to end, then run the same command again\n")
    if words != ["--part", "1/2"]:
        assert result.stderr.splitlines()[0].endswith(" (part 1/2)")
    # Whoever was at work stays unharmed.
    running.let_go().wait()
    ocd(ready, "collect", "--part", "2/2")
    assert len(blocks_of(ready, "collect")) == BLOCKS


def test_a_running_collect_keeps_parts_off(ready, start, ocd, whole):
    plain = start(ready, "collect", held_after=1)
    wait_until(lambda: blocks_of(ready))
    result = ocd(ready, "collect", "--quiet", "--part", "1/2", code=4)
    assert f"error: collect is in use by process {plain.pid} on " in result.stderr
    plain.let_go().wait()
    whole(ready)


def test_a_killed_collect_is_not_named_as_who_holds_it(ready, start, ocd):
    dead = start(ready, "collect", held_after=1)
    wait_until(lambda: blocks_of(ready))
    dead.die()
    part = start(ready, "collect", "--part", "1/2", held_after=1)
    wait_until(lambda: status(ocd, ready)["collect"]["in_use_by"])
    assert f"collect is in use by process {part.pid} on " in ocd(ready, "collect", code=4).stderr


def test_other_settings_need_force(ready, ocd, whole):
    ocd(ready, "collect", "--part", "1/2")
    result = ocd(ready, "collect", "--part", "2/2", "--set", "collect.lr=0.5", code=3)
    assert "collect.lr was 0.01, is now 0.5" in result.stderr
    ocd(ready, "collect", "--part", "2/2")
    whole(ready)


# Status


def test_status_while_parts_run(ready, start, ocd):
    parts = [start(ready, "collect", "--part", f"{number}/2", held_after=2) for number in (1, 2)]
    wait_until(lambda: len(blocks_of(ready)) >= 2)
    entry = status(ocd, ready)["collect"]
    assert entry["state"] == "partial"
    assert entry["progress"]["total"] == BLOCKS
    assert 2 <= entry["progress"]["done"] < BLOCKS
    assert [text.split(" on ")[0] for text in entry["in_use_by"]] == [f"process {part.pid}" for part in parts]
    assert [text[-11:] for text in entry["in_use_by"]] == [" (part 1/2)", " (part 2/2)"]
    text = ocd(ready, "status").stdout
    assert "of 9 blocks" in text
    assert f"in use by process {parts[0].pid} on " in text
    parts[0].die()
    assert [text[-11:] for text in status(ocd, ready)["collect"]["in_use_by"]] == [" (part 2/2)"]
    parts[1].let_go().wait()
    assert status(ocd, ready)["collect"]["in_use_by"] == []


def test_looking_does_not_put_parts_off(ready, start, ocd, whole):
    """Looking takes the locks for a moment: no command may take that for a process at work."""
    for number in (1, 2, 3):
        part = start(ready, "collect", "--part", f"{number}/3")
        while not part.ended():
            status(ocd, ready)["collect"]
            time.sleep(0.001)
        part.wait()
    whole(ready)


# Again, and further


def test_forced_parts_redo_everything(collected, ocd, whole):
    chunks = collected.run / "collect" / "deltas.zarr" / "delta"
    before = {path.name: path.stat().st_ino for path in chunks.glob("c.*")}
    ocd(collected, "collect", "--part", "1/2", "--force")
    # The old store stands until the new one is whole.
    assert {path.name: path.stat().st_ino for path in chunks.glob("c.*")} == before
    assert status(ocd, collected)["collect"]["state"] == "done"
    assert redone(ocd, collected, "collect", "--part", "2/2", "--force") == [1, 3, 5, 7]
    assert not before.items() & {path.name: path.stat().st_ino for path in chunks.glob("c.*")}.items()
    whole(collected)


def test_forced_parts_at_once(collected, start, whole):
    parts = [start(collected, "collect", "--part", f"{number}/3", "--force", delay=0.002) for number in (1, 2, 3)]
    for part in parts:
        part.wait()
    whole(collected)


@pytest.mark.parametrize("before", [18, 20], ids=["a short last block", "whole blocks"])
def test_parts_that_grow_a_store(ready, start, ocd, whole, before):
    ocd(ready, "collect", "--set", f"collect.samples={before}")
    chunk = ready.run / "collect" / "deltas.zarr" / "delta" / "c.0.0.0"
    inode = chunk.stat().st_ino
    parts = [start(ready, "collect", "--part", f"{number}/2") for number in (1, 2)]
    for part in parts:
        part.wait()
    assert chunk.stat().st_ino == inode
    whole(ready)


def test_parts_mend_a_damaged_store(collected, ocd, whole):
    for block in (2, 5):
        (collected.run / "collect" / "deltas.zarr" / "rho" / f"c.{block}").unlink()
    assert redone(ocd, collected, "collect", "--part", "1/2") == [2]
    assert redone(ocd, collected, "collect", "--part", "2/2") == [5]
    whole(collected)


def test_parts_take_up_what_a_plain_collect_left(ready, ocd, whole):
    with stopped_at(4):
        ocd(ready, "collect", code=4)
    assert redone(ocd, ready, "collect", "--part", "1/2") == [4, 6, 8]
    assert redone(ocd, ready, "collect", "--part", "2/2") == [5, 7]
    whole(ready)


def test_another_batch_size_of_a_part_is_the_first_ones(ready, ocd, whole):
    """The parts of one store work alike, whatever the others ask for."""
    ocd(ready, "collect", "--part", "1/2")
    ocd(ready, "collect", "--part", "2/2", "--set", "collect.batch_size=3", "--set", "collect.block_samples=5")
    whole(ready)


def test_trainings_wait_for_the_last_part(ready, ocd):
    ocd(ready, "collect", "--part", "1/2")
    result = ocd(ready, "train-scale", code=3)
    assert "collect is partial: 5 of 9 blocks" in result.stderr
    ocd(ready, "collect", "--part", "2/2")
    ocd(ready, "train-scale")
    assert results(ready, "train-scale")
