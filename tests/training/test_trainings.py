"""Trainings: where the store lies, how a batch is divided, when they are asked to stop, what they do when a loss is lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from folders import reader_of, results
from processes import wait_until

from ocd_cli.progress import CURVE_WIDTH, Curve
from stages.foundation.errors import ComputeError
from stages.foundation.interruption import deferred
from stages.foundation.progress import Silent
from stages.training.batches import TrainingBatches
from stages.training.denoiser import decide
from stages.training.denoising_steps import DenoisingSteps
from stages.training.run import Plan, TrainingRun
from stages.training.trainer import Stream, Trainer

# Small, and with checkpoints and evaluations that do not fall together.
QUICK = {"max_steps": 40, "evaluate_steps": 16, "checkpoint_steps": 7, "batch_size": 9}
PRESETS = {
    "mlp": {"preset": "mlp", "width": 16},
    "factored": {"preset": "factored", "width": 16, "rank": 2},
    "small": {"preset": "small", "width": 8, "multipliers": [1, 2]},
    "paper": {"preset": "paper", "width": 8, "multipliers": [1, 1, 2]},
    "authors": {"preset": "authors", "width": 8, "multipliers": [1, 2], "pad_to": 16},
}


def words(table):
    return [word for key, value in table.items() for word in ("--set", f"train-diffusion.{key}={value}")]


@pytest.fixture
def quick(finished):
    """A finished project whose trainings are yet to be done."""
    for stage in ("train-diffusion", "train-scale"):
        for path in sorted((finished.run / stage).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (finished.run / stage).rmdir()
    return finished


# Where the rows lie


def rows_of(folder, **options):
    settings = {"deltas": True, "held_out": 0.1, "batch_size": 7, "seed": 3, "device": torch.device("cpu"), "memory": "auto"}
    return TrainingBatches(reader_of(folder), **(settings | options))


@pytest.mark.parametrize("deltas", [True, False])
@pytest.mark.parametrize("step", [0, 11])
def test_rows_from_the_disk_are_those_from_memory(collected, monkeypatch, deltas, step):
    """Also where a buffer holds two of the nine blocks."""
    monkeypatch.setattr("stages.training.batches.BUFFER_BYTES", 2 * 4 * 4 * (18 if deltas else 9))
    memory, disk = rows_of(collected, deltas=deltas), rows_of(collected, deltas=deltas, memory=0)
    assert (memory.place, disk.place) == ("kept in memory", "read from the disk while training")
    pairs = [(memory.held_out, disk.held_out), *zip(memory.batches(step), disk.batches(step), range(12), strict=False)]
    for one, other, *_ in pairs:
        assert torch.equal(one.numbers, other.numbers)
        assert torch.equal(one.rho, other.rho)
        assert (one.deltas is None) == (other.deltas is None) == (not deltas)
        assert not deltas or torch.equal(one.deltas, other.deltas)
        assert all(torch.equal(value, other.fields[name]) for name, value in one.fields.items())


def test_batches_are_the_stores_rows_and_epochs_permutations(collected):
    rows, reader = rows_of(collected), reader_of(collected)
    delta, seen = reader.read("delta"), []
    for batch, _ in zip(rows.batches(0), range(rows.count), strict=False):
        assert np.array_equal(batch.deltas.numpy(), delta[batch.numbers.numpy()])
        seen += batch.numbers.tolist()
    held = set(rows.held_out.numbers.tolist())
    for epoch in range(7):
        part = seen[epoch * rows.count : (epoch + 1) * rows.count]
        assert len(set(part)) == rows.count
        assert not held & set(part)
    assert seen[: rows.count] != seen[rows.count : 2 * rows.count]


def test_a_later_step_begins_where_it_would_have_come(collected):
    rows = rows_of(collected)
    whole = [batch.numbers for batch, _ in zip(rows.batches(0), range(20), strict=False)]
    later = [batch.numbers for batch, _ in zip(rows.batches(13), range(7), strict=False)]
    assert all(torch.equal(one, other) for one, other in zip(whole[13:], later, strict=True))
    share = [batch.numbers for batch, _ in zip(rows.batches(13, slice(2, 5)), range(7), strict=False)]
    assert all(torch.equal(one[2:5], other) for one, other in zip(whole[13:], share, strict=True))


@pytest.mark.parametrize("stage", ["train-diffusion", "train-scale"])
def test_a_store_too_large_for_memory_is_read_meanwhile(ocd, quick, monkeypatch, stage):
    ocd(quick, stage, *words(QUICK))
    wanted = results(quick, stage)
    monkeypatch.setattr("stages.training.batches.available_memory", lambda: 0)
    ocd(quick, stage, *words(QUICK), "--force")
    assert results(quick, stage) == wanted


def test_where_the_store_is_kept_is_said(ocd, quick):
    said = ocd(quick, "train-diffusion", *words(QUICK | {"store_memory": 0})).stderr
    assert "mlp, 1,474 parameters; the store is read from the disk while training" in said or "the store is read from" in said


# Dividing a batch


@pytest.mark.parametrize("preset", ["mlp", "small"])
def test_micro_batches_add_up_to_the_batch(ocd, quick, preset):
    def scores(*more):
        ocd(quick, "train-diffusion", *words(QUICK | PRESETS[preset]), *more, "--force")
        lines = (quick.run / "train-diffusion" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    whole, parts = scores("--set", "train-diffusion.micro_batch_size=9"), scores("--set", "train-diffusion.micro_batch_size=2")
    for one, other in zip(whole, parts, strict=True):
        # Sums of nine in another order, over forty steps.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["score"] == pytest.approx(other["score"], rel=1e-3)


def test_memory_that_runs_out_halves_the_micro_batch(ocd, quick, monkeypatch):
    errors, sizes = DenoisingSteps._errors, []

    def small(self, rows, *rest):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return errors(self, rows, *rest)

    ocd(quick, "train-diffusion", *words(QUICK))
    wanted = [json.loads(line) for line in (quick.run / "train-diffusion" / "metrics.jsonl").read_text().splitlines()]
    monkeypatch.setattr(DenoisingSteps, "_errors", small)
    said = ocd(quick, "train-diffusion", *words(QUICK), "--force").stderr
    assert "memory ran out: from here on 3 deltas at once" in said
    assert sizes[:3] == [9, 5, 3]
    found = [json.loads(line) for line in (quick.run / "train-diffusion" / "metrics.jsonl").read_text().splitlines()]
    # The same sums in another order.
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], rel=1e-4)


def ranks(folder, count, *more, timeout=120):
    """Run train-diffusion under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m", "ocd_cli"]
    command += ["train-diffusion", "--config", folder.config, "--device", "cpu", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OCD_RANKS_TIMEOUT": "60"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout)


TUNED = {"tune_after": 20, "tune_samples": 3}


# Four starts of torch: 20 s.
@pytest.mark.parametrize(("preset", "more"), [("mlp", TUNED), pytest.param("small", {}, marks=pytest.mark.slow)])
def test_two_ranks_train_as_one_process(ocd, quick, preset, more):
    """Nine rows of a batch: one rank has four, the other five; of three that are tuned one and two."""

    def metrics():
        lines = (quick.run / "train-diffusion" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    wanted = QUICK | PRESETS[preset] | more
    settings = words(wanted)
    ocd(quick, "train-diffusion", *settings)
    alone = metrics()
    done = ranks(quick, 2, *settings, "--force")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train-diffusion: done") == 1
    for one, other in zip(alone, metrics(), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["score"] == pytest.approx(one["score"], abs=1e-4)
    # One process goes on where two were.
    assert "continues from step 40" in ocd(quick, "train-diffusion", *words(wanted | {"max_steps": 50})).stderr


# Asked to stop


def test_a_request_to_stop_leaves_a_checkpoint_of_that_step(ocd, quick, start):
    """Several of them, one after the other, and the same bytes as without."""
    settings = words({**QUICK, "max_steps": 600, "evaluate_steps": 50, "checkpoint_steps": 10**6})
    wip, reached = quick.run / "train-diffusion.wip", 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU):
        running, before = start(quick, "train-diffusion", *settings), evaluated(wip)
        wait_until(lambda running=running, before=before: len(evaluated(wip)) > len(before) or running.ended())
        running.kill(number)
        said = running.wait(4).stderr
        assert "train-diffusion was interrupted; what is finished is kept\n  to continue, run the same command again" in said
        assert not reached or f"continues from step {reached:,}" in said
        earlier, reached = reached, max(int(path.stem) for path in (wip / "checkpoints").glob("*.json"))
        assert earlier + 1 < reached < 600
    found = ocd.json(quick, "status", *settings)["stages"]["train-diffusion"]
    best = min(evaluated(wip).values())
    progress = {"done": reached, "kept": reached, "total": 600, "unit": "steps", "best_held_out_loss": best}
    assert (found["state"], found["progress"]) == ("partial", progress)
    assert f"{reached:,} of 600 steps, best held-out loss 0." in ocd(quick, "status", *settings).stdout
    assert f"continues from step {reached:,}" in ocd(quick, "train-diffusion", *settings).stderr
    broken = results(quick, "train-diffusion")
    ocd(quick, "train-diffusion", *settings, "--force")
    assert results(quick, "train-diffusion") == broken


def evaluated(wip):
    """The evaluations so far: step to held-out loss."""
    path = wip / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["step"]: row["score"] for row in map(json.loads, lines)}


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


# Checkpoints


class Counter:
    """Takes steps that do nothing, slowly if asked to."""

    def __init__(self, losses=None, delay=0.0):
        self.step, self._losses, self._delay = 0, losses or {}, delay

    def advance(self):
        time.sleep(self._delay)
        loss = self._losses.get(self.step + 1, 1.0)
        self.step += bool(np.isfinite(loss))
        return loss

    def state(self):
        return {"step": torch.tensor(self.step)}

    snapshot = state

    def restore(self, tensors, step):
        assert int(tensors["step"]) == step
        self.step = step


def run_of(folder, counter, blame=lambda: "", **plan):
    plan = Plan(**({"max_steps": 20, "evaluate_steps": 5, "checkpoint_steps": 6, "patience": 0} | plan))
    score = {"score": 1.0}
    return TrainingRun(folder, "print", counter, lambda: score, plan, Silent(), blame)


@pytest.mark.parametrize(("until", "steps"), [(0, 15), (12, 20), (20, 30)])
def test_patience_waits_no_sooner_than_it_is_told(tmp_path, until, steps):
    ended = run_of(tmp_path, Counter(), max_steps=60, patience=2, patient_until=until).run()
    assert (ended.steps, ended.stopped_early) == (steps, True)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    kept = []

    class Watched(Counter):
        def advance(self):
            kept.append(sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.json")))
            return super().advance()

    run_of(tmp_path, Watched()).run()
    assert kept[-1] == ["00000012", "00000018"]
    assert max(map(len, kept)) == 2
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.json")] == ["00000020"]


def test_there_is_a_checkpoint_every_few_minutes(tmp_path):
    counter = Counter(losses={9: float("nan")}, delay=0.02)
    with pytest.raises(ComputeError):
        run_of(tmp_path, counter, checkpoint_steps=10**6, checkpoint_minutes=0.03 / 60).run()
    # Two steps take longer than three hundredths of a second.
    assert max(int(path.stem) for path in (tmp_path / "checkpoints").glob("*.json")) >= 6


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (float("nan"), "the loss of step 9 is nan (blamed); the checkpoint of step 6 is kept"),
        (float("inf"), "the loss of step 9 is inf (blamed); the checkpoint of step 6 is kept"),
        (123.0, "the loss of step 9 is 123, more than 100: it has exploded (blamed); the checkpoint of step 6 is kept"),
    ],
)
def test_a_lost_loss_stops(tmp_path, loss, says):
    run = run_of(tmp_path, Counter({9: loss}), lambda: " (blamed)", largest_loss=100.0, advice="try this")
    with pytest.raises(ComputeError) as error:
        run.run()
    assert (error.value.message, error.value.hint) == (says, "try this")
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.json")] == ["00000006"]
    assert run_of(tmp_path, Counter()).run().steps == 20


