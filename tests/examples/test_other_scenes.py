"""The TinyNeRF example on scenes in npz files, and on scenes that are not there."""

import json

import pytest
from spheres import sphere_npz
from tinynerf import REPEATS, SIZE, make_example


def test_an_npz_file(ocd, tmp_path):
    example = make_example(tmp_path, "scene.npz")
    sphere_npz(example.root / "scene.npz", views=32, size=SIZE)
    args = 'task.args={ scene = "scene.npz", rays = 16, base_steps = 5 }'
    shown = ocd(example, "run", "--json", "--until", "collect", "--set", "collect.samples=3", "--set", args)
    summary = json.loads(shown.stdout)["stages"]["collect"]
    assert (summary["samples"], summary["repeats"]) == (3, REPEATS)
    assert "alpha" not in shown.stderr


@pytest.mark.parametrize(
    ("scene", "says"),
    [
        ("nowhere", "nowhere is missing\n  give a folder with transforms_train.json, or an npz file with arrays"),
        ("empty", "empty has no transforms_train.json; JSON files there: none\n"),
    ],
)
def test_a_scene_that_is_not_there(ocd, tmp_path, scene, says):
    example = make_example(tmp_path, scene)
    (example.root / "empty").mkdir()
    shown = ocd(example, "train-base", "--quiet", code=2).stderr
    assert shown.startswith("error: ")
    assert says in shown
    assert not (example.run / "train-base").exists()
