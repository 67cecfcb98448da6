"""SIGKILL in the middle, then the same command: the bytes of a run that was never interrupted."""

import os
import signal
import subprocess
import sys
import time

import pytest
from folders import blocks_of, results

SETTINGS = {
    "collect": {"block_samples": 4, "batch_size": 2},
    "train-diffusion": {"max_steps": 1500, "evaluate_steps": 50, "checkpoint_steps": 30},
    "train-scale": {"max_steps": 2500, "evaluate_steps": 50, "checkpoint_steps": 30},
}


def command(folder, stage):
    return [sys.executable, "-m", "ocd_cli", stage, "--quiet", "--config", str(folder.config), "--device", "cpu"]


def kill_when(folder, stage, ready):
    """Start a stage, kill it as soon as `ready()`, and prove that it was killed and not done."""
    process = subprocess.Popen(command(folder, stage), env={**os.environ, "SLOW_FORWARD_S": "0.01"})
    deadline = time.monotonic() + 60
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder.run / stage).exists()


@pytest.fixture
def ready_project(ocd, project):
    folder = project(SETTINGS, code="slow")
    ocd(folder, "run", "--until", "select-layer")
    return folder


def test_collect_continues_after_a_kill(ocd, ready_project):
    folder = ready_project
    kill_when(folder, "collect", lambda: len(blocks_of(folder)) >= 3)
    kept = {path.name: path.stat().st_mtime_ns for path in blocks_of(folder)}
    # What a kill can leave of a chunk under way.
    (folder.run / "collect.wip" / "deltas.zarr" / "delta" / "c.8.0.0.1-2.tmp").write_bytes(b"half")
    assert '"partial"' in ocd(folder, "status", "--json").stdout
    ocd(folder, "collect")
    found = {path.name: path.stat().st_mtime_ns for path in blocks_of(folder, "collect")}
    assert len(found) == 9
    assert {name: found[name] for name in kept} == kept
    broken = results(folder, "collect")
    ocd(folder, "verify")
    ocd(folder, "collect", "--force")
    assert results(folder, "collect") == broken


@pytest.mark.parametrize("stage", ["train-diffusion", "train-scale"])
def test_trainings_continue_after_a_kill(ocd, ready_project, stage):
    folder = ready_project
    ocd(folder, "collect")
    checkpoints = folder.run / f"{stage}.wip" / "checkpoints"
    kill_when(folder, stage, lambda: len(list(checkpoints.glob("*.json"))) >= 2)
    ocd(folder, stage)
    log = (folder.run / stage / "log.txt").read_text()
    assert "continues from step" in log
    broken = results(folder, stage)
    ocd(folder, stage, "--force")
    assert results(folder, stage) == broken


def test_a_truncated_checkpoint_falls_back_to_the_one_before(ocd, ready_project):
    folder = ready_project
    ocd(folder, "collect")
    checkpoints = folder.run / "train-diffusion.wip" / "checkpoints"
    kill_when(folder, "train-diffusion", lambda: len(list(checkpoints.glob("*.json"))) >= 2)
    newest = max(path for path in checkpoints.glob("*.json")).with_suffix(".safetensors")
    newest.write_bytes(newest.read_bytes()[:100])
    result = ocd(folder, "train-diffusion")
    assert f"checkpoint {newest.stem} is not usable, the one before is taken" in result.stderr
    broken = results(folder, "train-diffusion")
    ocd(folder, "train-diffusion", "--force")
    assert results(folder, "train-diffusion") == broken


def test_a_kill_between_manifest_and_exchange_loses_nothing(ocd, ready_project):
    folder = ready_project
    ocd(folder, "collect")
    before = folder.files()
    (folder.run / "collect").rename(folder.run / "collect.wip")
    ocd(folder, "collect")
    assert folder.files() == before


def test_sigterm_leaves_a_run_that_continues(ready_project, ocd):
    folder = ready_project
    process = subprocess.Popen(
        command(folder, "collect"), env={**os.environ, "SLOW_FORWARD_S": "0.02"}, stderr=subprocess.PIPE, text=True
    )
    while not blocks_of(folder) and process.poll() is None:
        time.sleep(0.005)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4
    assert stderr.splitlines() == [
        "error: collect was interrupted; what is finished is kept",
        "  to continue, run the same command again",
    ]
    ocd(folder, "collect")
