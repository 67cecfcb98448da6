"""`ocd init`: a settings file that holds every setting and works as it stands."""

import re
import tomllib

import pytest
from folders import Folder, put
from typer.testing import CliRunner

from ocd_cli.app import app
from stages.foundation.config import tables


@pytest.fixture
def init(ocd, tmp_path, monkeypatch):
    """Runs `ocd init` in an empty folder and returns the file's text."""
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")

    def call(*args, code=0):
        # The fixture's own --device would be written into the file.
        result = CliRunner().invoke(app, ["init", *map(str, args)], prog_name="ocd")
        assert result.exit_code == code, result.stderr
        path = tmp_path / "new" / "ocd.toml"
        return path.read_text() if path.exists() else None, result.stdout + result.stderr

    return call


def test_init_writes_every_setting(init):
    text, _ = init()
    raw = tomllib.loads(text)
    assert list(raw) == list(tables())
    # Uncommented, every line is a setting: its default, or for what has none an example.
    lines = [re.sub(r"^# (?=\w+ = )", "", line) for line in text.splitlines()]
    # The toy's class stands beside the example for one's own.
    own = tomllib.loads("\n".join(line for line in lines if not line.startswith('class = "task:MyTask"')))
    for name, table in tables().items():
        known = {info.alias or key: info for key, info in table.model_fields.items()}
        section = text.split(f"[{name}]")[1].split("\n[")[0]
        assert set(own[name]) == set(known)
        for key, info in known.items():
            assert re.search(rf"^(# )?{key} = .*{re.escape(info.description)}", section, re.MULTILINE)
            if name != "task" and info.default is not None:
                assert own[name][key] == info.default


def test_init_writes_what_works(init, ocd, tmp_path):
    init()
    result = ocd(Folder(tmp_path / "new"), "train-base", "--set", "train-base.epochs=1")
    assert "accuracy" in result.stdout


def test_init_with_every_line_uncommented_is_the_same(init, ocd, tmp_path):
    text, _ = init()
    task, rest = text.index("[task]"), text.index("[train-base]")
    loose = re.sub(r"^# (?=\w+ = )", "", text[:task] + text[rest:], flags=re.MULTILINE) + "\n" + text[task:rest]
    (tmp_path / "new" / "ocd.toml").write_text(loose)
    ocd(Folder(tmp_path / "new"), "status")


def test_init_keeps_what_is_there(init):
    text, _ = init()
    again, message = init("--set", "collect.lr=0.5", code=2)
    assert again == text
    assert "error:" in message
    assert "ocd init --force" in message
    assert "lr = 0.5  #" in init("--set", "collect.lr=0.5", "--force")[0]


PLAIN = put("task.model=mymodel:net", "task.loss=mse", "task.train=a.npz", "task.test=b.npz")


def test_init_takes_settings(init):
    text, _ = init(*PLAIN, "--set", "task.model_args.width=8", "--seed", 7, "--device", "cpu", "--run", "out")
    raw = tomllib.loads(text)
    assert raw["run"] == {"directory": "out", "seed": 7, "device": "cpu"}
    assert raw["task"] == {"model": "mymodel:net", "loss": "mse", "train": "a.npz", "test": "b.npz", "model_args": {"width": 8}}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("collect.stepps=3", "did you mean steps?"),
        ("colect.steps=3", "did you mean collect?"),
        ("collect.steps=0", "greater than or equal to 1"),
        ("collect", "table.key=value"),
        ("task.model=mymodel:net", "task.loss is missing"),
    ],
)
def test_init_refuses(init, setting, says):
    text, message = init("--set", setting, code=2)
    assert text is None
    assert says in message


def test_init_dry_run(init):
    text, message = init("--dry-run")
    assert text is None
    assert "[train-diffusion]" in message
    tomllib.loads(message)


def test_init_quotes_what_needs_quotes(init):
    text, _ = init(*PLAIN, "--set", 'task.model_args={"a b" = "c\\"d", list = [1, 2.5, true]}')
    assert tomllib.loads(text)["task"]["model_args"] == {"a b": 'c"d', "list": [1, 2.5, True]}


@pytest.mark.parametrize("name", ["größe.npz", "a\\b.npz", "\U0001f4f7.npz", 'quo"te.npz'])
def test_init_writes_any_file_name(init, name):
    text, _ = init(*PLAIN, "--set", f"task.train={name}")
    assert tomllib.loads(text)["task"]["train"] == name
