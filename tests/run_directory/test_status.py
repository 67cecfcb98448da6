"""`ocd status` tells the truth: missing, partial, stale or done, and why."""

import os
import shutil

import pytest
from expectations import ALL_DONE, FOLDERS, STAGES, changes, from_on
from folders import Folder, flip, states, status
from processes import stopped_at

from stages.run_directory.folders import StageFolder
from stages.run_directory.format import Manifest
from stages.run_directory.pipeline import identity_settings, spec_of
from stages.run_directory.project import load_project


def test_nothing_run_and_then_one_stage_after_another(project, ocd):
    folder = project()
    assert states(ocd, folder) == dict.fromkeys(STAGES, "missing")
    assert not folder.run.exists()
    text = ocd(folder, "status").stdout
    assert all(name in text for name in STAGES)
    for number, stage in enumerate(STAGES):
        ocd(folder, stage)
        assert list(states(ocd, folder).values()) == ["done"] * (number + 1) + ["missing"] * (5 - number)


def test_everything_done(finished, ocd):
    """Looking writes nothing."""
    before = finished.files()
    assert states(ocd, finished) == ALL_DONE
    assert all(not entry["changed"] and not entry["progress"] for entry in status(ocd, finished).values())
    assert finished.files() == before


def test_collect_killed_halfway(project, ocd):
    folder = project({"collect": {"block_samples": 8}}, until="select-layer")
    with stopped_at(2):
        ocd(folder, "collect", code=4)
    assert list(states(ocd, folder).values()) == ["done", "done", "partial", "missing", "missing", "missing"]
    assert status(ocd, folder)["collect"]["progress"] == {"done": 2, "total": 5, "unit": "blocks"}
    assert "2 of 5 blocks" in ocd(folder, "status").stdout
    # What was begun otherwise is not continued, and says so.
    found = status(ocd, folder, "--set", "collect.steps=3")
    assert found["collect"]["state"] == "stale"
    assert changes(found["collect"]) == {"collect.steps": (2, 3)}
    ocd(folder, "collect")
    assert status(ocd, folder)["collect"]["state"] == "done"


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
def test_setting_changed(finished, setting, ocd):
    stage, was, now = SETTINGS[setting]
    entry = status(ocd, finished, "--set", f"{setting}={now}")[stage]
    assert changes(entry) == {setting: (was, now)}
    assert f"{setting} was {was!r}, is now {now!r}" in entry["detail"]
    assert states(ocd, finished, f"{setting}={now}") == from_on(stage, "stale")
    # Set back, nothing has happened.
    assert states(ocd, finished) == ALL_DONE


def test_setting_changed_in_the_file(finished, ocd):
    finished.write({"collect": {"lr": 0.02}})
    assert states(ocd, finished) == from_on("collect", "stale")


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
def test_execution_settings_change_nothing(finished, ocd, setting):
    assert states(ocd, finished, setting) == ALL_DONE
    assert "up to date" in ocd(finished, "collect", "--set", setting).stdout


# `auto`


def test_weights_by_flag_then_plain(project, finished, ocd):
    folder = project()
    shutil.copy(finished.run / "train-base" / "base.safetensors", folder.root / "given.safetensors")
    ocd(folder, "train-base", "--weights", folder.root / "given.safetensors")
    assert states(ocd, folder)["train-base"] == "done"
    ocd(folder, "select-layer")
    assert states(ocd, folder)["select-layer"] == "done"
    flip(folder.root / "given.safetensors")
    assert list(changes(status(ocd, folder)["train-base"])) == ["content of weights"]


def test_width_found_is_kept(project, ocd):
    folder = project({"train-diffusion": {"width": "auto"}}, until="train-diffusion")
    assert states(ocd, folder)["train-diffusion"] == "done"
    width = folder.read("train-diffusion/denoiser.json")["width"]
    assert states(ocd, folder, f"train-diffusion.width={width}")["train-diffusion"] == "done"
    assert states(ocd, folder, f"train-diffusion.width={width + 2}")["train-diffusion"] == "stale"


# Where folders lie


@pytest.mark.parametrize("stage", STAGES)
def test_lone_old_folder_is_restored(finished, ocd, stage):
    """A power cut between the two renames of an exchange leaves only `X.old`."""
    folder = StageFolder(finished.run, FOLDERS[stage])
    os.rename(folder.path, folder.old)
    assert states(ocd, finished) == ALL_DONE
    assert "up to date" in ocd(finished, stage).stdout
    # The stages that read it do not mind, either.
    ocd(finished, "infer", "--force")
    ocd(finished, "verify")


@pytest.mark.parametrize("stage", STAGES)
def test_whole_but_not_yet_renamed(finished, ocd, stage):
    """A kill after the manifest was written and before the rename."""
    folder = StageFolder(finished.run, FOLDERS[stage])
    os.rename(folder.path, folder.wip)
    assert states(ocd, finished)[stage] != "missing"
    ocd(finished, stage)
    assert not folder.wip.exists()
    assert states(ocd, finished) == ALL_DONE


def test_finished_run_elsewhere(finished, project, ocd, tmp_path):
    """A run directory holds no path: copied with other files' times, it is as good as before."""
    shutil.copytree(finished.run, tmp_path / "copy", copy_function=shutil.copyfile)
    folder = project()
    assert {entry["state"] for entry in status(ocd, folder, "--run", tmp_path / "copy").values()} == {"done"}
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


def test_data_from_code_are_trusted_by_status_alone(project, ocd):
    # Status runs no code of the user's; the stages do, and find what changed.
    folder = project({"task": {"train": "data:numbers"}}, code="models")
    (folder.root / "rows.txt").write_text(" ".join(map(str, range(30))))
    ocd(folder, "run", "--until", "collect")
    assert states(ocd, folder)["collect"] == "done"
    (folder.root / "rows.txt").write_text(" ".join(map(str, range(31))))
    assert states(ocd, folder)["collect"] == "done"
    assert "content of train" in ocd(folder, "collect", code=3).stderr


def test_a_setting_that_came_later_makes_nothing_stale_by_its_default(finished):
    """A stage of an earlier version does not record it: by its default it is what it was, and by another value it is not."""
    for overrides, heard in ((), False), (["train-diffusion.neighbours=3"], True):
        project = load_project(finished.config, overrides=overrides)
        spec, manifest = spec_of(project, "train-diffusion"), Manifest.read(finished.run / "train-diffusion/manifest.json")
        known = {key: value for key, value in manifest.identity.settings.items() if "neighbours" not in key}
        before = manifest.changed(identity=manifest.identity.changed(settings=known))
        assert ("train-diffusion.neighbours" in identity_settings(project, spec, before)) == heard
        assert "train-diffusion.neighbours" in identity_settings(project, spec, manifest)
