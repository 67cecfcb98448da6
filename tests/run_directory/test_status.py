"""`ocd status` tells the truth: missing, partial, stale or done, and why."""

import json
import os
import shutil

import pytest
from folders import Folder, flip
from processes import stopped_at

from stages.run_directory.folders import StageFolder

STAGES = ("train-base", "select-layer", "collect", "train-diffusion", "train-scale", "infer")
ALL_DONE = dict.fromkeys(STAGES, "done")


@pytest.fixture
def status(ocd):
    """The stages of `ocd status --json`; its exit code is 0 whatever the states."""

    def call(folder, *args):
        return json.loads(ocd(folder, "status", "--json", *args).stdout)["stages"]

    return call


@pytest.fixture
def states(status):
    """Each stage's state."""

    def call(folder, *args):
        return {name: entry["state"] for name, entry in status(folder, *args).items()}

    return call


def from_on(first, state, rest="done"):
    """The states where `first` has one, and what reads it is stale."""
    reads = {
        "train-base": STAGES[1:],
        "select-layer": ("collect", "train-diffusion", "train-scale", "infer"),
        "collect": ("train-diffusion", "train-scale", "infer"),
        "train-diffusion": ("infer",),
        "train-scale": ("infer",),
        "infer": (),
    }[first]
    return {name: state if name == first else "stale" if name in reads else rest for name in STAGES}


def changes(entry):
    return {change["setting"]: (change["was"], change["now"]) for change in entry["changed"]}


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


# Extents

EXTENTS = [
    ("train-base.epochs", "train-base", 2, 3, 1),
    ("collect.samples", "collect", 20, 30, 10),
    ("train-diffusion.max_steps", "train-diffusion", 40, 60, 20),
    ("train-scale.max_steps", "train-scale", 40, 60, 20),
    ("infer.ensemble", "infer", 2, 3, 1),
]


@pytest.fixture(scope="module")
def few_samples(finished_run, tmp_path_factory, ocd):
    """A finished run over some of the training set, so that it can be extended; not to be changed."""
    root = tmp_path_factory.mktemp("few") / "project"
    shutil.copytree(finished_run.root, root)
    folder = Folder(root)
    for stage in STAGES[2:]:
        shutil.rmtree(folder.run / stage)
    folder.write({"collect": {"samples": 20}})
    ocd(folder, "run")
    return folder


@pytest.fixture
def extendable(few_samples, tmp_path):
    shutil.copytree(few_samples.root, tmp_path / "few")
    return Folder(tmp_path / "few")


@pytest.mark.parametrize(("setting", "stage", "value", "larger", "smaller"), EXTENTS)
def test_extents(extendable, status, states, ocd, setting, stage, value, larger, smaller):
    assert states(extendable) == ALL_DONE
    # Smaller is less than there is.
    found = status(extendable, "--set", f"{setting}={smaller}")
    assert found[stage]["state"] == "stale"
    assert changes(found[stage]) == {setting: (value, smaller)}
    # Larger is more of the same.
    found = status(extendable, "--set", f"{setting}={larger}")
    assert found[stage]["state"] == "partial"
    assert changes(found[stage]) == {setting: (value, larger)}
    assert states(extendable, "--set", f"{setting}={larger}") == from_on(stage, "partial")
    ocd(extendable, stage, "--set", f"{setting}={larger}")
    assert states(extendable, "--set", f"{setting}={larger}")[stage] == "done"
    # Now the former value is the smaller one.
    assert states(extendable)[stage] == "stale"


