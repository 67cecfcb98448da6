"""Damage to a delta store, finished or not: named by verify, mended by `ocd collect`, and never trained on."""

import json
import os
import re
import shutil

import pytest
from folders import blocks_of, flip, states
from processes import counted_blocks, stopped_at


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def kept_time(change):
    def changed(path):
        info = path.stat()
        change(path)
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))

    return changed


def other_sum(path):
    """One digit of a mean loss, such as one flipped bit makes."""
    text = path.read_text()
    changed = re.sub(r'("base_loss": \d+\.)(\d)', lambda found: found[1] + str(int(found[2]) ^ 1), text)
    assert changed != text
    path.write_text(changed)


def no_chunks(path):
    for chunk in json.loads(path.read_text())["chunks"]:
        (path.parent.parent / chunk).unlink()


def other_record(path):
    path.write_text(path.with_name("000004.json").read_text())


DELTA, RHO, RECORD = "deltas.zarr/delta/c.2.0.0", "deltas.zarr/rho/c.2", "blocks/000002.json"
# Kind: the file, and what happens to it.
DAMAGE = {
    "a flipped bit": (DELTA, flip),
    "a flipped bit, the time kept": (DELTA, kept_time(flip)),
    "a small chunk flipped, the time kept": (RHO, kept_time(flip)),
    "cut short": (DELTA, cut),
    "emptied": (RHO, lambda path: path.write_bytes(b"")),
    "a chunk deleted": (DELTA, os.unlink),
    "a record without its chunks": (RECORD, no_chunks),
    "a record deleted": (RECORD, os.unlink),
    "a record cut short": (RECORD, halve),
    "a record of nothing": (RECORD, lambda path: path.write_text("[]\n")),
    "another block's record": (RECORD, other_record),
    "a sum in a record": (RECORD, other_sum),
    "a sum in a record, the time kept": (RECORD, kept_time(other_sum)),
}
LAYOUT = {
    "zarr.json cut short": ("deltas.zarr/delta/zarr.json", cut),
    "zarr.json deleted": ("deltas.zarr/delta/zarr.json", os.unlink),
    "zarr.json of nothing": ("deltas.zarr/rho/zarr.json", lambda path: path.write_text("{}")),
    "zarr.json with other chunks": (
        "deltas.zarr/delta/zarr.json",
        lambda path: path.write_text(re.sub(r'("chunk_shape": \[\s*)4', r"\g<1>5", path.read_text())),
    ),
    "zarr.json with another separator": (
        "deltas.zarr/degenerate/zarr.json",
        lambda path: path.write_text(path.read_text().replace('"separator": "."', '"separator": "/"')),
    ),
    "zarr.json with another dtype": (
        "deltas.zarr/rho/zarr.json",
        lambda path: path.write_text(path.read_text().replace('"float32"', '"float64"')),
    ),
    "the group's zarr.json cut short": ("deltas.zarr/zarr.json", cut),
    "the group's zarr.json deleted": ("deltas.zarr/zarr.json", os.unlink),
}
STRAYS = ["deltas.zarr/delta/c.2.0.0.77-88.tmp", "deltas.zarr/rho/c.1.partial", "blocks/000003.json.77.tmp", "begun.json.7.tmp"]


def damaged(folder, stage, kind):
    name, change = (DAMAGE | LAYOUT)[kind]
    path = folder.run / stage / name
    before = path.read_bytes()
    change(path)
    assert kind == "a record without its chunks" or not path.exists() or path.read_bytes() != before
    return name


def problems(ocd, folder, stage, code=3):
    return "\n".join(json.loads(ocd(folder, "verify", "--json", code=code).stdout)["stages"][stage]["problems"])


def inodes(folder, stage, block):
    """Of the files of all blocks but one."""
    files = [*(folder.run / stage / "deltas.zarr").rglob("c.*"), *blocks_of(folder, stage)]
    of = {path: int(path.stem if path.suffix == ".json" else path.name.split(".")[1]) for path in files}
    return {path.relative_to(folder.run / stage): path.stat().st_ino for path in files if of[path] != block}


# A finished store


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_a_finished_store(collected, ocd, whole, kind):
    kept = inodes(collected, "collect", 2)
    name = damaged(collected, "collect", kind)
    found = problems(ocd, collected, "collect")
    assert (RHO if "without" in kind else name) in found
    entry = json.loads(ocd(collected, "status", "--json").stdout)["stages"]["collect"]
    assert entry["state"] == "partial"
    assert entry["detail"].startswith("blocks are damaged: ")
    with counted_blocks() as written:
        ocd(collected, "collect")
    assert written == [2]
    assert inodes(collected, "collect", 2) == kept
    whole(collected)


