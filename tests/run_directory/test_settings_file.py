"""Settings written into a user's file: the values are the new ones, and all else is as it was."""

import os
import shlex
import stat
import tomllib

import pytest

from stages.foundation.errors import SettingsError, TryAgainError
from stages.init import render
from stages.run_directory import settings_file
from stages.run_directory.project import as_flags, overridden
from stages.run_directory.settings_file import edited, require_writable, write_settings

TASK = '[task]\nclass = "task:Digits"  # mine\n'
VALUES = {"select-layer.layer": "fc1.weight", "collect.optimizer": "sgd", "collect.lr": 0.005, "collect.steps": 3}
TABLES = {"select-layer": {"layer": "fc1.weight"}, "collect": {"optimizer": "sgd", "lr": 0.005, "steps": 3}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # Where there are no tables they come last.
        (
            TASK,
            TASK + '\n[select-layer]\nlayer = "fc1.weight"\n\n[collect]\noptimizer = "sgd"\nlr = 0.005\nsteps = 3\n',
        ),
        # Values are replaced where they stand, with what is said of them.
        (
            '[collect]\nsteps = 7 # seven\n# why so\nlr = 1.0\noptimizer = "adam"\n\n[select-layer]\nlayer = "auto"\n\n' + TASK,
            '[collect]\nsteps = 3 # seven\n# why so\nlr = 0.005\noptimizer = "sgd"\n\n[select-layer]\nlayer = "fc1.weight"\n\n'
            + TASK,
        ),
        # Commented lines, as `ocd init` writes them; text that only looks like one stays.
        (
            '[select-layer]  # which\n# layer = "auto"  # a name\n# layer = of course\n'
            + TASK
            + "[collect]\n# lr = 1.0  # rate\nsteps = 5\n",
            '[select-layer]  # which\nlayer = "fc1.weight"  # a name\n# layer = of course\n'
            + TASK
            + '[collect]\nlr = 0.005  # rate\nsteps = 3\noptimizer = "sgd"\n',
        ),
    ],
    ids=["no tables", "values", "commented"],
)
def test_what_is_written(old, new):
    assert edited(old, VALUES, "ocd.toml") == new


@pytest.mark.parametrize(
    "old",
    [
        "collect.lr = 1.0\nselect-layer.layer = 'auto'\ncollect.steps = 2\n" + TASK,
        "collect = {lr = 1.0, steps = 2}  # inline\nselect-layer = {}\n" + TASK,
        TASK + "[ collect ]\nlr = 1.0\n['select-layer']\nlayer = 'auto'",
        TASK + "[collect]\n\n\n[train-diffusion.encoders]\nx = 'vgg11'\n[train-diffusion]\nwidth = 8\n[select-layer]\n",
        TASK + "# [collect]\n# lr = 1.0\n",
        "task.class = 'task:Digits'\ntask.args = {collect = \"[collect]\"}\n",
        "# only dotted\ntask.class = 'task:Digits'",
        render({"task": {"class": "task:Digits"}}),
        render({"task": {"class": "task:Digits"}, "collect": {"lr": 1.0, "steps": 9}}),
        TASK.replace("\n", "\r\n") + "[collect]\r\nlr = 1.0\r\n",
    ],
)
def test_however_the_tables_are_written(old):
    new = edited(old, VALUES, "ocd.toml")
    assert tomllib.loads(new) == overridden(tomllib.loads(old), values=VALUES)
    # No comment is lost, but for lines that are settings now.
    comments = [
        line
        for line in old.splitlines()
        if line.startswith("#") and not line.startswith(("# lr", "# steps", "# opt", "# layer"))
    ]
    assert [line for line in new.splitlines() if line in comments] == comments
    assert edited(new, VALUES, "ocd.toml") == new
    assert ("\r\n" in old) == ("\r\n" in new)
    assert new.count("\r\n") in (0, new.count("\n"))


def test_what_init_writes_is_only_uncommented():
    old = render({"task": {"class": "task:Digits"}})
    changed = [(a, b) for a, b in zip(old.splitlines(), edited(old, VALUES, "").splitlines(), strict=True) if a != b]
    assert [b.split("  #")[0] for _, b in changed] == ['layer = "fc1.weight"', 'optimizer = "sgd"', "lr = 0.005", "steps = 3"]
    assert all(a.split("  # ")[1] == b.split("  # ")[1] for a, b in changed)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "ocd.toml"
    path.write_text(TASK)
    return path


def test_a_link_and_its_rights_stay(config, tmp_path):
    config.chmod(0o640)
    link = tmp_path / "elsewhere" / "ocd.toml"
    link.parent.mkdir()
    link.symlink_to(config)
    write_settings(link, VALUES)
    assert link.is_symlink()
    assert tomllib.loads(config.read_text())["collect"] == TABLES["collect"]
    assert stat.S_IMODE(config.stat().st_mode) == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"ocd.toml", "elsewhere"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[task]\nclas = "x"\n', "has a problem:\n  unknown key task.clas; did you mean class?"),
        ("[collect]\nlr = 1.0\n", "has a problem:\n  table [task] is missing; it names the model, its loss and its data"),
        ("[task\n", "ocd.toml cannot be changed: "),
    ],
)
def test_a_file_that_is_not_valid_with_them_is_left_alone(config, text, message):
    config.write_text(text)
    with pytest.raises(SettingsError) as error:
        write_settings(config, VALUES)
    assert message in error.value.message
    assert config.read_text() == text


def test_what_the_system_refuses(config, monkeypatch):
    monkeypatch.setattr(os, "access", lambda place, kind: str(place) != str(config.parent))
    refused = f"{config.parent} cannot be written: Permission denied"
    for call in (lambda: require_writable(config), lambda: write_settings(config, VALUES)):
        with pytest.raises(SettingsError) as error:
            call()
        assert error.value.message == refused
    assert error.value.hint == (
        "give them as flags instead: ocd run --set select-layer.layer=fc1.weight --set collect.optimizer=sgd "
        "--set collect.lr=0.005 --set collect.steps=3"
    )
    assert config.read_text() == TASK


@pytest.mark.parametrize(("number", "kind"), [(13, SettingsError), (16, SettingsError), (28, TryAgainError)])
def test_writing_that_fails_leaves_the_file_as_it_was(config, monkeypatch, number, kind):
    """Not allowed, mounted by itself, or a full disk."""

    def fail(path, data):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(settings_file, "write_bytes", fail)
    with pytest.raises(kind):
        write_settings(config, VALUES)
    assert config.read_text() == TASK


@pytest.mark.parametrize("value", ["fc1.weight", "true", "0", "a b'c", "nan", True, 3, 1e-5, 0.1, "ä.weight", "x=1"])
def test_flags_say_what_they_mean(value):
    words = shlex.split(as_flags({"select-layer.layer": value}))
    assert words[0] == "--set"
    assert overridden({}, words[1:]) == {"select-layer": {"layer": value}}