def test_extended_equals_whole(extendable, finished, ocd):
    """Twenty samples and then all are the same store as all at once."""
    ocd(extendable, "collect", "--set", "collect.samples=all")
    contents = [json.loads((f.run / "collect" / "manifest.json").read_text())["content"] for f in (extendable, finished)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("stage", "setting"), [("train-diffusion", "max_steps"), ("train-scale", "max_steps"), ("train-base", "epochs")]
)
def test_extended_training_equals_whole(finished, project, ocd, stage, setting):
    more = {"max_steps": 60, "epochs": 3}[setting]
    args = ("--set", f"{stage}.{setting}={more}")
    ocd(finished, stage, *args)
    extended = json.loads((finished.run / stage / "manifest.json").read_text())["content"]
    shutil.rmtree(finished.run / stage)
    ocd(finished, stage, *args)
    assert json.loads((finished.run / stage / "manifest.json").read_text())["content"] == extended


def test_all_samples_are_as_many_as_there_are(finished, states):
    # 36 of 40 rows are for training, and all of them are there.
    assert states(finished, "--set", "collect.samples=36") == ALL_DONE
    assert states(finished, "--set", "collect.samples=1000") == ALL_DONE
    assert states(finished, "--set", "collect.samples=35")["collect"] == "stale"


def test_cosine_makes_max_steps_part_of_the_result(finished, status, states, ocd):
    cosine = ("--set", "train-diffusion.lr_schedule=cosine")
    found = status(finished, *cosine)["train-diffusion"]
    assert found["state"] == "stale"
    assert changes(found)["train-diffusion.lr_schedule"] == ("constant", "cosine")
    ocd(finished, "train-diffusion", *cosine, "--force")
    assert states(finished, *cosine)["train-diffusion"] == "done"
    found = status(finished, *cosine, "--set", "train-diffusion.max_steps=60")["train-diffusion"]
    assert found["state"] == "stale"
    assert changes(found) == {"train-diffusion.max_steps": (40, 60)}


# Files

ARTIFACTS = [
    ("train-base", "base.safetensors"),
    ("select-layer", "layer.json"),
    ("collect", "deltas.zarr/delta/c.0.0.0"),
    ("collect", "blocks/000000.json"),
    ("train-diffusion", "denoiser.safetensors"),
    ("train-scale", "scale.json"),
    ("infer", "test/predictions.npz"),
]


@pytest.mark.parametrize("damage", ["flipped byte", "cut short", "deleted"])
@pytest.mark.parametrize(("stage", "name"), ARTIFACTS)
def test_artifact_damaged(finished, status, states, ocd, stage, name, damage):
    path, folder = finished.run / stage / name, finished.run / ("infer/test" if stage == "infer" else stage)
    content = json.loads((folder / "manifest.json").read_text())["content"]
    if damage == "flipped byte":
        flip(path)
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    detail = status(finished)[stage]["detail"]
    assert name.rpartition("/")[2] in detail
    assert ("is missing" if damage == "deleted" else "content changed") in detail
    # The delta store mends its blocks; whatever else is damaged has to be redone.
    assert states(finished) == from_on(stage, "partial" if stage == "collect" else "stale")
    # Redone from scratch: nothing of the damaged result is taken over.
    ocd(finished, stage, "--force")
    assert json.loads((folder / "manifest.json").read_text())["content"] == content
    assert states(finished) == ALL_DONE


@pytest.mark.parametrize(("stage", "name"), ARTIFACTS)
def test_artifact_merely_touched(finished, states, stage, name):
    os.utime(finished.run / stage / name)
    assert states(finished) == ALL_DONE


@pytest.mark.parametrize("name", ["train.npz", "test.npz", "mymodel.py"])
def test_source_merely_touched(finished, states, name):
    os.utime(finished.root / name)
    assert states(finished) == ALL_DONE


@pytest.mark.parametrize(("name", "stage"), [("train.npz", "train-base"), ("test.npz", "infer")])
def test_data_changed(finished, status, states, name, stage):
    flip(finished.root / name)
    assert list(changes(status(finished)[stage])) == [f"content of {name.removesuffix('.npz')}"]
    expected = from_on(stage, "stale")
    assert states(finished) == expected


