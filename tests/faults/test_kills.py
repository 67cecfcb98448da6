"""SIGKILL at any instant of collect, many times over, then the same command: the store of a run that was never interrupted."""

import itertools
import json
import os
import random
import shutil
import signal
import time

import pytest
from folders import Folder, blocks_of, results
from processes import before, interrupt, wait_until

from stages.store.delta_store import DeltaStore

# Whatever changes the run directory goes through one of these.
CALLS = ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir")


@pytest.fixture(scope="module")
def many_blocks(make_run):
    """Collected unbroken in 81 blocks; not to be changed."""
    folder = make_run({"collect": {"block_samples": 2, "batch_size": 2}}, "slow", "collect", rows=180)
    assert len(blocks_of(folder, "collect")) == 81
    return folder


def kill_often(folder, start, kills, seed):
    """Kill collect again and again, most often while it works and in the end while it finishes; how often it was.

    A kill falls a random while after collect began, or right after it has finished a block or two, so that it goes on.
    """
    draw, count = random.Random(seed), 0
    for left in reversed(range(kills)):
        there = len(blocks_of(folder))
        process = start(folder, "collect", "--quiet", delay=0.004)
        latest, enough = time.monotonic() + draw.uniform(0, 0.6), there + draw.choice([1, 1, 2])
        # On a busy machine no block may be done so early: the last kill leaves one at least.
        latest += 0 if left or there else 60
        wait_until(lambda latest=latest, enough=enough: time.monotonic() > latest or len(blocks_of(folder)) >= enough)
        time.sleep(draw.uniform(0, 0.03))
        if process.ended():
            break
        process.die()
        # It was killed before it was done: nothing has the final name.
        assert not (folder.run / "collect").exists()
        count += 1
    return count


def names(folder):
    return {name for name in folder.files() if name.startswith("collect")}


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_at_random_instants(many_blocks, ocd, start, tmp_path, kills):
    shutil.copytree(many_blocks.root, tmp_path / "killed", ignore=shutil.ignore_patterns("collect"))
    folder = Folder(tmp_path / "killed")
    assert kill_often(folder, start, kills, seed=kills) == kills
    kept = {path.name: path.stat().st_mtime_ns for path in blocks_of(folder)}
    assert 0 < len(kept) <= 81
    ocd(folder, "collect", "--set", "collect.writers=2")
    ocd(folder, "verify")
    assert results(folder, "collect") == results(many_blocks, "collect")
    assert names(folder) == names(many_blocks)
    after = {path.name: path.stat().st_mtime_ns for path in blocks_of(folder, "collect")}
    assert {name: after[name] for name in kept} == kept


class KilledAt:
    """The process that is forked next kills itself as it is about to change the disk for the n-th time."""

    def __init__(self, monkeypatch, number):
        self._count, self._number, self._parent = itertools.count(1), number, os.getpid()
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call):
        def counted(*args, **named):
            if os.getpid() != self._parent and next(self._count) == self._number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **named)

        return counted


def killed_at(folder, start, number):
    """Run collect and kill it at its n-th change; whether it was, and not done before."""
    with pytest.MonkeyPatch.context() as patch:
        KilledAt(patch, number)
        process = start(folder, "collect", "--quiet", "--set", "collect.writers=1")
    wait_until(process.ended)
    assert process.code in (0, -signal.SIGKILL), process.stderr
    return process.code != 0


def test_a_kill_at_every_change_of_beginning_and_of_a_block(ready, collected_run, start, ocd, whole):
    # Until the work is laid out and recorded it is begun anew each time.
    for number in itertools.count(1, 3):
        assert killed_at(ready, start, number)
        if (ready.run / "collect.wip" / "begun.json").exists():
            break
    strays = 0
    for number in itertools.count(1):
        assert killed_at(ready, start, number)
        strays += len(list(ready.run.rglob("*.tmp")))
        if strays >= 10 and blocks_of(ready):
            break
    # Kills fell into the writing of chunks, and what they left did not pile up.
    assert len(list(ready.run.rglob("*.tmp"))) <= 3
    assert blocks_of(ready)
    ocd(ready, "collect")
    whole(ready)
    assert names(ready) == names(collected_run)


def test_a_kill_at_every_change_of_finishing(collected, collected_run, ocd, start, whole):
    """All blocks are there: what is left is to write the manifest and to give the folder its name."""
    folder = collected.run / "collect"
    assert killed_at(collected, start, 1) is False  # up to date: nothing is changed
    shutil.rmtree(folder)
    # Nothing that is asked for stops between the last block and the manifest.
    with before(DeltaStore, "totals", interrupt):
        ocd(collected, "collect", code=4)
    assert len(blocks_of(collected)) == 9
    rounds = 0
    for number in itertools.count(1):
        if not killed_at(collected, start, number):
            break
        rounds += 1
    assert rounds >= 10
    whole(collected)
    assert names(collected) == names(collected_run)


@pytest.mark.parametrize("number", [1, 5, 20, 60, 100, 110])
def test_a_kill_while_a_damaged_store_is_mended(collected, collected_run, start, ocd, whole, number):
    """The undamaged blocks are given a second name first; the damaged store is there until the mended one is whole."""
    damaged = collected.run / "collect" / "deltas.zarr" / "rho" / "c.3"
    damaged.write_bytes(b"nothing")
    assert killed_at(collected, start, number)
    assert damaged.read_bytes() == b"nothing"
    ocd(collected, "collect")
    whole(collected)
    assert names(collected) == names(collected_run)


def test_a_kill_between_the_manifest_and_the_end_of_the_record(collected, collected_run, whole, ocd):
    """The unfinished folder then has both: its record must not end up in the finished one."""
    folder = collected.run / "collect"
    folder.rename(collected.run / "collect.wip")
    manifest = collected.manifest("collect.wip")
    begun = {key: manifest[key] for key in ("identity", "fingerprint", "execution", "sources")}
    begun["threads"] = manifest["made"]["threads"]
    (collected.run / "collect.wip" / "begun.json").write_text(json.dumps(begun))
    ocd(collected, "collect")
    whole(collected)
    assert names(collected) == names(collected_run)
