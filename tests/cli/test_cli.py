"""The command line: help, shared options, where settings come from, what is printed where."""

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from folders import Folder, arrays
from processes import counted_blocks
from typer.testing import CliRunner

from ocd_cli.app import app
from stages.foundation.config import tables

STAGES = ("train-base", "select-layer", "collect", "train-diffusion", "train-scale", "infer")
COMMANDS = ("init", *STAGES, "run", "status", "verify")
SHARED = ("--config", "--run", "--set", "--device", "--seed", "--force", "--dry-run", "--json", "--quiet")


def one_object(text):
    """The one JSON object that is all of `text`."""
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


# Help


@pytest.fixture
def help_of(monkeypatch):
    # Wide enough that no option's name is cut.
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args):
        result = CliRunner().invoke(app, [*args, "--help"], prog_name="ocd")
        assert result.exit_code == 0
        return result.stdout

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_help(help_of, command):
    text = help_of(command)
    assert f"Example: ocd {command}" in text
    for option in SHARED:
        assert re.search(rf"{option}\b", text)
    assert command in help_of()


def test_the_module_is_the_command():
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    calls = [[sys.executable, "-m", "ocd_cli"], [sys.executable, "-c", "from ocd_cli.app import main; main()"]]
    texts = [subprocess.run([*call, "--help"], env=environment, capture_output=True, check=True).stdout for call in calls]
    assert texts[0] == texts[1]
    assert b"Usage: ocd" in texts[0]


@pytest.mark.parametrize(
    "args",
    [
        ["colect"],
        ["collect", "--nonsense"],
        ["infer", "--split", "other"],
        ["infer", "--ensemble=0"],
        ["infer", "--sample-steps=0"],
        ["collect", "--device", "tpu"],
        ["collect", "x"],
    ],
)
def test_unknown_words(args):
    result = CliRunner().invoke(app, args, prog_name="ocd")
    assert result.exit_code == 2
    assert args[-1].partition("=")[0] in result.stderr
    assert result.stdout == ""


def test_completion():
    """What a shell asks for is answered with the commands."""
    environment = os.environ | {"_OCD_COMPLETE": "complete_bash", "COMP_WORDS": "ocd tr", "COMP_CWORD": "1"}
    code = "from ocd_cli.app import main; main()"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["train-base", "train-diffusion", "train-scale"]


def test_completion_is_offered(help_of):
    assert "--install-completion" in help_of()
    assert "--show-completion" in help_of()


# --dry-run


def test_dry_run_of_a_fresh_project(project, ocd):
    folder = project()
    result = ocd(folder, "train-base", "--dry-run")
    assert "2 epochs on 36 samples" in result.stdout
    assert "bytes" in result.stdout or "KiB" in result.stdout
    found = one_object(ocd(folder, "run", "--dry-run", "--json").stdout)
    assert list(found["stages"]) == list(STAGES)
    assert not folder.run.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_dry_run_says_how_much_and_writes_nothing(finished, ocd, stage):
    before = finished.files()
    found = one_object(ocd(finished, stage, "--force", "--dry-run", "--json").stdout)
    assert found["stage"] == stage
    assert found["bytes"] > 0
    assert found["what"]
    numbers = {
        "train-base": "36 samples",
        "select-layer": "50 draws",
        "collect": "36 samples",
        "train-diffusion": "40 steps",
        "train-scale": "40 steps",
        "infer": "24 inputs",
    }
    assert numbers[stage] in found["what"]
    assert numbers[stage] in ocd(finished, stage, "--force", "--dry-run").stdout
    assert finished.files() == before


def test_dry_run_tells_about_enough_bytes(finished, ocd):
    """What is foreseen for the store is what its arrays take, uncompressed."""
    found = one_object(ocd(finished, "collect", "--force", "--dry-run", "--json").stdout)
    store = json.loads((finished.run / "collect" / "manifest.json").read_text())["store"]
    sizes = {"float32": 4, "int32": 4, "int64": 8, "bool": 1}
    expected = 0
    for entry in store["arrays"].values():
        count = 1
        for length in entry["shape"]:
            count *= length
        expected += count * sizes[entry["dtype"]]
    assert found["bytes"] == expected


# --json and --quiet


@pytest.mark.parametrize("stage", STAGES)
def test_second_run_is_up_to_date(project, finished, ocd, stage):
    first = one_object(ocd(finished, stage, "--force", "--json").stdout)
    result = ocd(finished, stage, "--json")
    assert one_object(result.stdout) == first
    assert f"{stage}: up to date" in result.stderr
    text = ocd(finished, stage)
    assert f"{stage}: up to date" in text.stdout
    assert str(finished.run) in text.stdout


