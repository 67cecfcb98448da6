"""Whole trainings: in micro-batches, on several ranks, compiled, of an automatic preset, with a sample that is no number."""

import os
import subprocess
import sys

import pytest
import torch
from folders import reader_of
from trainings import PRESETS, QUICK, losses_of, words

from stages.diffusion.denoisers import auto_preset
from stages.foundation.tensors import load_tensors
from stages.run_directory.project import load_project
from stages.training.batches import TrainingBatches
from stages.training.denoiser import decide


@pytest.mark.parametrize("preset", ["mlp", "small"])
def test_micro_batches_add_up_to_the_batch(ocd, untrained, preset):
    def losses(rows):
        return losses_of(ocd, untrained, *words(QUICK | PRESETS[preset] | {"micro_batch_size": rows}))

    (whole, held_out), (parts, of_parts) = losses(9), losses(2)
    # Sums of nine in another order, over forty steps.
    assert whole == pytest.approx(parts, rel=1e-4)
    assert held_out == pytest.approx(of_parts, rel=1e-3)


def ranks(folder, count, *more, timeout=120):
    """Run train-diffusion under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m", "ocd_cli"]
    command += ["train-diffusion", "--config", folder.config, "--device", "cpu", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OCD_RANKS_TIMEOUT": "60"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout)


TUNED = {"tune_after": 20, "tune_samples": 3}
# Evaluated so often that it begins.
BY_ITSELF = TUNED | {"tune_after": "auto", "evaluate_steps": 3}


# Four starts of torch: 20 s.
@pytest.mark.parametrize(
    ("preset", "more"), [("mlp", TUNED), ("mlp", BY_ITSELF), pytest.param("small", {}, marks=pytest.mark.slow)]
)
def test_two_ranks_train_as_one_process(ocd, untrained, preset, more):
    """Nine rows of a batch: one rank has four, the other five; of three that are tuned one and two."""
    wanted = QUICK | PRESETS[preset] | more
    ocd(untrained, "train-scale", "--quiet")
    losses, scores = losses_of(ocd, untrained, *words(wanted))
    weights = load_tensors(untrained.run / "train-diffusion" / "denoiser.safetensors")
    done = ranks(untrained, 2, *words(wanted), "--force")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train-diffusion: done") == 1
    began = untrained.read("train-diffusion/manifest.json")["summary"].get("tuned_from")
    assert began is None if preset == "small" else 0 < began < 40
    rows = untrained.read("train-diffusion/metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-4)
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)
    # Sums in another order, forty steps long.
    for name, value in load_tensors(untrained.run / "train-diffusion" / "denoiser.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    # One process goes on where two were.
    assert "continues from step 40" in ocd(untrained, "train-diffusion", *words(wanted | {"max_steps": 50})).stderr


@pytest.mark.parametrize(("stage", "smaller"), [("train-diffusion", "0.000175"), ("train-scale", "0.00025")])
def test_the_samples_are_named(ocd, untrained, monkeypatch, stage, smaller):
    """One sample's conditioning is not finite: its number in the user's training set is said, and the first checkpoint kept."""
    batches, bad = TrainingBatches.batches, []

    def broken(self, *where):
        for found in batches(self, *where):
            bad.append(int(found.numbers[4]))
            found.fields["layer_input"][found.numbers == bad[0]] = float("nan")
            yield found

    monkeypatch.setattr(TrainingBatches, "batches", broken)
    said = ocd(untrained, stage, *words(QUICK, stage), code=1).stderr
    number = int(reader_of(untrained).read("sample_index")[bad[0]])
    assert f"error: the loss of step 1 is nan (samples {number})\n" in said
    assert f"try a smaller learning rate: --set {stage}.lr={smaller} --force" in said
    assert not (untrained.run / f"{stage}.wip").exists()


def test_the_automatic_preset_is_the_same_on_every_device(finished):
    project, store = load_project(finished.config), reader_of(finished).description
    on_cpu, on_gpu = (decide(project, store, {}, torch.device(device)).decided for device in ("cpu", "cuda"))
    assert (on_cpu.pop("precision"), on_gpu.pop("precision")) == ("float32", "bfloat16")
    assert on_cpu == on_gpu


@pytest.mark.parametrize(("shape", "preset"), [((10, 32), "mlp"), ((64, 64), "mlp"), ((84, 120), "factored")])
def test_small_deltas_get_the_mlp(shape, preset):
    assert auto_preset(shape) == preset
    assert auto_preset(shape, factors=True) == "vector"


@pytest.mark.slow  # compiling takes half a minute
def test_a_compiled_denoiser_trains_as_it_does_otherwise(ocd, untrained):
    compiled = losses_of(ocd, untrained, *words(QUICK | {"compile": "true"}))[0]
    # Fused products round in another order.
    assert compiled == pytest.approx(losses_of(ocd, untrained, *words(QUICK))[0], rel=1e-4)