def test_tensors_without_their_record_go(tmp_path):
    """What a kill between the two leaves."""
    counter = Counter(losses={19: float("nan")})
    with pytest.raises(ComputeError):
        run_of(tmp_path, counter).run()
    (tmp_path / "checkpoints" / "00000014.safetensors").write_bytes(b"half")
    run_of(tmp_path, Counter()).run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("0*")) == ["00000020.json", "00000020.safetensors"]


def test_a_damaged_snapshot_falls_back(tmp_path):
    counter = Counter(losses={19: float("nan")})
    with pytest.raises(ComputeError):
        run_of(tmp_path, counter).run()
    best = tmp_path / "checkpoints" / "best-00000005.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    assert run_of(tmp_path, Counter()).run().snapshot.read_bytes()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 5


@pytest.mark.parametrize(("stage", "smaller"), [("train-diffusion", "0.000175"), ("train-scale", "0.00025")])
def test_the_samples_are_named(ocd, quick, monkeypatch, stage, smaller):
    """One sample's conditioning is not finite: its number in the user's training set is said, and the first checkpoint kept."""
    some, bad = TrainingBatches._some, []

    def broken(self, rows):
        found = some(self, rows)
        if len(rows) == 9 and not bad:
            bad.append(int(found.numbers[4]))
        at = [i for i, number in enumerate(found.numbers.tolist()) if number in bad and len(rows) == 9]
        found.fields["layer_input"][at] = float("nan")
        return found

    monkeypatch.setattr(TrainingBatches, "_some", broken)
    said = ocd(quick, stage, *[word.replace("train-diffusion", stage) for word in words(QUICK)], code=1).stderr
    number = int(reader_of(quick).read("sample_index")[bad[0]])
    assert f"error: the loss of step 1 is nan (samples {number})\n" in said
    assert f"try a smaller learning rate: --set {stage}.lr={smaller} --force" in said
    assert not (quick.run / f"{stage}.wip").exists()