def test_second_run_of_everything(project, ocd):
    folder = project()
    first = one_object(ocd(folder, "run", "--json").stdout)
    assert list(first["stages"]) == list(STAGES)
    before = folder.files()
    assert one_object(ocd(folder, "run", "--json").stdout) == first
    assert folder.files() == before
    assert ocd(folder, "run").stdout.count("up to date") == 6


def test_json_of_the_others(finished, ocd, tmp_path):
    assert one_object(ocd(finished, "status", "--json").stdout)["stages"]
    assert one_object(ocd(finished, "verify", "--json").stdout)["whole"] is True
    (tmp_path / "new").mkdir()
    found = one_object(ocd(None, "init", "--config", tmp_path / "new", "--json").stdout)
    assert found["written"] is True


def test_json_is_all_of_stdout_where_verify_fails(finished, ocd):
    (finished.run / "collect" / "stray").write_text("")
    result = ocd(finished, "verify", "--json", code=3)
    assert one_object(result.stdout)["whole"] is False
    assert "--force" in result.stderr


def test_results_on_stdout_the_rest_on_stderr(project, ocd):
    folder = project()
    result = ocd(folder, "run")
    assert "settings:" in result.stderr
    assert "settings:" not in result.stdout
    assert "ocd ensemble of 2" in result.stdout
    assert "ensemble" not in result.stderr


def test_quiet(project, ocd):
    folder = project()
    assert ocd(folder, "run", "--quiet").stderr == ""
    assert ocd(folder, "run", "--quiet", "--json").stderr == ""
    assert ocd(folder, "status", "--quiet").stderr == ""
    assert ocd(folder, "verify", "-q").stderr == ""
    # An answer that is redone has a note, too.
    assert ocd(folder, "infer", "--quiet", "--strength", 0.5).stderr == ""


def test_each_stage_keeps_a_log(finished):
    for stage in STAGES:
        folder = finished.run / ("infer/test" if stage == "infer" else stage)
        assert f"start {stage}" in (folder / "log.txt").read_text()


# Where settings come from


