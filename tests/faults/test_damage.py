"""Damage to a delta store, finished or not: named by verify, mended by `ocd collect`, and never trained on."""

import pytest
from damage import DAMAGE, DELTA, LAYOUT, RHO, STRAYS, damaged, inodes, kept_time, problems
from folders import flip, states, status
from processes import redone

# A finished store


@pytest.mark.parametrize("kind", [*DAMAGE, *LAYOUT])
def test_damage_to_a_finished_store(collected, ocd, whole, kind):
    # Where the layout is damaged, no sample is overfitted again: the blocks are whole.
    blocks = [2] if kind in DAMAGE else []
    kept = inodes(collected, "collect", *blocks)
    name = damaged(collected, "collect", kind)
    assert (RHO if "without" in kind else name) in problems(ocd, collected, "collect")
    entry = status(ocd, collected)["collect"]
    assert entry["state"] == "partial"
    assert not blocks or entry["detail"].startswith("blocks are damaged: ")
    assert redone(ocd, collected, "collect") == blocks
    assert inodes(collected, "collect", *blocks) == kept
    whole(collected)


def test_what_was_found_is_seen_from_then_on(collected, ocd, whole):
    """Size and time tell nothing of a bit that the disk lost: status sees it once verify has."""
    flip(collected.run / "collect" / DELTA, keep_time=True)
    assert states(ocd, collected)["collect"] == "done"
    assert "up to date" in ocd(collected, "collect").stdout
    result = ocd(collected, "verify", code=3)
    assert f"  content changed: collect/{DELTA}" in result.stdout.splitlines()
    assert "ocd collect redoes its damaged blocks" in result.stderr
    assert states(ocd, collected)["collect"] == "partial"
    assert f"blocks are damaged: content changed: collect/{DELTA}" in ocd(collected, "status").stdout
    ocd(collected, "collect")
    whole(collected)
    assert states(ocd, collected)["collect"] == "done"


def test_several_blocks_at_once(collected, ocd, whole):
    for block in (0, 3, 8):
        flip(collected.run / "collect" / f"deltas.zarr/base_output/c.{block}.0")
    found = problems(ocd, collected, "collect")
    assert all(f"base_output/c.{block}.0" in found for block in (0, 3, 8))
    assert "(and 2 more files)" in ocd(collected, "status").stdout
    assert redone(ocd, collected, "collect") == [0, 3, 8]
    whole(collected)


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_file_in_a_finished_store(collected, ocd, whole, name):
    (collected.run / "collect" / name).write_bytes(b"half")
    assert problems(ocd, collected, "collect") == f"collect/{name} is not in the manifest"
    assert redone(ocd, collected, "collect") == []
    whole(collected)


def test_a_lone_old_folder(collected, ocd, whole):
    """A power cut between the two renames; its blocks are mended like any others."""
    folder = collected.run / "collect"
    folder.rename(collected.run / "collect.old")
    ocd(collected, "verify")
    flip(collected.run / "collect.old" / DELTA)
    assert DELTA in problems(ocd, collected, "collect")
    assert redone(ocd, collected, "collect") == [2]
    whole(collected)


def test_mending_keeps_what_was_made_of_the_store(finished, ocd):
    """The mended store is the one that the trainings learned from: nothing after it is stale."""
    flip(finished.run / "collect" / "deltas.zarr" / "delta" / "c.0.0.0")
    found = states(ocd, finished)
    assert found["collect"] == "partial"
    assert found["train-diffusion"] == found["train-scale"] == found["infer"] == "stale"
    ocd(finished, "collect")
    assert set(states(ocd, finished).values()) == {"done"}
    ocd(finished, "verify")


def test_a_damaged_store_of_other_settings_is_stale(collected, ocd):
    """Mending is for the store that is asked for; another one is not begun without --force."""
    flip(collected.run / "collect" / DELTA)
    result = ocd(collected, "collect", "--set", "collect.lr=0.5", code=3)
    assert "collect.lr was 0.01, is now 0.5" in result.stderr


# Trainings

QUICK = ["--force", "--quiet"]


@pytest.mark.parametrize("stage", ["train-diffusion", "train-scale"])
@pytest.mark.parametrize("kind", ["a flipped bit", "cut short", "a chunk deleted", "a record deleted", "zarr.json deleted"])
def test_no_training_begins_on_a_store_known_to_be_damaged(collected, ocd, stage, kind):
    damaged(collected, "collect", kind)
    result = ocd(collected, stage, *QUICK, code=3)
    assert f"error: {stage} needs stages that are not done:\n  collect is partial: blocks are damaged: " in result.stderr
    assert result.stderr.endswith("\n  run: ocd collect\n")
    assert not list(collected.run.glob(f"{stage}*"))


# What a training reads: the deltas, the conditioning, and which rows are usable.
UNSEEN = {
    "train-diffusion": ["delta/c.2.0.0", "layer_input/c.2.0", "degenerate/c.2", "rho/c.2"],
    "train-scale": ["layer_input/c.2.0", "degenerate/c.2", "rho/c.2"],
}


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in UNSEEN.items() for name in names])
def test_no_training_reads_a_bit_that_the_disk_lost(collected, ocd, stage, name):
    """Size and time tell nothing, and verify was not asked: the checksum in every chunk does."""
    flip(collected.run / "collect" / "deltas.zarr" / name, keep_time=True)
    result = ocd(collected, stage, *QUICK, code=3)
    assert f"{name.split('/')[0]} is damaged" in result.stderr
    assert result.stderr.endswith("\n  ocd verify names the blocks; ocd collect then redoes them\n")
    assert not (collected.run / stage).exists()
    # What is said to type does help.
    ocd(collected, "verify", code=3)
    ocd(collected, "collect")
    ocd(collected, stage, "--quiet")


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("zarr.json with other chunks", "train-diffusion"),
        ("zarr.json with another separator", "train-diffusion"),
        ("zarr.json with another separator", "train-scale"),
        ("zarr.json with another dtype", "train-scale"),
    ],
)
def test_no_training_reads_a_store_laid_out_otherwise(collected, ocd, stage, kind):
    """Each a change of one letter, which size and time do not show."""
    name, change = LAYOUT[kind]
    kept_time(change)(collected.run / "collect" / name)
    assert name.split("/")[1] in ocd(collected, stage, *QUICK, code=3).stderr
    assert not (collected.run / stage).exists()