def test_gradients_that_are_not_finite_do_not_reach_the_weights():
    network = torch.nn.Linear(2, 1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    # sqrt has an infinite slope at zero, where its value is fine.
    trainer = Trainer(
        network, torch.optim.SGD(network.parameters(), lr=1.0), lambda step: iter([(network.weight.sum() * 0).sqrt()])
    )
    assert np.isnan(trainer.advance())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_moments_come_back_in_the_weights_own_memory_format():
    """A U-Net on a GPU has its weights in channels_last; fused steps would mix up moments that lie otherwise."""

    def make():
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 5, (4, 2)).to(memory_format=torch.channels_last)
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        return Trainer(network, optimizer, lambda step: iter([network(x + step).square().mean()]))

    whole, first, second = make(), make(), make()
    losses = [whole.advance() for _ in range(6)]
    for _ in range(3):
        first.advance()
    second.restore({name: value.clone(memory_format=torch.contiguous_format) for name, value in first.state().items()}, 3)
    weight = second.network.weight
    assert second.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert [second.advance() for _ in range(3)] == losses[3:]


def test_a_stream_is_opened_once_and_anew_where_steps_do_not_follow():
    opened = []

    def items(step):
        opened.append(step)
        while True:
            yield step
            step += 1

    stream = Stream(items)
    assert [stream.at(step) for step in (3, 4, 4, 5, 9, 10)] == [3, 4, 4, 5, 9, 10]
    assert opened == [3, 9]


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
def test_three_kills_change_nothing(ocd, quick, start, stage):
    settings = [word.replace("train-diffusion", stage) for word in words(KILLED)]
    assert kills(ocd, quick, start, stage, settings, 3, seed=1)
    broken = results(quick, stage)
    ocd(quick, stage, *settings, "--force")
    assert results(quick, stage) == broken


