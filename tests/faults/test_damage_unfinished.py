"""Damage to a delta store that is not finished: what counts as done is whole, or made again."""

import shutil

import pytest
from damage import DAMAGE, LAYOUT, RHO, STRAYS, damaged, inodes, problems
from folders import blocks_of
from processes import redone, stopped_at


@pytest.fixture
def unfinished(ready, ocd):
    """Blocks 0 to 4 of nine are there."""
    with stopped_at(5):
        ocd(ready, "collect", code=4)
    assert len(blocks_of(ready)) == 5
    return ready


def test_an_unfinished_store_is_verified(unfinished, ocd):
    found = ocd.json(unfinished, "verify")["stages"]["collect.wip"]
    assert found["problems"] == []
    assert found["files"] == 50
    assert "collect.wip (unfinished): 50 files" in ocd(unfinished, "verify").stdout


@pytest.mark.parametrize("kind", [*DAMAGE, *LAYOUT])
def test_damage_to_an_unfinished_store(unfinished, ocd, whole, kind):
    blocks = [2] if kind in DAMAGE else []
    kept = inodes(unfinished, "collect.wip", *blocks)
    name = damaged(unfinished, "collect.wip", kind)
    if blocks and kind != "a record deleted":  # an unfinished block is no damage
        assert (RHO if "without" in kind else name) in problems(ocd, unfinished, "collect.wip")
    assert redone(ocd, unfinished, "collect") == [*blocks, 5, 6, 7, 8]
    assert kept.items() <= inodes(unfinished, "collect", *blocks).items()
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
    assert redone(ocd, unfinished, "collect") == list(range(9))
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
