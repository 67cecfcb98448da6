"""What `ocd status` sees of files: artifacts that are damaged or merely touched, data and code that changed."""

import os

import pytest
from damage import HARM
from expectations import ALL_DONE, FOLDERS, STAGES, changes, from_on
from folders import flip, states, status

ARTIFACTS = [
    ("train-base", "base.safetensors"),
    ("select-layer", "layer.json"),
    ("collect", "deltas.zarr/delta/c.0.0.0"),
    ("collect", "blocks/000000.json"),
    ("train-diffusion", "denoiser.safetensors"),
    ("train-scale", "scale.json"),
    ("infer", "test/predictions.npz"),
]


@pytest.mark.parametrize("damage", HARM)
@pytest.mark.parametrize(("stage", "name"), ARTIFACTS)
def test_artifact_damaged(finished, ocd, stage, name, damage):
    path, content = finished.run / stage / name, finished.manifest(FOLDERS[stage])["content"]
    HARM[damage](path)
    detail = status(ocd, finished)[stage]["detail"]
    assert name.rpartition("/")[2] in detail
    assert ("is missing" if damage == "deleted" else "content changed") in detail
    # The delta store mends its blocks; whatever else is damaged has to be redone.
    assert states(ocd, finished) == from_on(stage, "partial" if stage == "collect" else "stale")
    # Redone from scratch: nothing of the damaged result is taken over.
    ocd(finished, stage, "--force")
    assert finished.manifest(FOLDERS[stage])["content"] == content
    assert states(ocd, finished) == ALL_DONE


@pytest.mark.parametrize("name", ["train.npz", "test.npz", "mymodel.py", *(f"run/{stage}/{name}" for stage, name in ARTIFACTS)])
def test_merely_touched(finished, ocd, name):
    os.utime(finished.root / name)
    assert states(ocd, finished) == ALL_DONE


@pytest.mark.parametrize(("name", "stage"), [("train.npz", "train-base"), ("test.npz", "infer")])
def test_data_changed_and_deleted(finished, name, stage, ocd):
    flip(finished.root / name)
    assert list(changes(status(ocd, finished)[stage])) == [f"content of {name.removesuffix('.npz')}"]
    assert states(ocd, finished) == from_on(stage, "stale")
    (finished.root / name).unlink()
    assert status(ocd, finished)[stage]["state"] == "stale"
    assert f"{name} is missing" in status(ocd, finished)[stage]["detail"]


def test_code_changed(finished, ocd):
    finished.edit("mymodel.py", "Tanh", "ReLU")
    assert list(changes(status(ocd, finished)["train-base"])) == ["content of code mymodel.py"]
    found = states(ocd, finished)
    assert found["train-base"] == found["select-layer"] == found["collect"] == found["infer"] == "stale"


def test_comment_in_code_changes_nothing(finished, ocd):
    finished.edit("mymodel.py", "\n\n\n", "\n\n\n# It is tiny.\n")
    assert states(ocd, finished) == ALL_DONE


def test_trainings_read_no_code(finished, ocd):
    # They know the delta store alone: other code that gives the same store is nothing to them.
    source = (finished.root / "mymodel.py").read_text()
    (finished.root / "mymodel.py").write_text(source.replace("width=6", "width=3 + 3"))
    for stage in STAGES[:3]:
        ocd(finished, stage, "--force")
    found = status(ocd, finished)
    assert found["train-diffusion"]["state"] == found["train-scale"]["state"] == "done"


@pytest.mark.parametrize("stage", STAGES)
def test_forced_equals_first(finished, ocd, stage):
    """Redoing a stage gives the same fingerprint and content, so that nothing after it goes stale."""
    before = finished.manifest(FOLDERS[stage])
    ocd(finished, stage, "--force")
    after = finished.manifest(FOLDERS[stage])
    assert (after["fingerprint"], after["content"]) == (before["fingerprint"], before["content"])
    assert states(ocd, finished) == ALL_DONE