@pytest.mark.slow  # twenty processes for each of six trainings: about two minutes
@pytest.mark.parametrize("training", [*PRESETS, "train-scale"])
def test_twenty_kills_change_nothing(ocd, quick, start, training):
    stage = "train-scale" if training == "train-scale" else "train-diffusion"
    long = {"mlp": 4000, "factored": 3000, "small": 1500, "paper": 700, "authors": 700, "train-scale": 5000}[training]
    table = KILLED | {"max_steps": long} | PRESETS.get(training, {})
    settings = [word.replace("train-diffusion", stage) for word in words(table)]
    assert len(kills(ocd, quick, start, stage, settings, 20, seed=len(training))) >= 5
    broken = results(quick, stage)
    ocd(quick, stage, *settings, "--force")
    assert results(quick, stage) == broken


# What people see


def test_the_curve_is_one_line_of_averages():
    curve = Curve()
    assert str(curve) == ""
    for value in np.geomspace(1.0, 1e-3, 1000):
        curve.add(float(value))
    shown = str(curve)
    assert CURVE_WIDTH / 2 <= len(shown) <= CURVE_WIDTH
    assert (shown[0], shown[-1]) == ("█", "▁")
    assert list(shown) == sorted(shown, reverse=True)
    flat = Curve()
    for _ in range(3):
        flat.add(-2.0)
    flat.add(float("nan"))
    assert str(flat) == "▁▁▁"


def test_automatic_presets(finished, monkeypatch):
    """`paper` on a GPU that has room for it, `mlp` on another and on a CPU."""
    from stages.run_directory.project import load_project

    project = load_project(finished.config)
    store = reader_of(finished).description

    def preset(device):
        auto = {"preset": "auto", "width": "auto", "blocks": "auto", "batch_size": "auto"}
        return decide(project, store, auto, torch.device(device)).decided

    assert (preset("cpu")["preset"], preset("cpu")["precision"]) == ("mlp", "float32")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (140 << 30, 140 << 30))
    assert (preset("cuda")["preset"], preset("cuda")["precision"]) == ("paper", "bfloat16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2 << 30, 2 << 30))
    assert preset("cuda")["preset"] == "mlp"


@pytest.mark.slow  # compiling takes half a minute
def test_a_compiled_denoiser_trains_as_it_does_otherwise(ocd, quick):
    def losses(*more):
        ocd(quick, "train-diffusion", *words(QUICK), *more, "--force")
        lines = (quick.run / "train-diffusion" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    # Fused products round in another order.
    assert losses("--set", "train-diffusion.compile=true") == pytest.approx(losses(), rel=1e-4)