@pytest.mark.parametrize("kind", LAYOUT)
def test_damage_to_the_layout_of_a_finished_store(collected, ocd, whole, kind):
    kept = inodes(collected, "collect", None)
    name = damaged(collected, "collect", kind)
    assert name in problems(ocd, collected, "collect")
    assert states(ocd, collected)["collect"] == "partial"
    with counted_blocks() as written:
        ocd(collected, "collect")
    # No sample is overfitted again: the blocks are whole.
    assert written == []
    assert inodes(collected, "collect", None) == kept
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
    with counted_blocks() as written:
        ocd(collected, "collect")
    assert sorted(written) == [0, 3, 8]
    whole(collected)


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_file_in_a_finished_store(collected, ocd, whole, name):
    (collected.run / "collect" / name).write_bytes(b"half")
    assert problems(ocd, collected, "collect") == f"collect/{name} is not in the manifest"
    with counted_blocks() as written:
        ocd(collected, "collect")
    assert written == []
    whole(collected)


def test_a_lone_old_folder(collected, ocd, whole):
    """A power cut between the two renames; its blocks are mended like any others."""
    folder = collected.run / "collect"
    folder.rename(collected.run / "collect.old")
    ocd(collected, "verify")
    flip(collected.run / "collect.old" / DELTA)
    assert DELTA in problems(ocd, collected, "collect")
    with counted_blocks() as written:
        ocd(collected, "collect")
    assert written == [2]
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


# An unfinished store


@pytest.fixture
def unfinished(ready, ocd):
    """Blocks 0 to 4 of nine are there."""
    with stopped_at(5):
        ocd(ready, "collect", code=4)
    assert len(blocks_of(ready)) == 5
    return ready


def test_an_unfinished_store_is_verified(unfinished, ocd):
    found = json.loads(ocd(unfinished, "verify", "--json").stdout)["stages"]["collect.wip"]
    assert found["problems"] == []
    assert found["files"] == 50
    assert "collect.wip (unfinished): 50 files" in ocd(unfinished, "verify").stdout


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_an_unfinished_store(unfinished, ocd, whole, kind):
    kept = inodes(unfinished, "collect.wip", 2)
    name = damaged(unfinished, "collect.wip", kind)
    if kind != "a record deleted":  # an unfinished block is no damage
        found = problems(ocd, unfinished, "collect.wip")
        assert (RHO if "without" in kind else name) in found
    with counted_blocks() as written:
        ocd(unfinished, "collect")
    assert sorted(written) == [2, 5, 6, 7, 8]
    assert kept.items() <= inodes(unfinished, "collect", 2).items()
    whole(unfinished)


@pytest.mark.parametrize("kind", LAYOUT)
def test_damage_to_the_layout_of_an_unfinished_store(unfinished, ocd, whole, kind):
    damaged(unfinished, "collect.wip", kind)
    with counted_blocks() as written:
        ocd(unfinished, "collect")
    assert sorted(written) == [5, 6, 7, 8]
    whole(unfinished)


@pytest.mark.parametrize("name", [*STRAYS, "deltas.zarr/delta/c.6.0.0"])
def test_a_stray_file_in_an_unfinished_store(unfinished, ocd, whole, name):
    """What a kill leaves half-written, a whole chunk without its record among it."""
    (unfinished.run / "collect.wip" / name).write_bytes(b"half")
    ocd(unfinished, "verify")
    ocd(unfinished, "collect")
    whole(unfinished)


def test_an_unfinished_store_without_its_beginning(unfinished, ocd, whole):
    """Nothing says what the blocks are of: they are made again."""
    (unfinished.run / "collect.wip" / "begun.json").unlink()
    with counted_blocks() as written:
        ocd(unfinished, "collect")
    assert sorted(written) == list(range(9))
    whole(unfinished)


def test_blocks_of_another_store(unfinished, ocd, whole, tmp_path):
    """Copied there from other work: their records say whose they are."""
    shutil.copytree(unfinished.run, tmp_path / "other")
    ocd(unfinished, "collect", "--set", "collect.lr=0.5", "--force", "--run", tmp_path / "other")
    for path in (tmp_path / "other" / "collect" / "blocks").glob("*.json"):
        shutil.copy(path, unfinished.run / "collect.wip" / "blocks")
    assert "000002.json is of another store" in problems(ocd, unfinished, "collect.wip")
    ocd(unfinished, "collect")
    whole(unfinished)
