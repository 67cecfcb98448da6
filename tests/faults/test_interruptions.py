"""Interruptions and faults within a command: what is said, what is kept, and that the same command goes on."""

import json
import os
import re
import tempfile

import pytest
from folders import put
from processes import redone, stopped_at, stopped_training

from stages.run_directory.folders import StageFolder


@pytest.fixture
def about_to_collect(project, ocd):
    """A project whose collect takes five blocks."""
    folder = project({"collect": {"block_samples": 8}}, until="select-layer")
    return folder


def refused(ocd, folder, *args, code, says):
    """A command that must fail with one message, which must name these facts."""
    result = ocd(folder, *args, "--quiet", code=code)
    assert result.stdout == ""
    assert len(re.findall(r"^error: ", result.stderr, re.MULTILINE)) == 1
    for fact in says:
        assert fact in result.stderr
    return result.stderr


def test_stage_in_use(finished, ocd):
    # Locks belong to open files, so one held here keeps out a command in the same process, too.
    with StageFolder(finished.run, "collect").lock():
        says = ["collect is in use by process", str(os.getpid()), " on ", " since ", "run the same command again"]
        refused(ocd, finished, "collect", "--force", code=4, says=says)
        # Looking, and other stages, are no concern of the lock.
        ocd(finished, "status")
        ocd(finished, "train-scale")
    ocd(finished, "collect", "--force")


def test_fault_of_ours(about_to_collect, ocd, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with stopped_at(0, RuntimeError("boom")):
        message = refused(ocd, about_to_collect, "collect", code=1, says=["fault in ocd itself", "RuntimeError: boom"])
    (kept,) = tmp_path.glob("ocd-*.txt")
    assert str(kept) in message
    assert "Traceback" in kept.read_text()
    ocd(about_to_collect, "collect")


def test_out_of_memory(about_to_collect, ocd):
    with stopped_at(0, MemoryError("too much")):
        refused(ocd, about_to_collect, "collect", code=1, says=["out of memory", "batch_size"])


@pytest.fixture
def interrupted_collect(about_to_collect, ocd):
    """The same, interrupted after two of the blocks."""
    with stopped_at(2):
        says = ["collect was interrupted", "kept", "run the same command again"]
        refused(ocd, about_to_collect, "collect", code=4, says=says)
    return about_to_collect


def test_interrupted_collect_continues(interrupted_collect, ocd):
    assert redone(ocd, interrupted_collect, "collect") == [2, 3, 4]


def test_interrupted_collect_with_another_setting_stops(interrupted_collect, ocd):
    says = ["collect is stale", "unfinished", "collect.lr was 0.01, is now 0.02", "ocd collect --set collect.lr=0.02 --force"]
    refused(ocd, interrupted_collect, "collect", "--set", "collect.lr=0.02", code=3, says=says)
    ocd(interrupted_collect, "collect", "--set", "collect.lr=0.02", "--force")


@pytest.mark.parametrize("stage", ["train-base", "train-diffusion", "train-scale"])
def test_interrupted_training_continues(finished, ocd, stage):
    wanted = finished.manifest(stage)["content"]
    finished.without(stage)
    options = [] if stage == "train-base" else ["--set", f"{stage}.checkpoint_steps=2"]
    with stopped_training(after=3):
        refused(ocd, finished, stage, *options, code=4, says=[f"{stage} was interrupted", "run the same command again"])
    ocd(finished, stage, *options)
    assert finished.manifest(stage)["content"] == wanted


def test_ledger_that_leads_out(interrupted_collect, ocd):
    # A block's record names files, too: one that names others does not count, and the block is made again.
    folder = interrupted_collect
    path = folder.run / "collect.wip" / "blocks" / "000000.json"
    good = path.read_text()
    record = json.loads(good)
    record["chunks"]["../../../mymodel.py"] = {"bytes": (folder.root / "mymodel.py").stat().st_size, "sha256": "0" * 64}
    path.write_text(json.dumps(record))
    ocd(folder, "collect")
    assert folder.read("collect/blocks/000000.json") == json.loads(good)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(finished, ocd):
    wanted = finished.manifest("train-diffusion")["content"]
    finished.without("train-diffusion")
    often = put("train-diffusion.checkpoint_steps=5")
    with stopped_training(after=23):
        ocd(finished, "train-diffusion", *often, code=4)
    newest = max((finished.run / "train-diffusion.wip" / "checkpoints").glob("*.json")).with_suffix(".safetensors")
    newest.write_bytes(newest.read_bytes()[:100])
    result = ocd(finished, "train-diffusion", *often)
    assert f"checkpoint {newest.stem} is not usable, the one before is taken" in result.stderr
    assert "continues from step" in (finished.run / "train-diffusion" / "log.txt").read_text()
    assert finished.manifest("train-diffusion")["content"] == wanted
