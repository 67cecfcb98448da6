"""Bad input: one message that says what is wrong and what to type next, the right exit code, nothing half-written."""

import os
import re

import bad_code
import bad_data
import bad_layers
import bad_runs
import bad_settings
import pytest
import torch
from bad_input import Bad
from folders import make_folder

MACHINE = [
    Bad(
        "cuda asked for and absent",
        "train-base --device cuda",
        ["cuda", "--device cpu"],
        change=lambda _, patch: patch.setattr(torch.cuda, "is_available", lambda: False),
    ),
    pytest.param(
        Bad(
            "a folder that cannot be written",
            "train-base --run {root}/closed/run",
            ["cannot be written", "--run"],
            3,
            change=lambda folder, _: (folder.root / "closed").mkdir(mode=0o500),
        ),
        marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere"),
    ),
]
TABLE = [*bad_settings.ROWS, *bad_code.ROWS, *bad_data.ROWS, *bad_layers.ROWS, *bad_runs.ROWS, *MACHINE]


def kept(folder):
    """The run directory without what is allowed to be unfinished."""
    found = folder.files() if folder.run.exists() else {}
    assert not [name for name in found if name.endswith((".tmp", ".partial"))]
    return {name: data for name, data in found.items() if ".wip/" not in name and name != "run.json"}


def unfinished(folder):
    return {path.name for path in folder.run.glob("*.wip")}


def words(text, folder):
    return [word.format(root=folder.root, run=folder.run).replace("%20", " ") for word in text.split()]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_bad_input(bad, ocd, finished_run, tmp_path, monkeypatch):
    folder = (
        finished_run.copy(tmp_path / "project")
        if bad.finished
        else make_folder(tmp_path / "project", bad.settings, bad.project)
    )
    with monkeypatch.context() as patch:
        if bad.change:
            bad.change(folder, patch)
        if bad.after:
            ocd(folder, *words(bad.after, folder))
        before, begun = kept(folder), unfinished(folder)
        result = ocd(folder if bad.config else None, *words(bad.words, folder), "--quiet", code=bad.code)
    assert result.stdout == ""
    assert kept(folder) == before
    assert bad.begins or unfinished(folder) == begun
    assert bad.finished or bad.begins or bad.after or not folder.run.exists()
    check_message(bad, result.stderr, folder)
    if bad.mend:
        bad.mend(folder, monkeypatch)
    for then in bad.then:
        ocd(folder, *words(then, folder))


def check_message(bad, message, folder):
    """One error, which says what it must, and of a traceback only the user's own frames, which alone are of use."""
    assert message.startswith("error: ")
    assert len(re.findall(r"^error:", message, re.MULTILINE)) == 1
    if isinstance(bad.says, str):
        assert message == bad.says
    for fact in bad.says if not isinstance(bad.says, str) else ():
        assert fact.replace("{root}", str(folder.root)) in message
    assert not any(text in message for text in bad.hides)
    assert not re.search(r"(user_code|loader|supervised|stage|train_base|module)\.py, line", message)
