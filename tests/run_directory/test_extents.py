"""How far a stage went: less than there is makes it stale, more continues it, and continued work equals whole work."""

import shutil

import pytest
from expectations import ALL_DONE, STAGES, changes, from_on
from folders import put, states, status

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
    folder = finished_run.copy(tmp_path_factory.mktemp("few") / "project").without(*STAGES[2:])
    folder.write({"collect": {"samples": 20}})
    ocd(folder, "run")
    return folder


@pytest.fixture
def extendable(few_samples, tmp_path):
    return few_samples.copy(tmp_path / "few")


@pytest.mark.parametrize(("setting", "stage", "value", "larger", "smaller"), EXTENTS)
def test_extents(extendable, ocd, setting, stage, value, larger, smaller):
    assert states(ocd, extendable) == ALL_DONE
    # Smaller is less than there is.
    found = status(ocd, extendable, "--set", f"{setting}={smaller}")
    assert found[stage]["state"] == "stale"
    assert changes(found[stage]) == {setting: (value, smaller)}
    # Larger is more of the same.
    found = status(ocd, extendable, "--set", f"{setting}={larger}")
    assert found[stage]["state"] == "partial"
    assert changes(found[stage]) == {setting: (value, larger)}
    assert states(ocd, extendable, f"{setting}={larger}") == from_on(stage, "partial")
    ocd(extendable, stage, "--set", f"{setting}={larger}")
    assert states(ocd, extendable, f"{setting}={larger}")[stage] == "done"
    # Now the former value is the smaller one.
    assert states(ocd, extendable)[stage] == "stale"


def test_extended_equals_whole(extendable, finished, ocd):
    """Twenty samples and then all are the same store as all at once."""
    ocd(extendable, "collect", "--set", "collect.samples=all")
    contents = [f.manifest("collect")["content"] for f in (extendable, finished)]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("stage", "setting"), [("train-diffusion", "max_steps"), ("train-scale", "max_steps"), ("train-base", "epochs")]
)
def test_extended_training_equals_whole(finished, project, ocd, stage, setting):
    more = {"max_steps": 60, "epochs": 3}[setting]
    args = ("--set", f"{stage}.{setting}={more}")
    ocd(finished, stage, *args)
    extended = finished.manifest(stage)["content"]
    shutil.rmtree(finished.run / stage)
    ocd(finished, stage, *args)
    assert finished.manifest(stage)["content"] == extended


def test_all_samples_are_as_many_as_there_are(finished, ocd):
    # 36 of 40 rows are for training, and all of them are there.
    assert states(ocd, finished, "collect.samples=36") == ALL_DONE
    assert states(ocd, finished, "collect.samples=1000") == ALL_DONE
    assert states(ocd, finished, "collect.samples=35")["collect"] == "stale"


def test_cosine_makes_max_steps_part_of_the_result(finished, ocd):
    setting = "train-diffusion.lr_schedule=cosine"
    cosine = put(setting)
    found = status(ocd, finished, *cosine)["train-diffusion"]
    assert found["state"] == "stale"
    assert changes(found)["train-diffusion.lr_schedule"] == ("constant", "cosine")
    ocd(finished, "train-diffusion", *cosine, "--force")
    assert states(ocd, finished, setting)["train-diffusion"] == "done"
    found = status(ocd, finished, *cosine, "--set", "train-diffusion.max_steps=60")["train-diffusion"]
    assert found["state"] == "stale"
    assert changes(found) == {"train-diffusion.max_steps": (40, 60)}
