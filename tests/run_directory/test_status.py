"""`ocd status` tells the truth: missing, partial, stale or done, and why."""

import os
import shutil

import pytest
from expectations import ALL_DONE, FOLDERS, STAGES, changes, from_on
from folders import Folder, flip
from processes import stopped_at

from stages.run_directory.folders import StageFolder


def test_nothing_run(project, states, ocd):
    folder = project()
    assert states(folder) == dict.fromkeys(STAGES, "missing")
    assert not folder.run.exists()
    text = ocd(folder, "status").stdout
    assert all(name in text for name in STAGES)


def test_everything_done(finished, status, states):
    assert states(finished) == ALL_DONE
    assert all(not entry["changed"] and not entry["progress"] for entry in status(finished).values())


def test_status_writes_nothing(finished, status):
    before = finished.files()
    status(finished)
    assert finished.files() == before


def test_one_stage_at_a_time(project, states, ocd):
    folder = project()
    for number, stage in enumerate(STAGES):
        ocd(folder, stage)
        assert list(states(folder).values()) == ["done"] * (number + 1) + ["missing"] * (5 - number)


def test_collect_killed_halfway(project, status, ocd):
    folder = project({"collect": {"block_samples": 8}})
    ocd(folder, "run", "--until", "select-layer")
    with stopped_at(2):
        ocd(folder, "collect", code=4)
    found = status(folder)
    assert {name: entry["state"] for name, entry in found.items()} == {
        **dict.fromkeys(STAGES, "missing"),
        "train-base": "done",
        "select-layer": "done",
        "collect": "partial",
    }
    assert found["collect"]["progress"] == {"done": 2, "total": 5, "unit": "blocks"}
    assert "2 of 5 blocks" in ocd(folder, "status").stdout
    # What was begun otherwise is not continued, and says so.
    found = status(folder, "--set", "collect.steps=3")
    assert found["collect"]["state"] == "stale"
    assert changes(found["collect"]) == {"collect.steps": (2, 3)}
    ocd(folder, "collect")
    assert status(folder)["collect"]["state"] == "done"


