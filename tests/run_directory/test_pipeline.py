"""Every stage on a small task, twice; then one setting of each class is changed, and exactly the right stages go stale."""

import json

import numpy as np
import pytest
import zarr
from folders import states

from stages.run_directory import pipeline

# What `ocd run` does.
ORDER = tuple(name for name in pipeline.ORDER if name != "evaluate")

STALE_FROM = {
    "train-base.lr=0.5": ORDER,
    "task.validation_fraction=0.3": ORDER,
    "run.seed=7": ORDER,
    "select-layer.sigma=0.5": ORDER[1:],
    "collect.steps=1": ORDER[2:],
    "train-diffusion.lr=0.1": ("train-diffusion", "infer"),
    "train-scale.loss=paper": ("train-scale", "infer"),
    "infer.strength=0.5": ("infer",),
    "collect.batch_size=3": (),
    "collect.block_samples=7": (),
    "infer.batch_size=3": (),
    "train-diffusion.checkpoint_steps=7": (),
}


def test_every_stage_runs_then_is_up_to_date(ocd, project):
    folder = project()
    first = json.loads(ocd(folder, "run", "--json").stdout)
    before = folder.files()
    again = ocd(folder, "run", "--json")
    assert json.loads(again.stdout) == first
    assert all(f"{name}: up to date" in again.stderr for name in ORDER)
    assert folder.files() == before
    assert set(states(ocd, folder).values()) == {"done"}
    assert list(first["stages"]) == list(ORDER)


@pytest.mark.parametrize("setting", STALE_FROM)
def test_a_change_makes_exactly_the_right_stages_stale(ocd, finished, setting):
    found = states(ocd, finished, setting)
    assert {name for name, state in found.items() if state == "stale"} == set(STALE_FROM[setting])
    assert {state for name, state in found.items() if name not in STALE_FROM[setting]} <= {"done"}


@pytest.mark.parametrize(
    ("stage", "setting", "smaller", "larger"),
    [
        ("train-base", "train-base.epochs", 1, 3),
        ("train-diffusion", "train-diffusion.max_steps", 20, 60),
        ("train-scale", "train-scale.max_steps", 20, 60),
        ("infer", "infer.ensemble", 1, 4),
    ],
)
def test_extents_continue_or_go_stale(ocd, finished, stage, setting, smaller, larger):
    assert states(ocd, finished, f"{setting}={smaller}")[stage] == "stale"
    assert states(ocd, finished, f"{setting}={larger}")[stage] == "partial"
    ocd(finished, stage, "--set", f"{setting}={larger}")
    assert states(ocd, finished, f"{setting}={larger}")[stage] == "done"


def test_more_samples_keep_the_blocks_that_are_there(ocd, project):
    folder = project({"collect": {"samples": 20, "block_samples": 8}})
    ocd(folder, "run", "--until", "collect")
    kept = folder.run / "collect" / "deltas.zarr" / "delta" / "c.0.0.0"
    inode = kept.stat().st_ino
    assert states(ocd, folder, "collect.samples=30")["collect"] == "partial"
    ocd(folder, "collect", "--set", "collect.samples=30")
    assert kept.stat().st_ino == inode
    grown = folder.files()
    ocd(folder, "collect", "--set", "collect.samples=30", "--force")
    fresh = folder.files()
    chunks = [name for name in fresh if "/c." in name]
    assert chunks
    assert {name: grown[name] for name in chunks} == {name: fresh[name] for name in chunks}


def test_longer_training_equals_one_that_was_never_stopped(ocd, finished):
    longer = ("--set", "train-diffusion.max_steps=80")
    ocd(finished, "train-diffusion", *longer)
    continued = (finished.run / "train-diffusion" / "denoiser.safetensors").read_bytes()
    ocd(finished, "train-diffusion", *longer, "--force")
    assert (finished.run / "train-diffusion" / "denoiser.safetensors").read_bytes() == continued


def test_the_same_work_anywhere_has_the_same_fingerprint(ocd, project, tmp_path):
    folder = project()
    ocd(folder, "run", "--until", "collect")
    ocd(folder, "run", "--until", "collect", "--run", tmp_path / "elsewhere")
    for stage in ORDER[:3]:
        one, other = (json.loads((run / stage / "manifest.json").read_text()) for run in (folder.run, tmp_path / "elsewhere"))
        assert one["fingerprint"] == other["fingerprint"]
        assert one["content"] == other["content"]


def test_the_store_has_what_it_promises(ocd, finished):
    group = zarr.open_group(finished.run / "collect" / "deltas.zarr", mode="r")
    names = {"delta", "rho", "degenerate", "base_loss", "overfit_loss", "steps", "sample_index"}
    assert names | {"layer_input", "activation", "base_output"} == set(group.array_keys())
    delta = group["delta"][:]
    np.testing.assert_allclose(np.linalg.norm(delta.reshape(len(delta), -1), axis=1), group["rho"][:], rtol=1e-5)
    assert len(set(group["sample_index"][:].tolist())) == len(delta) == 36  # 40 rows, a tenth of them held out
    assert (group["overfit_loss"][:] < group["base_loss"][:]).mean() > 0.9


def test_a_shuffled_reading_of_collect_order_does_not_matter(ocd, project, tmp_path):
    """Another batch size gives the same deltas up to rounding."""
    folder = project()
    ocd(folder, "run", "--until", "collect")
    ocd(folder, "run", "--until", "collect", "--run", tmp_path / "other", "--set", "collect.batch_size=5")
    one, other = (
        zarr.open_group(run / "collect" / "deltas.zarr", mode="r")["delta"][:] for run in (folder.run, tmp_path / "other")
    )
    # Adam divides by the gradient's size, so that rounding in a tiny gradient shows up at up to the learning rate 0.01.
    np.testing.assert_allclose(one, other, atol=1e-4)
