"""What the folder of an answer is called: after the query, and after what else than OCD's own ensemble predicts."""

import pytest

from stages.run_directory.folders import folder_of
from stages.run_directory.project import Project, check_settings


def named(tmp_path, **infer):
    settings = check_settings({"task": {"class": "mytask:Mine"}, "infer": infer}, "these settings")
    return folder_of(Project(settings, tmp_path / "ocd.toml", tmp_path / "run"), "infer").name


@pytest.mark.parametrize(
    ("infer", "name"),
    [
        ({}, "test"),
        ({"strength": 0.5}, "test"),
        ({"strength": "auto"}, "test+strength-auto"),
        ({"row": "auto"}, "test+row-auto"),
        ({"row": "nearest k blended"}, "test+nearest-k-blended"),
        ({"row": "nearest k blended", "strength": "auto"}, "test+nearest-k-blended"),
    ],
)
def test_names(tmp_path, infer, name):
    assert named(tmp_path, **infer) == f"infer/{name}"


def test_no_two_rows_share_one(tmp_path):
    rows = ["a b", "a-b", "a/b", "a  b", " a b", "row auto", "strength auto", "..", "", "x" * 200, "x" * 201, "é", "nul\n"]
    names = [named(tmp_path, row=row) for row in rows] + [named(tmp_path, row="auto"), named(tmp_path, strength="auto")]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) < 100
        assert name.removeprefix("infer/test+").replace("-", "").isalnum()
