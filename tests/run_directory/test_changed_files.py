"""What `ocd status` sees of files: artifacts that are damaged or merely touched, data and code that changed."""

import os

import pytest
from expectations import ALL_DONE, FOLDERS, STAGES, changes, from_on
from folders import flip

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
    path, content = finished.run / stage / name, finished.manifest(FOLDERS[stage])["content"]
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
    assert finished.manifest(FOLDERS[stage])["content"] == content
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
    before = finished.manifest(FOLDERS[stage])
    ocd(finished, stage, "--force")
    after = finished.manifest(FOLDERS[stage])
    assert (after["fingerprint"], after["content"]) == (before["fingerprint"], before["content"])
    assert states(finished) == ALL_DONE