def test_settings_found_upward(project, ocd, monkeypatch):
    folder = project()
    (folder.root / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(folder.root / "deep" / "er")
    result = ocd(None, "train-base")
    assert f"settings: {folder.config}" in result.stderr
    assert (folder.run / "train-base" / "manifest.json").exists()
    assert os.listdir() == []


def test_search_stops_at_home(project, ocd, monkeypatch):
    folder = project()
    (folder.root / "home").mkdir()
    monkeypatch.setenv("HOME", str(folder.root / "home"))
    monkeypatch.chdir(folder.root / "home")
    ocd(None, "status", code=2)


def test_settings_by_environment(project, finished, ocd, monkeypatch, tmp_path):
    folder = project()
    monkeypatch.chdir(folder.root)
    monkeypatch.setenv("OCD_CONFIG", str(finished.config))
    result = ocd(None, "status", "--json")
    assert one_object(result.stdout)["run"] == str(finished.run)
    assert str(finished.config) in result.stderr
    # A flag goes before it, and a folder stands for the file in it.
    assert one_object(ocd(None, "status", "--json", "--config", folder.root).stdout)["run"] == str(folder.run)


def test_set_goes_before_the_file_and_a_flag_before_set(project, ocd):
    folder = project({"run": {"seed": 1}})

    def seed(*args):
        ocd(folder, "train-base", "--force", *args)
        manifest = json.loads((folder.run / "train-base" / "manifest.json").read_text())
        assert json.loads((folder.run / "run.json").read_text())["seed"] == manifest["identity"]["settings"]["run.seed"]
        return manifest["identity"]["settings"]["run.seed"]

    assert seed() == 1
    assert seed("--set", "run.seed=2") == 2
    assert seed("--set", "run.seed=2", "--set", "run.seed=3") == 3
    assert seed("--set", "run.seed=2", "--seed", 4) == 4


def test_seed_is_part_of_every_result(finished, ocd):
    found = one_object(ocd(finished, "status", "--json", "--seed", 2).stdout)["stages"]
    assert {entry["state"] for entry in found.values()} == {"stale"}
    for entry in found.values():
        assert {"setting": "run.seed", "was": 1, "now": 2} in entry["changed"]


def test_other_seed_other_result(finished, project, ocd):
    folder = project()
    ocd(folder, "run", "--seed", 2)
    for stage in ("train-base", "collect", "train-diffusion", "train-scale", "infer/test"):
        contents = {json.loads((f.run / stage / "manifest.json").read_text())["content"] for f in (folder, finished)}
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
    settings = json.loads((folder.run / "collect" / "manifest.json").read_text())["identity"]["settings"]
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


# --force


@pytest.mark.parametrize("stage", ["collect", "train-scale"])
def test_forced_work_keeps_the_old_until_the_new_is_whole(finished, ocd, monkeypatch, stage):
    before = finished.files()

    def interrupted(*args, **named):
        raise KeyboardInterrupt

    name = {
        "collect": "stages.store.delta_store.DeltaStore.write_block",
        "train-scale": "stages.training.trainer.Trainer.advance",
    }
    with monkeypatch.context() as patch:
        patch.setattr(name[stage], interrupted)
        ocd(finished, stage, "--force", code=4)
    kept = {name: data for name, data in finished.files().items() if ".wip/" not in name}
    assert kept == before
    found = one_object(ocd(finished, "status", "--json").stdout)["stages"]
    assert {entry["state"] for entry in found.values()} == {"done"}
    ocd(finished, stage, "--force")
    assert not (finished.run / f"{stage}.wip").exists()
    assert not (finished.run / f"{stage}.old").exists()


def test_force_redoes_from_scratch(project, ocd):
    folder = project({"collect": {"block_samples": 8}})
    ocd(folder, "run", "--until", "collect")
    with counted_blocks() as written:
        ocd(folder, "collect", "--force")
    assert sorted(written) == [0, 1, 2, 3, 4]


# run


def test_run_from_and_until_are_inclusive(project, ocd):
    folder = project()
    assert list(one_object(ocd(folder, "run", "--until", "collect", "--json").stdout)["stages"]) == list(STAGES[:3])
    assert not (folder.run / "train-diffusion").exists()
    found = one_object(ocd(folder, "run", "--from", "collect", "--until", "train-scale", "--json").stdout)["stages"]
    assert list(found) == list(STAGES[2:5])
    assert list(one_object(ocd(folder, "run", "--from", "infer", "--json").stdout)["stages"]) == ["infer"]


def test_run_stops_at_what_is_stale(finished, ocd):
    result = ocd(finished, "run", "--set", "collect.lr=0.02", code=3)
    assert "collect.lr was 0.01, is now 0.02" in result.stderr
    assert "ocd collect --set collect.lr=0.02 --force" in result.stderr


# infer


def test_infer_options(finished, ocd):
    args = ("--ensemble", 3, "--sample-steps", 4, "--sampler", "ddpm", "--strength", 0.5, "--save-deltas")
    found = one_object(ocd(finished, "infer", *args, "--json").stdout)
    assert found["ensemble"] == 3
    manifest = json.loads((finished.run / "infer" / "test" / "manifest.json").read_text())
    settings = manifest["identity"]["settings"]
    assert settings["infer.sample_steps"] == 4
    assert settings["infer.sampler"] == "ddpm"
    assert settings["infer.strength"] == 0.5
    assert (finished.run / "infer" / "test" / "deltas.zarr").is_dir()


@pytest.mark.parametrize(
    ("file", "name"), [("test.npz", "input-test"), ("new pictures.npz", "new-pictures"), ("a.b.npz", "a-b")]
)
def test_infer_names_its_answer(finished, ocd, file, name):
    (finished.root / "inputs").mkdir()
    path = finished.save(f"inputs/{file}", arrays(5, 2)[0])
    result = one_object(ocd(finished, "infer", "--input", path, "--json").stdout)
    assert result["query"] == name
    assert result["metrics"] is None
    assert (finished.run / "infer" / name / "predictions.npz").exists()


# init


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
        assert set(own[name]) == set(known)
        for key, info in known.items():
            assert info.description in text
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


PLAIN = [
    word for value in ("model=mymodel:net", "loss=mse", "train=a.npz", "test=b.npz") for word in ("--set", f"task.{value}")
]


def test_init_takes_settings(init):
    text, _ = init(*PLAIN, "--set", "task.model_args.width=8", "--seed", 7, "--device", "cpu", "--run", "out")
    raw = tomllib.loads(text)
    assert raw["run"] == {"directory": "out", "seed": 7, "device": "cpu"}
    assert raw["task"] == {
        "model": "mymodel:net",
        "loss": "mse",
        "train": "a.npz",
        "test": "b.npz",
        "model_args": {"width": 8},
    }


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
