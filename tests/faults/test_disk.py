"""A disk that is full, beforehand and in the middle: one message, exit code 4, and the run goes on once there is room."""

import errno
import os
import re
import shutil

import pytest
from expectations import STAGES
from folders import Folder, blocks_of, results, states
from processes import before, redone

from stages.run_directory.folders import StageFolder
from stages.store.delta_store import DeltaStore

# The delta, four figures, whether it is degenerate, the sample's number, and the conditioning.
BYTES_PER_ROW = 60 * 4 * 4 + 4 * 4 + 1 + 8 + (4 + 60 + 3) * 4


@pytest.fixture(scope="module")
def on_disk(make_run):
    """Collected on a disk with room enough: 900 deltas of 960 bytes, in 18 blocks; not to be changed."""
    settings = {
        "collect": {"block_samples": 50, "batch_size": 25},
        "select-layer": {"layer": "0.weight"},
        "task": {"model": "mymodel:wide"},
    }
    return make_run(settings, "models", "collect", rows=1000)


@pytest.fixture
def small(on_disk, small_disk, tmp_path):
    """The same, about to collect, its run directory on a small disk."""
    shutil.copytree(on_disk.root, tmp_path / "small", ignore=shutil.ignore_patterns("collect"))
    shutil.move(tmp_path / "small" / "run", small_disk.path / "run")
    (tmp_path / "small" / "run").symlink_to(small_disk.path / "run")
    return Folder(tmp_path / "small")


def same_store(folder, on_disk, ocd):
    """Whether a store is the one made where there was room, byte for byte."""
    ocd(folder, "verify")
    assert results(folder, "collect") == results(on_disk, "collect")


def test_too_little_room_is_found_beforehand(small, small_disk, ocd, on_disk):
    filler = small_disk.fill(free=300_000)
    result = ocd(small, "collect", "--quiet", code=4)
    found = re.fullmatch(
        r"error: not enough disk: up to ([\d,]+) bytes are needed at (\S+), ([\d,]+) are free\n"
        r"  make room, name another folder with --run, or take fewer samples with --set collect\.samples=N\n",
        result.stderr,
    )
    needed, free = (int(found[group].replace(",", "")) for group in (1, 3))
    assert needed == 900 * BYTES_PER_ROW
    assert 250_000 < free <= 300_000
    assert found[2] == str(small.run / "collect.wip")
    assert not blocks_of(small)
    # As little as there is room for is taken.
    ocd(small, "collect", "--set", "collect.samples=100")
    filler.unlink()
    ocd(small, "collect")
    same_store(small, on_disk, ocd)


# A chunk of deltas is about 45 KB, a record 2 KB: the room left ends in a chunk, between two, in a record.
@pytest.mark.parametrize("free", [0, 4 << 10, 24 << 10, 48 << 10, 64 << 10, 68 << 10, 72 << 10])
def test_the_disk_fills_up_in_the_middle(small, small_disk, ocd, on_disk, free):
    with before(DeltaStore, "write_block", lambda _, block, *args: small_disk.fill(free) if block == 4 else None):
        result = ocd(small, "collect", "--quiet", "--set", "collect.writers=1", code=4)
    assert re.fullmatch(
        r"error: the disk is full: [\d,]+ bytes are free at \S+\n  make room, then run the same command again\n", result.stderr
    )
    assert not (small.run / "collect").exists()
    done = {int(path.stem) for path in blocks_of(small)}
    assert {0, 1, 2, 3} <= done
    assert len(done) < 9
    assert not list(small.run.resolve().rglob("*.tmp"))
    # What counts as done is whole.
    ocd(small, "verify")
    (small_disk.path / "filler").unlink()
    assert redone(ocd, small, "collect") == sorted(set(range(18)) - done)
    same_store(small, on_disk, ocd)


@pytest.mark.parametrize(
    ("where", "name"),
    [(DeltaStore, "totals"), (StageFolder, "exchange")],
    ids=["before the manifest", "before the names are exchanged"],
)
def test_the_disk_fills_up_at_the_end(small, small_disk, ocd, on_disk, where, name):
    with before(where, name, lambda *_: small_disk.fill()):
        # An exchange needs no room.
        ocd(small, "collect", "--quiet", code=4 if where is DeltaStore else 0)
    (small_disk.path / "filler").unlink()
    assert redone(ocd, small, "collect") == []
    same_store(small, on_disk, ocd)


def test_only_what_is_not_there_yet_needs_room(small, small_disk, ocd, monkeypatch):
    needed = 900 * BYTES_PER_ROW
    ocd(small, "collect", "--set", "collect.samples=450")
    free, usage = needed // 2 - 1, shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))
    result = ocd(small, "collect", code=4)
    assert f"up to {needed // 2:,} bytes are needed" in result.stderr
    assert f"{free:,} are free" in result.stderr
    free += 1
    ocd(small, "collect")
    assert len(blocks_of(small, "collect")) == 18


@pytest.mark.parametrize("stage", ["collect", "train-diffusion", "infer"])
def test_not_enough_disk(finished, ocd, monkeypatch, stage):
    usage = shutil.disk_usage(finished.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=700))
    result = ocd(finished, stage, "--force", "--quiet", code=4)
    assert result.stdout == ""
    assert all(fact in result.stderr for fact in ("error: not enough disk", "bytes are needed", "700 are free", "--run"))
    monkeypatch.undo()
    assert states(ocd, finished)[stage] == "done"


@pytest.mark.parametrize("writes", [0, 3, 7])
@pytest.mark.parametrize("stage", STAGES)
def test_disk_full_while_writing(finished, ocd, monkeypatch, stage, writes):
    finished.without(stage)
    left, sync = [writes], os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    result = ocd(finished, stage, "--quiet", code=4)
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "disk is full" in result.stderr
    assert "run the same command again" in result.stderr
    assert not [name for name in finished.files() if name.endswith((".tmp", ".partial"))]
    monkeypatch.undo()
    ocd(finished, stage)
