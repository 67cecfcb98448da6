"""Cases in which a state, a figure or a result could quietly be wrong."""

import subprocess
import sys

import numpy as np
import torch
from collecting import base_of
from folders import blocks_of, own_task, states
from processes import stopped_at


def test_another_validation_set_changes_the_rows_of_train(ocd, finished):
    """With imported weights the base stays the same, but train is whole again: what was collected is not."""
    base = finished.run / "train-base" / "base.safetensors"
    weights = finished.root / "given.safetensors"
    weights.write_bytes(base.read_bytes())
    with_weights = ("--set", f"task.weights={weights}")
    ocd(finished, "run", "--force", *with_weights)
    changed = (f"task.weights={weights}", "task.validation=test.npz")
    assert set(states(ocd, finished, *changed).values()) == {"stale"}
    ocd(finished, "train-base", "--force", *with_weights, "--set", changed[1])
    found = states(ocd, finished, *changed)
    assert found["train-base"] == "done"
    assert {state for name, state in found.items() if name != "train-base"} == {"stale"}


def test_another_dataset_by_name_is_seen_without_loading_it(ocd, project):
    folder = project({"task": {"train": "data:one"}}, code="models", until="train-base")
    assert states(ocd, folder)["train-base"] == "done"
    assert states(ocd, folder, "task.train=data:two")["train-base"] == "stale"


def test_asking_for_less_does_not_delete_unfinished_work(ocd, project):
    folder = project({"collect": {"block_samples": 4}}, until="select-layer")
    with stopped_at(5):
        ocd(folder, "collect", code=4)
    result = ocd(folder, "collect", "--set", "collect.samples=6", code=3)
    assert "collect.samples was 'all', is now 6" in result.stderr
    assert len(blocks_of(folder)) == 5
    ocd(folder, "collect")


def test_unfinished_work_of_other_settings_is_neither_counted_nor_deleted(ocd, project):
    folder = project({"collect": {"block_samples": 4, "samples": 12}}, until="collect")
    with stopped_at(2):
        ocd(folder, "collect", "--force", "--set", "collect.steps=5", code=4)
    assert states(ocd, folder)["collect"] == "done"
    entry = ocd.json(folder, "status", "--set", "collect.samples=20")["stages"]["collect"]
    assert entry["state"] == "stale"
    assert entry["progress"] is None
    assert "collect.steps was 5, is now 2" in ocd(folder, "collect", "--set", "collect.samples=20", code=3).stderr
    assert len(blocks_of(folder)) == 2


def test_a_task_that_trains_its_base_gets_a_model_in_train_mode(ocd, project):
    folder = project({"task": own_task("task:Trained")}, code="tasks", until="train-base")
    assert base_of(folder)["1.running_mean"].abs().max() > 0


def test_random_augmentation_flat_fields_and_metrics_without_value(ocd, project):
    """A dataset that draws from torch's generator is the same in every process; a field of one number a sample is one column;
    a metric that is no number for some samples is left blank."""
    folder = project({"task": own_task("task:Normed")}, code="tasks")
    stages = ocd.json(folder, "run")["stages"]
    assert stages["infer"]["metrics"]["base"]["sometimes"] is None
    assert stages["infer"]["metrics"]["base"]["accuracy"] is not None
    assert stages["train-base"]["test"]["sometimes"] is None
    assert set(states(ocd, folder).values()) == {"done"}
    shown = ocd(folder, "infer").stdout
    assert "nan" not in shown.lower()
    store = folder.manifest("collect")["store"]
    assert store["arrays"]["keys"]["shape"][1:] == [1]


def test_imported_weights_may_move_and_are_not_forgotten(ocd, finished):
    weights = finished.root / "given.safetensors"
    weights.write_bytes((finished.run / "train-base" / "base.safetensors").read_bytes())
    ocd(finished, "train-base", "--force", "--weights", weights)
    weights.rename(finished.root / "elsewhere.safetensors")
    assert states(ocd, finished)["train-base"] == "done"
    result = ocd(finished, "train-base", "--set", "train-base.lr=0.5", code=3)
    assert f"ocd train-base --set train-base.lr=0.5 --weights {weights} --force" in result.stderr


def test_naming_the_layer_that_was_chosen_changes_nothing(ocd, finished):
    chosen = finished.read("select-layer/layer.json")["layer"]
    assert set(states(ocd, finished, f"select-layer.layer={chosen}").values()) == {"done"}
    assert "up to date" in ocd(finished, "select-layer", "--layer", chosen).stdout


def test_wide_outputs_are_pooled_and_the_store_says_so(ocd, project):
    task = {"model": "mymodel:pictures", "loss": "mse"}
    folder = project({"task": task, "select-layer": {"layer": "0.weight"}}, code="models")
    x = np.random.default_rng(0).normal(size=(10, 1, 48, 48)).astype(np.float32)
    for name in ("train", "test"):
        folder.save(f"{name}.npz", x, np.concatenate([x, x], axis=1))
    ocd(folder, "run", "--until", "collect")
    summary = folder.manifest("collect")
    assert summary["summary"]["pooled"]["base_output"] == "mean over axes [2, 3] of (2, 48, 48)"
    assert summary["store"]["arrays"]["base_output"]["shape"] == [9, 2]


def test_a_reader_that_stops_reading_is_no_fault(finished):
    command = f"{sys.executable} -m ocd_cli status --json --config {finished.config} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "fault" not in done.stderr


def test_small_trainings_take_one_thread_and_the_setting_decides_otherwise(ocd, finished):
    def threads(stage):
        return finished.manifest(stage)["made"]["threads"]

    before = torch.get_num_threads()
    assert threads("train-diffusion") == threads("train-scale") == 1
    ocd(finished, "train-scale", "--force", "--set", "run.threads=2")
    assert threads("train-scale") == 2
    assert torch.get_num_threads() == before