SETTINGS = {
    "run.seed": ("train-base", 1, 2),
    "task.validation_fraction": ("train-base", 0.1, 0.2),
    "train-base.lr": ("train-base", 0.01, 0.02),
    "select-layer.sigma": ("select-layer", 0.1, 0.2),
    "collect.lr": ("collect", 0.01, 0.02),
    "collect.optimizer": ("collect", "adam", "sgd"),
    "collect.steps": ("collect", 2, 1),
    "train-diffusion.prediction": ("train-diffusion", "x0", "epsilon"),
    "train-scale.loss": ("train-scale", "log", "paper"),
    "infer.strength": ("infer", 1.0, 0.5),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_changed(finished, status, states, setting):
    stage, was, now = SETTINGS[setting]
    args = ("--set", f"{setting}={now}")
    entry = status(finished, *args)[stage]
    assert changes(entry) == {setting: (was, now)}
    assert f"{setting} was {was!r}, is now {now!r}" in entry["detail"]
    assert states(finished, *args) == from_on(stage, "stale")
    # Set back, nothing has happened.
    assert states(finished) == ALL_DONE


def test_setting_changed_in_the_file(finished, states):
    finished.write({"collect": {"lr": 0.02}})
    assert states(finished) == from_on("collect", "stale")


@pytest.mark.parametrize(
    "setting",
    [
        "run.device=cpu",
        "collect.batch_size=3",
        "collect.block_samples=7",
        "train-diffusion.checkpoint_steps=7",
        "train-scale.checkpoint_steps=7",
        "infer.batch_size=5",
    ],
)
def test_execution_settings_change_nothing(finished, states, ocd, setting):
    assert states(finished, "--set", setting) == ALL_DONE
    assert "up to date" in ocd(finished, "collect", "--set", setting).stdout


# `auto`


def test_layer_by_flag_then_plain(project, states, ocd):
    folder = project()
    ocd(folder, "train-base")
    ocd(folder, "select-layer", "--layer", "0.weight")
    assert states(folder)["select-layer"] == "done"
    result = ocd.json(folder, "collect")
    assert result["layer"] == "0.weight"
    assert states(folder)["collect"] == "done"
    # Another name by flag is another wish.
    assert states(folder, "--set", "select-layer.layer=2.weight")["select-layer"] == "stale"


def test_weights_by_flag_then_plain(project, finished, status, states, ocd):
    folder = project()
    shutil.copy(finished.run / "train-base" / "base.safetensors", folder.root / "given.safetensors")
    ocd(folder, "train-base", "--weights", folder.root / "given.safetensors")
    assert states(folder)["train-base"] == "done"
    ocd(folder, "select-layer")
    assert states(folder)["select-layer"] == "done"
    flip(folder.root / "given.safetensors")
    assert list(changes(status(folder)["train-base"])) == ["content of weights"]


def test_width_found_is_kept(project, states, ocd):
    folder = project({"train-diffusion": {"width": "auto"}})
    ocd(folder, "run", "--until", "train-diffusion")
    assert states(folder)["train-diffusion"] == "done"
    width = folder.read("train-diffusion/denoiser.json")["width"]
    assert states(folder, "--set", f"train-diffusion.width={width}")["train-diffusion"] == "done"
    assert states(folder, "--set", f"train-diffusion.width={width + 2}")["train-diffusion"] == "stale"


# Where folders lie


@pytest.mark.parametrize("stage", STAGES)
def test_lone_old_folder_is_restored(finished, states, ocd, stage):
    """A power cut between the two renames of an exchange leaves only `X.old`."""
    folder = StageFolder(finished.run, FOLDERS[stage])
    os.rename(folder.path, folder.old)
    assert states(finished) == ALL_DONE
    assert "up to date" in ocd(finished, stage).stdout
    # The stages that read it do not mind, either.
    ocd(finished, "infer", "--force")
    ocd(finished, "verify")


@pytest.mark.parametrize("stage", STAGES)
def test_whole_but_not_yet_renamed(finished, states, ocd, stage):
    """A kill after the manifest was written and before the rename."""
    folder = StageFolder(finished.run, FOLDERS[stage])
    os.rename(folder.path, folder.wip)
    assert states(finished)[stage] != "missing"
    ocd(finished, stage)
    assert not folder.wip.exists()
    assert states(finished) == ALL_DONE


def test_finished_run_elsewhere(finished, project, states, ocd, tmp_path):
    """A run directory holds no path: copied with other files' times, it is as good as before."""
    shutil.copytree(finished.run, tmp_path / "copy", copy_function=shutil.copyfile)
    folder = project()
    assert states(folder, "--run", tmp_path / "copy") == ALL_DONE
    assert "up to date" in ocd(folder, "infer", "--run", tmp_path / "copy").stdout
    ocd(folder, "verify", "--run", tmp_path / "copy")
    assert not folder.run.exists()


def test_same_work_same_fingerprint_anywhere(finished_run, tmp_path_factory, ocd):
    root = tmp_path_factory.mktemp("another place") / "project"
    shutil.copytree(finished_run.root, root, ignore=shutil.ignore_patterns("run"))
    folder = Folder(root)
    ocd(folder, "run")
    for stage in STAGES:
        here, there = (f.manifest(FOLDERS[stage]) for f in (folder, finished_run))
        assert here["fingerprint"] == there["fingerprint"]
        assert here["content"] == there["content"]
        names = [name for name in here["files"] if name.endswith(".safetensors")]
        assert all(here["files"][name]["sha256"] == there["files"][name]["sha256"] for name in names)


def test_data_from_code_are_trusted_by_status_alone(project, ocd, states):
    # Status runs no code of the user's; the stages do, and find what changed.
    folder = project({"task": {"train": "data:numbers"}}, code="models")
    (folder.root / "rows.txt").write_text(" ".join(map(str, range(30))))
    ocd(folder, "run", "--until", "collect")
    assert states(folder)["collect"] == "done"
    (folder.root / "rows.txt").write_text(" ".join(map(str, range(31))))
    assert states(folder)["collect"] == "done"
    assert "content of train" in ocd(folder, "collect", code=3).stderr