@pytest.mark.parametrize(("name", "stage"), [("train.npz", "train-base"), ("test.npz", "infer")])
def test_data_deleted(finished, status, ocd, name, stage):
    (finished.root / name).unlink()
    assert status(finished)[stage]["state"] == "stale"
    assert f"{name} is missing" in status(finished)[stage]["detail"]


def test_code_changed(finished, status, states):
    finished.edit("mymodel.py", "Tanh", "ReLU")
    assert list(changes(status(finished)["train-base"])) == ["content of code mymodel.py"]
    found = states(finished)
    assert found["train-base"] == found["select-layer"] == found["collect"] == found["infer"] == "stale"


def test_comment_in_code_changes_nothing(finished, states):
    finished.edit("mymodel.py", "\n\n\n", "\n\n\n# It is tiny.\n")
    assert states(finished) == ALL_DONE


def test_trainings_read_no_code(finished, status, ocd):
    # They know the delta store alone: other code that gives the same store is nothing to them.
    source = (finished.root / "mymodel.py").read_text()
    (finished.root / "mymodel.py").write_text(source.replace("width=6", "width=3 + 3"))
    for stage in STAGES[:3]:
        ocd(finished, stage, "--force")
    found = status(finished)
    assert found["train-diffusion"]["state"] == found["train-scale"]["state"] == "done"


@pytest.mark.parametrize("stage", STAGES)
def test_forced_equals_first(finished, states, ocd, stage):
    """Redoing a stage gives the same fingerprint and content, so that nothing after it goes stale."""
    folder = finished.run / ("infer/test" if stage == "infer" else stage)
    before = json.loads((folder / "manifest.json").read_text())
    ocd(finished, stage, "--force")
    after = json.loads((folder / "manifest.json").read_text())
    assert (after["fingerprint"], after["content"]) == (before["fingerprint"], before["content"])
    assert states(finished) == ALL_DONE


# `auto`


def test_layer_by_flag_then_plain(project, states, ocd):
    folder = project()
    ocd(folder, "train-base")
    ocd(folder, "select-layer", "--layer", "0.weight")
    assert states(folder)["select-layer"] == "done"
    result = json.loads(ocd(folder, "collect", "--json").stdout)
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
    width = json.loads((folder.run / "train-diffusion" / "denoiser.json").read_text())["width"]
    assert states(folder, "--set", f"train-diffusion.width={width}")["train-diffusion"] == "done"
    assert states(folder, "--set", f"train-diffusion.width={width + 2}")["train-diffusion"] == "stale"


# Where folders lie


@pytest.mark.parametrize("stage", STAGES)
def test_lone_old_folder_is_restored(finished, states, ocd, stage):
    """A power cut between the two renames of an exchange leaves only `X.old`."""
    folder = StageFolder(finished.run, "infer/test" if stage == "infer" else stage)
    os.rename(folder.path, folder.old)
    assert states(finished) == ALL_DONE
    assert "up to date" in ocd(finished, stage).stdout
    # The stages that read it do not mind, either.
    ocd(finished, "infer", "--force")
    ocd(finished, "verify")


@pytest.mark.parametrize("stage", STAGES)
def test_whole_but_not_yet_renamed(finished, states, ocd, stage):
    """A kill after the manifest was written and before the rename."""
    folder = StageFolder(finished.run, "infer/test" if stage == "infer" else stage)
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
    assert not folder.run.exists()


def test_same_work_same_fingerprint_anywhere(finished_run, tmp_path_factory, ocd):
    root = tmp_path_factory.mktemp("another place") / "project"
    shutil.copytree(finished_run.root, root, ignore=shutil.ignore_patterns("run"))
    folder = Folder(root)
    ocd(folder, "run")
    for stage in STAGES:
        name = "infer/test/manifest.json" if stage == "infer" else f"{stage}/manifest.json"
        here, there = (json.loads((f.run / name).read_text()) for f in (folder, finished_run))
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
