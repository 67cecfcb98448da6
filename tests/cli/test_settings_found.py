"""Where settings come from: the file that is found, the environment, --set and flags; and what --force does."""

import json
import os

import pytest
from folders import states, status
from processes import redone, stopped_at, stopped_training


def test_settings_found_upward(project, ocd, monkeypatch):
    folder = project()
    (folder.root / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(folder.root / "deep" / "er")
    result = ocd(None, "train-base")
    assert f"settings: {folder.config}" in result.stderr
    assert (folder.run / "train-base" / "manifest.json").exists()
    assert os.listdir() == []


def test_settings_by_environment(project, finished, ocd, monkeypatch, tmp_path):
    folder = project()
    monkeypatch.chdir(folder.root)
    monkeypatch.setenv("OCD_CONFIG", str(finished.config))
    result = ocd(None, "status", "--json")
    assert json.loads(result.stdout)["run"] == str(finished.run)
    assert str(finished.config) in result.stderr
    # A flag goes before it, and a folder stands for the file in it.
    assert ocd.json(None, "status", "--config", folder.root)["run"] == str(folder.run)


def test_set_goes_before_the_file_and_a_flag_before_set(project, ocd):
    folder = project({"run": {"seed": 1}})

    def seed(*args):
        ocd(folder, "train-base", "--force", *args)
        manifest = folder.manifest("train-base")
        assert folder.read("run.json")["seed"] == manifest["identity"]["settings"]["run.seed"]
        return manifest["identity"]["settings"]["run.seed"]

    assert seed() == 1
    assert seed("--set", "run.seed=2") == 2
    assert seed("--set", "run.seed=2", "--set", "run.seed=3") == 3
    assert seed("--set", "run.seed=2", "--seed", 4) == 4


def test_seed_is_part_of_every_result(finished, ocd):
    found = status(ocd, finished, "--seed", 2)
    assert {entry["state"] for entry in found.values()} == {"stale"}
    for entry in found.values():
        assert {"setting": "run.seed", "was": 1, "now": 2} in entry["changed"]


def test_other_seed_other_result(finished, project, ocd):
    folder = project()
    ocd(folder, "run", "--seed", 2)
    for stage in ("train-base", "collect", "train-diffusion", "train-scale", "infer/test"):
        contents = {f.manifest(stage)["content"] for f in (folder, finished)}
        assert len(contents) == 2


@pytest.mark.parametrize("how", ["flag", "file"])
def test_run_directory(project, ocd, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    if how == "flag":
        # Relative to where one is, as paths on a command line are.
        folder, place = project(), tmp_path / "elsewhere"
        ocd(folder, "train-base", "--run", "elsewhere")
    else:
        folder = project({"run": {"directory": "results/first"}})
        place = folder.root / "results" / "first"
        ocd(folder, "train-base")
    assert (place / "train-base" / "manifest.json").exists()
    assert not folder.run.exists()


def test_values_of_set_are_toml_or_words(project, ocd):
    folder = project()
    args = ("--set", "task.model_args.width=5", "--set", "collect.optimizer=sgd", "--set", 'collect.split="all"')
    ocd(folder, "run", "--until", "collect", *args)
    settings = folder.manifest("collect")["identity"]["settings"]
    assert settings["task.model_args"] == {"width": 5}
    assert settings["collect.optimizer"] == "sgd"
    assert settings["collect.split"] == "all"


@pytest.mark.parametrize(
    "setting",
    [
        "collect.samples=all",
        "collect.batch_size=auto",
        "collect.block_samples=auto",
        "train-diffusion.width=auto",
        "infer.batch_size=auto",
    ],
)
def test_defaults_that_are_words_may_be_given(finished_run, ocd, setting):
    ocd(finished_run, "status", "--set", setting)


@pytest.mark.parametrize("stage", ["collect", "train-scale"])
def test_forced_work_keeps_the_old_until_the_new_is_whole(finished, ocd, stage):
    before = finished.files()
    with stopped_at(0) if stage == "collect" else stopped_training(after=0):
        ocd(finished, stage, "--force", code=4)
    kept = {name: data for name, data in finished.files().items() if ".wip/" not in name}
    assert kept == before
    assert set(states(ocd, finished).values()) == {"done"}
    ocd(finished, stage, "--force")
    assert not (finished.run / f"{stage}.wip").exists()
    assert not (finished.run / f"{stage}.old").exists()


def test_force_redoes_from_scratch(project, ocd):
    folder = project({"collect": {"block_samples": 8}}, until="collect")
    assert redone(ocd, folder, "collect", "--force") == [0, 1, 2, 3, 4]
