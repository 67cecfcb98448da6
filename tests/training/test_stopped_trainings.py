"""Trainings that are asked to stop or killed at any instant, and the same command again: the bytes of an unbroken one."""

import random
import re
import signal
import time

import pytest
from folders import results, status
from processes import wait_until
from trainings import PRESETS, QUICK, words

from stages.foundation.interruption import deferred

# Asked to stop


def evaluated(folder):
    """The evaluations so far of an unfinished training of the denoiser: step to held-out loss."""
    if not (folder.run / "train-diffusion.wip" / "metrics.jsonl").exists():
        return {}
    return {row["step"]: row["score"] for row in folder.read("train-diffusion.wip/metrics.jsonl")}


def test_a_request_to_stop_leaves_a_checkpoint_of_that_step(ocd, untrained, start):
    """Several of them, one after the other, and the same bytes as without."""
    settings = words({**QUICK, "max_steps": 600, "evaluate_steps": 50, "checkpoint_steps": 10**6})
    wip, reached = untrained.run / "train-diffusion.wip", 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU):
        running, before = start(untrained, "train-diffusion", *settings), evaluated(untrained)
        wait_until(lambda running=running, before=before: len(evaluated(untrained)) > len(before) or running.ended())
        running.kill(number)
        said = running.wait(4).stderr
        assert "train-diffusion was interrupted; what is finished is kept\n  to continue, run the same command again" in said
        assert not reached or f"continues from step {reached:,}" in said
        earlier, reached = reached, max(int(path.stem) for path in (wip / "checkpoints").glob("*.json"))
        assert earlier + 1 < reached < 600
    found = status(ocd, untrained, *settings)["train-diffusion"]
    best = min(evaluated(untrained).values())
    progress = {"done": reached, "kept": reached, "total": 600, "unit": "steps", "best_held_out_loss": best}
    assert (found["state"], found["progress"]) == ("partial", progress)
    assert f"{reached:,} of 600 steps, best held-out loss 0." in ocd(untrained, "status", *settings).stdout
    assert f"continues from step {reached:,}" in ocd(untrained, "train-diffusion", *settings).stderr
    broken = results(untrained, "train-diffusion")
    ocd(untrained, "train-diffusion", *settings, "--force")
    assert results(untrained, "train-diffusion") == broken


def test_who_asks_twice_does_not_wait():
    # A shell's background jobs ignore it, and what they start inherits that.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), deferred() as asked:
        assert not asked()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
            assert asked()
        signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGTERM)
    with deferred():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGINT, ignored)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, before)


# Killed at any instant


def kills(ocd, folder, start, stage, settings, count, seed):
    """Kill a training `count` times at random instants; the steps of earlier processes' checkpoints that were gone on from."""
    draw, taken = random.Random(seed), set()
    wip, done = folder.run / f"{stage}.wip", folder.run / stage

    def newest():
        return max((int(path.stem) for path in (wip / "checkpoints").glob("*.json")), default=0)

    for number in range(count):
        before, running = newest(), start(folder, stage, *settings)
        if number % 4 == 3:
            # While it begins, or goes on from a checkpoint.
            wait_until(lambda running=running: (wip / "log.txt").exists() or running.ended())
        else:
            wait_until(lambda running=running, before=before: newest() > before or running.ended())
        deadline = time.monotonic() + draw.uniform(0, 0.05)
        while time.monotonic() < deadline and not running.ended():
            time.sleep(0.001)
        if running.ended():
            break
        running.kill()
        wait_until(running.ended)
        taken |= set(re.findall(r"continues from step ([\d,]+)", running.stderr))
    ocd(folder, stage, *settings)
    return taken | set(re.findall(r"continues from step ([\d,]+)", (done / "log.txt").read_text()))


KILLED = {"max_steps": 400, "evaluate_steps": 60, "checkpoint_steps": 9}


@pytest.mark.parametrize("stage", ["train-diffusion", "train-scale"])
def test_three_kills_change_nothing(ocd, untrained, start, stage):
    settings = words(KILLED, stage)
    assert kills(ocd, untrained, start, stage, settings, 3, seed=1)
    broken = results(untrained, stage)
    ocd(untrained, stage, *settings, "--force")
    assert results(untrained, stage) == broken


@pytest.mark.slow  # twenty processes for each of six trainings: about two minutes
@pytest.mark.parametrize("training", [*PRESETS, "train-scale"])
def test_twenty_kills_change_nothing(ocd, untrained, start, training):
    stage = "train-scale" if training == "train-scale" else "train-diffusion"
    long = {"mlp": 4000, "factored": 3000, "small": 1500, "paper": 700, "authors": 700, "train-scale": 5000}[training]
    table = KILLED | {"max_steps": long} | PRESETS.get(training, {})
    settings = words(table, stage)
    assert len(kills(ocd, untrained, start, stage, settings, 20, seed=len(training))) >= 5
    broken = results(untrained, stage)
    ocd(untrained, stage, *settings, "--force")
    assert results(untrained, stage) == broken
