"""Bad input: one message that says what is wrong and what to type next, the right exit code, nothing half-written."""

import errno
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile

import numpy as np
import pytest
import torch
from conftest import MODEL, arrays, counted_blocks, stopped_at
from safetensors.torch import load_file, save_file

from stages.run_directory.folders import StageFolder
from stages.training.trainer import Trainer

STAGES = ("train-base", "select-layer", "collect", "train-diffusion", "train-scale", "infer")


def results(folder):
    """The run directory without what is allowed to be unfinished."""
    if not folder.run.exists():
        return {}
    found = {name: data for name, data in folder.files().items() if ".wip/" not in name and name != "run.json"}
    assert not [name for name in folder.files() if name.endswith((".tmp", ".partial"))]
    return found


@pytest.fixture
def refused(ocd):
    """Runs a command that must fail, and returns its message: `says` are the facts it must name."""

    def call(folder, *args, code, says):
        before = results(folder) if folder else {}
        result = ocd(folder, *args, "--quiet", code=code)
        message = result.stderr
        assert result.stdout == ""
        assert message.startswith("error: ")
        assert len(re.findall(r"^error:", message, re.MULTILINE)) == 1
        for fact in says:
            assert fact in message
        assert (results(folder) if folder else {}) == before
        return message

    return call


# Settings


def test_no_settings_file_anywhere(refused, tmp_path, monkeypatch):
    # The search goes upward and stops at the home directory.
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    refused(None, "collect", code=2, says=["no ocd.toml", str(tmp_path / "inner"), "ocd init", "--config"])


def test_named_settings_file_missing(refused, tmp_path):
    refused(None, "collect", "--config", tmp_path / "other.toml", code=2, says=["other.toml", "ocd init"])


def test_broken_toml(refused, project):
    folder = project()
    folder.config.write_text('[task]\nmodel = "mymodel:net\n')
    refused(folder, "status", code=2, says=["ocd.toml", "not valid TOML", "line 2"])


BAD_SETTINGS = {
    "unknown key": ({"collect": {"stepps": 3}}, ["collect.stepps", "did you mean steps?"]),
    "unknown key far from all": ({"collect": {"zzz": 3}}, ["collect.zzz", "optimizer", "lr"]),
    "unknown table": ({"colect": {"steps": 3}}, ["[colect]", "did you mean collect?"]),
    "wrong type": ({"collect": {"lr": "fast"}}, ["collect.lr", "'fast'", "number"]),
    "a fraction for a count": ({"collect": {"steps": 2.5}}, ["collect.steps", "2.5", "integer"]),
    "a truth value for a count": ({"collect": {"steps": True}}, ["collect.steps", "True", "integer"]),
    "a text for a truth value": ({"infer": {"save_deltas": "yes"}}, ["infer.save_deltas", "'yes'", "boolean"]),
    "out of range": ({"collect": {"steps": 0}}, ["collect.steps", "0", "greater than or equal to 1"]),
    "out of an open range": ({"train-base": {"lr": 0}}, ["train-base.lr", "greater than 0"]),
    "no such choice": ({"collect": {"optimizer": "rmsprop"}}, ["collect.optimizer", "'rmsprop'", "'adam'", "'sgd'"]),
    "neither a number nor auto": ({"collect": {"batch_size": "large"}}, ["collect.batch_size", "'large'", "integer", "'auto'"]),
    "missing": ({"task": {"train": None}}, ["task.train is missing", "train.npz"]),
    "class beside model": ({"task": {"class": "mymodel:Own"}}, ["task.model", "task.class"]),
    "not module:name": ({"task": {"model": "mymodel.net"}}, ["task.model", "'mymodel.net'", "module:name"]),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings(refused, project, name):
    settings, says = BAD_SETTINGS[name]
    folder = project(settings)
    refused(folder, "train-base", code=2, says=says)
    if name != "not module:name":
        assert not folder.run.exists()


def test_one_setting_is_one_problem(refused, project):
    # A setting of two possible types fails twice inside the checker.
    message = refused(project({"collect": {"batch_size": "large"}}), "status", code=2, says=["a problem"])
    assert message.count("collect.batch_size") == 1


def test_table_that_is_no_table(refused, project):
    folder = project()
    folder.config.write_text("collect = 3\n" + folder.config.read_text().replace("[collect]", "[other]"))
    refused(folder, "status", code=2, says=["collect = 3", "[other]", "2 problems"])


def test_no_task(refused, project):
    folder = project()
    folder.config.write_text("[collect]\nsteps = 2\n")
    refused(folder, "status", code=2, says=["[task] is missing"])


def test_all_problems_at_once(refused, project):
    folder = project({"collect": {"steps": 0, "learning_rate": 1}, "infer": {"sampler": "euler"}, "infr": {"ensemble": 1}})
    says = ["4 problems", "collect.steps", "collect.learning_rate", "infer.sampler", "[infr]; did you mean infer?"]
    refused(folder, "collect", code=2, says=says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("collect", ["--set collect", "table.key=value", "for example"]),
        ("collect.lr", ["--set collect.lr", "table.key=value"]),
        ("lr=3", ["--set lr=3", "table.key=value"]),
        ("=3", ["--set =3", "table.key=value"]),
        (".lr=3", ["--set .lr=3", "table.key=value"]),
        ("collect.=3", ["--set collect.=3", "table.key=value"]),
        ("collect.lr.x=3", ["--set collect.lr.x=3", "collect.lr is not a table"]),
        ("colect.lr=3", ["[colect]", "did you mean collect?"]),
        ("collect.larning_rate=3", ["collect.larning_rate"]),
        ("collect.lr=fast", ["collect.lr", "'fast'"]),
        ("collect.lr=", ["collect.lr", "''"]),
        ("collect.lr=inf", ["collect.lr", "inf"]),
        ("collect.lr=nan", ["collect.lr", "nan"]),
        ("task.model_args.when=2020-01-01", ["task.model_args", "2020"]),
        ("task.model_args.width=inf", ["task.model_args", "inf"]),
    ],
)
def test_bad_set(refused, project, text, says):
    folder = project({"collect": {"lr": 0.01}})
    refused(folder, "train-base", "--set", text, code=2, says=says)
    assert not folder.run.exists()


# The user's code

BAD_CODE = {
    "no such module": ({"task": {"model": "nowhere_to_be_found:net"}}, MODEL, ["nowhere_to_be_found", "task.model"]),
    "no such name": ({"task": {"model": "mymodel:ned"}}, MODEL, ["mymodel.py has no ned", "did you mean net?"]),
    "does not import": ({}, "import not_installed_anywhere\n" + MODEL, ["mymodel.py", "not_installed_anywhere", "line 1"]),
    "not Python": ({}, MODEL + "def = 3\n", ["mymodel.py is not valid Python", "line 6: invalid syntax"]),
    "a bracket never closed": ({}, MODEL + "broken = (3\n", ["mymodel.py", "line 6"]),
    "raises on import": ({}, "1 / 0\n" + MODEL, ["mymodel.py, line 1", "1 / 0", "ZeroDivisionError"]),
    "leaves on import": ({}, "raise SystemExit(7)\n" + MODEL, ["mymodel.py, line 1", "SystemExit"]),
    "raises in the model": (
        {},
        "def helper():\n    raise KeyError('no such part')\n\n\ndef net():\n    return helper()\n",
        ["mymodel:net", "KeyError", "no such part", "mymodel.py, line 6, in net", "mymodel.py, line 2, in helper"],
    ),
    "wrong argument": ({"task": {"model_args": {"widht": 3}}}, MODEL, ["mymodel:net", "TypeError", "widht"]),
    "no module returned": ({}, "def net():\n    return 3\n", ["mymodel:net", "int", "torch.nn.Module"]),
    "raises in the forward pass": (
        {},
        "from torch import nn\n\n\nclass net(nn.Linear):\n    def __init__(self):\n        super().__init__(4, 3)\n\n"
        "    def forward(self, x):\n        raise ValueError('cannot')\n",
        ["forward pass", "ValueError", "cannot", "mymodel.py, line 9, in forward"],
    ),
    "another width than the data": ({}, MODEL.replace("Linear(4", "Linear(5"), ["forward pass", "RuntimeError"]),
    "unknown loss": ({"task": {"loss": "cross_entorpy"}}, MODEL, ["task.loss", "'cross_entorpy'", "cross_entropy", "mse"]),
    "unknown loss function": ({"task": {"loss": "mymodel:los"}}, MODEL + "loss = 1\n", ["has no los", "did you mean loss?"]),
}


@pytest.mark.parametrize("name", BAD_CODE)
def test_bad_code(refused, project, name):
    settings, code, says = BAD_CODE[name]
    message = refused(project(settings, model=code), "train-base", code=2, says=says)
    # Of a traceback only the user's own frames are of use.
    assert not re.search(r"(user_code|loader|supervised|stage|train_base|module)\.py, line", message)


def test_mended_code_needs_no_further_word(refused, project, ocd):
    # The message says "run the same command again", so that must work.
    folder = project(model="1 / 0\n" + MODEL)
    refused(folder, "train-base", code=2, says=["run the same command again"])
    (folder.root / "mymodel.py").write_text(MODEL)
    ocd(folder, "train-base")


OWN_TASK = """\
import torch
from stages.tasks.protocol import Task


class Own(Task):
    kind = "classification"

    def model(self):
        return torch.nn.Linear(2, 2)

    def train(self):
        return [(torch.tensor([float(i), 1.0]), i % 2) for i in range(12)]

    def test(self):
        return self.train()

    def loss(self, output, y):
        return torch.nn.functional.cross_entropy(output, y, reduction="none")
"""
OWN = {"task": {"model": None, "loss": None, "train": None, "test": None, "class": "task:Own"}}


@pytest.mark.parametrize("method", ["model", "train", "test", "loss"])
def test_task_without_a_method(refused, project, method):
    folder = project(OWN)
    (folder.root / "task.py").write_text(OWN_TASK.replace(f"def {method}(", f"def other_{method}("))
    refused(folder, "train-base", code=2, says=["task:Own", f"lacks {method}"])


def test_task_of_another_class(refused, project):
    folder = project(OWN)
    (folder.root / "task.py").write_text(OWN_TASK.replace("Own(Task)", "Own"))
    refused(folder, "train-base", code=2, says=["task:Own", "stages.tasks.protocol.Task"])


def test_own_task_works(project, ocd):
    # The control for the two above.
    folder = project(OWN)
    (folder.root / "task.py").write_text(OWN_TASK)
    ocd(folder, "run", "--until", "collect")


# The order of the stages


@pytest.mark.parametrize("number", range(1, 6))
def test_a_stage_before_those_it_needs(refused, project, number):
    needed = {
        "select-layer": ["train-base"],
        "collect": ["train-base", "select-layer"],
        "train-diffusion": ["train-base", "select-layer", "collect"],
        "train-scale": ["train-base", "select-layer", "collect"],
        "infer": ["train-base", "select-layer", "collect", "train-diffusion", "train-scale"],
    }[STAGES[number]]
    folder = project()
    says = [*(f"{name} is missing" for name in needed), " && ".join(f"ocd {name}" for name in needed)]
    refused(folder, STAGES[number], code=3, says=says)
    assert not folder.run.exists()


def test_stale_stage(refused, finished):
    args = ("--set", "collect.lr=0.02")
    refused(finished, "collect", *args, code=3, says=["collect is stale", "collect.lr was 0.01, is now 0.02", "--force"])
    says = ["collect is stale", "collect.lr was 0.01, is now 0.02", "ocd collect --set collect.lr=0.02 --force"]
    refused(finished, "train-scale", *args, code=3, says=says)
    refused(finished, "infer", *args, code=3, says=says)


def test_data_changed_between_stages(refused, finished):
    x, y = arrays(40, 5)
    finished.save("train.npz", x, y)
    says = ["train-base is stale", "content of train was", "is now", "ocd train-base --force"]
    refused(finished, "collect", "--force", code=3, says=says)


def test_code_changed_between_stages(refused, finished):
    (finished.root / "mymodel.py").write_text(MODEL.replace("Tanh", "ReLU"))
    refused(finished, "collect", "--force", code=3, says=["train-base is stale", "mymodel.py", "ocd train-base --force"])


# Other folders


def test_run_directory_of_another_task(refused, finished):
    (finished.root / "other.py").write_text(MODEL)
    for stage in ("train-base", "collect", "infer", "verify"):
        args = (stage, "--set", "task.model=other:net")
        refused(finished, *args, code=3, says=["belongs to task 'mymodel:net'", "'other:net'", "--run"])


def test_run_directory_of_another_format(refused, finished):
    path = finished.run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    refused(finished, "collect", code=3, says=["format version 99", "expected 1", "--run"])


def test_stage_of_another_format(refused, finished):
    path = finished.run / "collect" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["format_version"] = 99
    path.write_text(json.dumps(manifest))
    refused(finished, "train-scale", code=3, says=["collect", "format version 99", "expected 1"])


def test_folder_of_other_things(refused, project, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    args = ("train-base", "--run", tmp_path / "photos")
    refused(project(), *args, code=3, says=["not a run directory", "cat.jpg", "--run"])
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]


def test_run_directory_that_is_a_file(refused, project, tmp_path):
    (tmp_path / "file").write_text("kept")
    refused(project(), "train-base", "--run", tmp_path / "file", code=3, says=["is a file", "--run"])
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["run.json", "collect/manifest.json"])
def test_record_that_is_not_json(refused, finished, name):
    (finished.run / name).write_text('{"format_version"')
    refused(finished, "train-scale", code=3, says=[name.split("/")[-1]])


@pytest.mark.parametrize("damage", ["{", "{}", "[]", None])
def test_damaged_manifest_can_be_forced(refused, finished, ocd, damage):
    path = finished.run / "train-scale" / "manifest.json"
    path.unlink()
    if damage:
        path.write_text(damage)
    refused(finished, "train-scale", code=3, says=["train-scale", "manifest.json", "--force"])
    ocd(finished, "train-scale", "--force")


def test_damaged_record_of_unfinished_work_can_be_forced(refused, finished, ocd):
    shutil.move(finished.run / "train-scale", finished.run / "train-scale.wip")
    (finished.run / "train-scale.wip" / "manifest.json").unlink()
    (finished.run / "train-scale.wip" / "begun.json").write_text("{")
    refused(finished, "train-scale", code=3, says=["begun.json", "--force"])
    ocd(finished, "train-scale", "--force")


# The layer


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("0.wieght", ["'0.wieght' does not exist", "did you mean 0.weight?", "2.weight (3, 6)", "--layer 0.weight"]),
        ("0.bias", ["'0.bias' is a vector of 6", "0.weight (6, 4)", "2.weight (3, 6)"]),
    ],
)
def test_layer(refused, project, ocd, name, says):
    folder = project()
    ocd(folder, "train-base")
    refused(folder, "select-layer", "--layer", name, code=2, says=says)
    # What the message says to type works as it stands.
    ocd(folder, "select-layer", "--layer", "0.weight")


# Data


def with_row(value, row):
    x, y = arrays(40, 0)
    x[row, 1] = value
    return x, y


def labels(row, value):
    x, y = arrays(40, 0)
    y[row] = value
    return x, y


def ragged():
    x = np.empty(4, dtype=object)
    x[:] = [[1.0], [1.0, 2.0], [1.0], [1.0]]
    return x, np.zeros(4, dtype=int)


BAD_ARRAYS = {
    "no rows": (lambda: (np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=int)), ["empty", "(0, 4)"]),
    "ragged": (ragged, ["x is ragged", "pickle", "rectangular"]),
    "pickled labels": (lambda: (arrays(4, 0)[0], np.array([{}, {}, {}, {}])), ["y is ragged or holds Python objects"]),
    "not a number": (lambda: with_row(np.nan, 7), ["x[7] is not finite"]),
    "infinite": (lambda: with_row(np.inf, 39), ["x[39] is not finite"]),
    "labels that are no numbers": (lambda: (arrays(3, 0)[0], np.array(["a", "b", "c"])), ["y has dtype <U1"]),
    "complex": (lambda: (arrays(3, 0)[0].astype(complex), np.zeros(3, dtype=int)), ["x has dtype complex128"]),
    "a single number": (lambda: (np.float32(3), np.zeros(1, dtype=int)), ["x is a single number"]),
    "unlike lengths": (lambda: (arrays(40, 0)[0], np.zeros(39, dtype=int)), ["x has 40 rows", "y has 39"]),
    "no labels": (lambda: (arrays(40, 0)[0], None), ["no array y", "numpy.savez"]),
    "pictures of bytes": (lambda: (np.zeros((9, 4), dtype=np.uint8), np.zeros(9, dtype=int)), ["uint8", "/ 255"]),
    "label too large": (lambda: labels(5, 3), ["y[5]", "label 3 is out of range", "3 outputs", "0 … 2"]),
    "label below zero": (lambda: labels(38, -1), ["y[38]", "label -1 is out of range"]),
    "labels with fractions": (lambda: (arrays(9, 0)[0], np.full(9, 0.5)), ["cross_entropy needs integer labels", "float"]),
    "labels of another shape": (lambda: (arrays(9, 0)[0], np.zeros((9, 2), dtype=int)), ["(4, 2)", "does not fit", "(4, 3)"]),
}


# These two are a matter of the whole task, found with train.
OF_THE_TASK = ("labels of another shape", "labels with fractions")


@pytest.mark.parametrize(
    ("role", "name"),
    [
        (role, name)
        for name in BAD_ARRAYS
        for role in ("train", "test", "validation")
        if role == "train" or name not in OF_THE_TASK
    ],
)
def test_bad_arrays(refused, project, role, name):
    make, says = BAD_ARRAYS[name]
    folder = project({"task": {"validation": "validation.npz"}} if role == "validation" else {})
    folder.save("validation.npz", *arrays(12, 3))
    folder.save(f"{role}.npz", *make())
    where = [] if name.startswith("labels ") else [f"{role}"]
    refused(folder, "train-base", code=2, says=says + where)


def test_labels_of_a_regression_that_are_not_finite(refused, project):
    x, _ = arrays(40, 0)
    y = np.ones((40, 3))
    y[11, 2] = np.nan
    folder = project({"task": {"loss": "mse"}})
    folder.save("train.npz", x, y)
    refused(folder, "train-base", code=2, says=["train.npz", "y[11] is not finite"])


def broken_zip(path):
    path.write_bytes(path.read_bytes()[:200])


def empty_zip(path):
    zipfile.ZipFile(path, "w").close()


def single_array(path):
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))


@pytest.mark.parametrize("role", ["train", "test"])
def test_binary_label_out_of_range(refused, project, role):
    # Here a label is a row of numbers, any of which may be the wrong one.
    folder = project({"task": {"loss": "binary_cross_entropy"}})
    for name, rows in (("train", 40), ("test", 24)):
        y = np.zeros((rows, 3))
        y[9, 1] = 2 if name == role else 1
        folder.save(f"{name}.npz", arrays(rows, 0)[0], y)
    refused(folder, "train-base", code=2, says=[role, "y[9]", "label 2 is out of range", "[0, 1]"])


BAD_FILES = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "train.npz"),
    "a text": (lambda path: path.write_text("x,y\n1,2\n"), "is not an npz file"),
    "nothing": (lambda path: path.write_bytes(b""), "is not an npz file"),
    "cut short": (broken_zip, "is not an npz file"),
    "an empty archive": (empty_zip, "no array x"),
    "a single array": (single_array, "single array"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps({"x": 1})), "is not an npz file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_file(refused, project, name):
    spoil, says = BAD_FILES[name]
    folder = project()
    spoil(folder.root / "train.npz")
    message = refused(folder, "train-base", code=2, says=["train.npz", says])
    assert "allow_pickle=True" not in message


def test_mended_data_need_no_further_word(refused, project, ocd):
    folder = project()
    folder.save("train.npz", *with_row(np.nan, 3))
    refused(folder, "train-base", code=2, says=["x[3]"])
    folder.save("train.npz", *arrays(40, 0))
    ocd(folder, "train-base")


def test_float64_is_converted(project, ocd, finished):
    folder = project()
    x, y = arrays(40, 0)
    folder.save("train.npz", x.astype(np.float64), y.astype(np.uint8))
    ocd(folder, "train-base", "--run", folder.root / "wide")
    wide = (folder.root / "wide" / "train-base" / "base.safetensors").read_bytes()
    assert wide == (finished.run / "train-base" / "base.safetensors").read_bytes()


# Data from code

BAD_DATASETS = {
    "raises at one row": (
        "class Rows:\n    def __len__(self):\n        return 9\n\n    def __getitem__(self, i):\n        if i == 5:\n"
        "            raise OSError('row is unreadable')\n        return torch.zeros(4), 0\n\n\ntrain_set = DeltaBatch()\n",
        ["train[5] raised OSError", "row is unreadable", "mymodel.py, line"],
    ),
    "no length": ("def train_set():\n    return iter([(torch.zeros(4), 0)])\n", ["train has no length", "__len__"]),
    "empty": ("def train_set():\n    return []\n", ["train is empty"]),
    "one sample": ("def train_set():\n    return [(torch.zeros(4), 0)]\n", ["1 sample", "task.validation"]),
    "no pairs": ("def train_set():\n    return [torch.zeros(4)] * 9\n", ["train[0] is Tensor", "pair (x, y)"]),
    "ragged": (
        "def train_set():\n    return [(torch.zeros(4 + i), 0) for i in range(9)]\n",
        ["train: rows", "do not stack", "same shape"],
    ),
    "raises": ("def train_set():\n    raise OSError('server away')\n", ["mymodel:train_set raised OSError", "server away"]),
    "label out of range": (
        "def train_set():\n    return [(torch.zeros(4), 3 * (i == 2)) for i in range(9)]\n",
        ["label 3 is out of range", "[2]"],
    ),
}


@pytest.mark.parametrize("name", BAD_DATASETS)
def test_bad_dataset(refused, project, name):
    code, says = BAD_DATASETS[name]
    folder = project({"task": {"train": "mymodel:train_set"}}, model="import torch\n" + MODEL + "\n\n" + code)
    refused(folder, "train-base", code=2, says=says)


# Loss and model

BAD_LOSSES = {
    "one value for all": ("F.cross_entropy(output, y)", 2, ["()", "batch of", "one value per sample", 'reduction="none"']),
    "a column": ("F.cross_entropy(output, y, reduction='none')[:, None]", 2, ["1)", "one value per sample"]),
    "no tensor": ("3.0", 2, ["float", "one value per sample"]),
    "raises": ("output.nothing", 2, ["the loss raised AttributeError", "mymodel.py, line"]),
    "not a number": ("F.cross_entropy(output, y, reduction='none') * float('nan')", 1, ["train[", "nan"]),
    "detached": ("F.cross_entropy(output, y, reduction='none').detach()", 2, ["loss does not depend on"]),
    "constant": ("torch.ones(len(y))", 2, ["loss does not depend on"]),
}


def loss_code(expression):
    return f"import torch\nimport torch.nn.functional as F\n{MODEL}\n\ndef my_loss(output, y):\n    return {expression}\n"


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_bad_loss(refused, project, name):
    expression, code, says = BAD_LOSSES[name]
    folder = project({"task": {"loss": "mymodel:my_loss"}}, model=loss_code(expression))
    refused(folder, "train-base", code=code, says=says)


def test_custom_loss_works(project, ocd):
    folder = project({"task": {"loss": "mymodel:my_loss"}}, model=loss_code("F.cross_entropy(output, y, reduction='none')"))
    ocd(folder, "run")


UNUSED = """\
from torch import nn


class net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.uncalled = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        self.unused(x)
        return self.used(x)
"""


@pytest.mark.parametrize("layer", ["unused.weight", "uncalled.weight"])
def test_loss_that_does_not_depend_on_the_layer(refused, project, ocd, layer):
    folder = project({"select-layer": {"layer": layer, "draws": 0}}, model=UNUSED)
    ocd(folder, "run", "--until", "select-layer")
    says = {"unused.weight": "the loss does not depend on the layer", "uncalled.weight": "is not called"}[layer]
    refused(folder, "collect", code=2, says=[says, "layer"])


MIXING = {
    "batch statistics": "nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3))",
    "a mean over the batch": "nn.Sequential(nn.Linear(4, 3), Centred())",
}


@pytest.mark.parametrize("name", MIXING)
def test_model_that_mixes_samples(refused, project, name):
    code = (
        "from torch import nn\n\n\nclass Centred(nn.Module):\n    def forward(self, x):\n        return x - x.mean(0)\n\n\n"
        f"def net():\n    return {MIXING[name]}\n"
    )
    refused(project(model=code), "train-base", code=2, says=["mixes samples in eval mode", "running statistics"])


def test_running_statistics_are_fine(project, ocd):
    code = (
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))\n"
    )
    ocd(project(model=code), "run")


def test_output_that_is_a_dict(project, ocd):
    code = (
        "import torch.nn.functional as F\nfrom torch import nn\n\n\nclass net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.body, self.side = nn.Linear(4, 3), nn.Linear(4, 2)\n\n"
        "    def forward(self, x):\n        return {'logits': self.body(x), 'hidden': self.side(x)}\n\n\n"
        "def my_loss(output, y):\n    return F.cross_entropy(output['logits'], y, reduction='none')\n"
    )
    folder = project({"task": {"loss": "mymodel:my_loss"}, "select-layer": {"layer": "body.weight"}}, model=code)
    ocd(folder, "run")
    with np.load(folder.run / "infer" / "test" / "predictions.npz") as found:
        shapes = {name: found[name].shape for name in found.files}
    assert shapes["output.logits"] == shapes["base_output.logits"] == (24, 3)
    assert shapes["output.hidden"] == shapes["base_output.hidden"] == (24, 2)
    assert shapes["member_output.logits"] == (24, 2, 3)
    # One more member, too.
    ocd(folder, "infer", "--ensemble", 3)
    with np.load(folder.run / "infer" / "test" / "predictions.npz") as found:
        assert found["member_output.logits"].shape == (24, 3, 3)


# Imported weights


@pytest.fixture(scope="session")
def trained(finished_run):
    return load_file(finished_run.run / "train-base" / "base.safetensors")


IMPORTS = {
    "safetensors": lambda path, state: save_file(state, path),
    "plain": lambda path, state: torch.save(state, path),
    "nested under state_dict": lambda path, state: torch.save({"epoch": 3, "state_dict": state}, path),
    "nested under model": lambda path, state: torch.save({"model": state, "optimizer": {"lr": 1}}, path),
    "prefixed": lambda path, state: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "nested and prefixed": lambda path, state: torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_weights_import(project, ocd, trained, finished_run, name):
    folder = project()
    path = folder.root / ("weights.safetensors" if name == "safetensors" else "weights.pt")
    IMPORTS[name](path, trained)
    summary = json.loads(ocd(folder, "train-base", "--weights", path, "--json").stdout)
    assert summary["imported"] == path.name
    base = "train-base/base.safetensors"
    assert (folder.run / base).read_bytes() == (finished_run.run / base).read_bytes()


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def spoiled(state, **changes):
    return {name: value for name, value in (state | changes).items() if value is not None}


BAD_WEIGHTS = {
    "missing": (lambda path, state: None, 2, ["weights.pt is missing"]),
    "a text": (lambda path, state: path.write_text("hello"), 2, ["weights.pt cannot be read", "safetensors"]),
    "a whole model": (lambda path, state: torch.save(torch.nn.Linear(4, 3), path), 2, ["cannot be read", "state_dict()"]),
    "a list": (lambda path, state: torch.save([1, 2], path), 2, ["list", "state dict"]),
    "a key too few": (lambda p, s: torch.save(spoiled(s, **{"2.bias": None}), p), 2, ["missing: 2.bias (3,)"]),
    "a key too many": (lambda p, s: torch.save(spoiled(s, extra=torch.ones(2)), p), 2, ["unexpected: extra (2,)"]),
    "another shape": (
        lambda p, s: torch.save(spoiled(s, **{"0.weight": torch.ones(7, 4)}), p),
        2,
        ["0.weight: the file has (7, 4), the model (6, 4)"],
    ),
    "everything at once": (
        lambda p, s: torch.save({"weight": torch.ones(3)}, p),
        2,
        ["missing: 0.weight", "missing: 2.bias", "unexpected: weight", "task.model"],
    ),
    "not a number": (
        lambda p, s: torch.save(spoiled(s, **{"0.weight": torch.full((6, 4), float("nan"))}), p),
        1,
        ["train[", "nan", "weights"],
    ),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(refused, project, trained, name):
    write, code, says = BAD_WEIGHTS[name]
    folder = project()
    write(folder.root / "weights.pt", trained)
    refused(folder, "train-base", "--weights", folder.root / "weights.pt", code=code, says=["weights", *says])


def test_damaged_safetensors(refused, project):
    folder = project({"task": {"weights": "weights.safetensors"}})
    (folder.root / "weights.safetensors").write_bytes(b"\x10" * 50)
    refused(folder, "train-base", code=2, says=["weights.safetensors", "damaged"])


def test_weights_with_code_inside_are_refused(refused, project, trained, tmp_path):
    folder = project()
    torch.save({**trained, "evil": Evil(f"touch {tmp_path / 'ran'}")}, folder.root / "weights.pt")
    message = refused(folder, "train-base", "--weights", folder.root / "weights.pt", code=2, says=["weights.pt", "safetensors"])
    assert not (tmp_path / "ran").exists()
    # torch's own message explains how to run the code after all.
    assert "weights_only=False" not in message
    assert "can still be loaded" not in message


# --input

GOOD_INPUT = np.random.default_rng(4).normal(size=(5, 4)).astype(np.float32)
BAD_INPUTS = {
    "missing": (None, ["new.npz is missing"]),
    "another shape": ({"x": np.zeros((5, 3), dtype=np.float32)}, ["new.npz", "float32 (3,)", "expected float32 (4,)"]),
    "another rank": ({"x": np.zeros((5, 4, 1), dtype=np.float32)}, ["new.npz", "(4, 1)", "(4,)"]),
    "another dtype": ({"x": np.zeros((5, 4), dtype=np.int32)}, ["new.npz", "int64", "expected float32 (4,)"]),
    "bytes": ({"x": np.zeros((5, 4), dtype=np.uint8)}, ["new.npz", "uint8", "/ 255"]),
    "not a number": ({"x": np.where(np.arange(20).reshape(5, 4) == 9, np.nan, GOOD_INPUT)}, ["new.npz", "x[2] is not finite"]),
    "no rows": ({"x": GOOD_INPUT[:0]}, ["new.npz", "empty"]),
    "no x": ({"inputs": GOOD_INPUT}, ["new.npz", "no array x", "inputs"]),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_file(refused, finished, ocd, name):
    given, says = BAD_INPUTS[name]
    path = finished.root / "new.npz"
    if given is not None:
        np.savez(path, **given)
    refused(finished, "infer", "--input", path, code=2, says=says)
    np.savez(path, x=GOOD_INPUT.astype(np.float64))
    assert json.loads(ocd(finished, "infer", "--input", path, "--json").stdout)["inputs"] == 5


# The machine


def test_cuda_asked_for_and_absent(refused, project, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(project(), "train-base", "--device", "cuda", code=2, says=["cuda", "--device cpu"])


@pytest.mark.parametrize("stage", ["collect", "train-diffusion", "infer"])
def test_not_enough_disk(refused, finished, ocd, monkeypatch, stage):
    usage = shutil.disk_usage(finished.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=700))
    refused(finished, stage, "--force", code=4, says=["not enough disk", "bytes are needed", "700 are free", "--run"])
    monkeypatch.undo()
    states = json.loads(ocd(finished, "status", "--json").stdout)["stages"]
    assert states[stage]["state"] == "done"


@pytest.mark.parametrize("writes", [0, 3, 7])
@pytest.mark.parametrize("stage", STAGES)
def test_disk_full_while_writing(refused, finished, ocd, monkeypatch, stage, writes):
    shutil.rmtree(finished.run / stage)
    left, sync = [writes], os.fsync

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refused(finished, stage, code=4, says=["disk is full", "run the same command again"])
    monkeypatch.undo()
    ocd(finished, stage)


def test_folder_that_cannot_be_written(refused, project, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(project(), "train-base", "--run", tmp_path / "closed" / "run", code=3, says=["cannot be written", "--run"])


def test_stage_in_use(refused, finished, ocd):
    # Locks belong to open files, so one held here keeps out a command in the same process, too.
    with StageFolder(finished.run, "collect").lock():
        says = ["collect is in use by process", str(os.getpid()), " on ", " since ", "run the same command again"]
        refused(finished, "collect", "--force", code=4, says=says)
        # Looking, and other stages, are no concern of the lock.
        ocd(finished, "status")
        ocd(finished, "train-scale")
    ocd(finished, "collect", "--force")


def test_fault_of_ours(refused, project, ocd, monkeypatch, tmp_path):
    folder = project()
    ocd(folder, "run", "--until", "select-layer")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    with stopped_at(0, RuntimeError("boom")):
        message = refused(folder, "collect", code=1, says=["fault in ocd itself", "RuntimeError: boom"])
    (kept,) = tmp_path.glob("ocd-*.txt")
    assert str(kept) in message
    assert "Traceback" in kept.read_text()
    ocd(folder, "collect")


def test_out_of_memory(refused, project, ocd):
    folder = project()
    ocd(folder, "run", "--until", "select-layer")

    with stopped_at(0, MemoryError("too much")):
        refused(folder, "collect", code=1, says=["out of memory", "batch_size"])


@pytest.fixture
def interrupted_collect(project, refused, ocd):
    """A project whose collect was interrupted after two of five blocks."""
    folder = project({"collect": {"block_samples": 8}})
    ocd(folder, "run", "--until", "select-layer")
    with stopped_at(2):
        refused(folder, "collect", code=4, says=["collect was interrupted", "kept", "run the same command again"])
    return folder


def test_interrupted_collect_continues(interrupted_collect, ocd):
    with counted_blocks() as written:
        ocd(interrupted_collect, "collect")
    assert sorted(written) == [2, 3, 4]


def test_interrupted_collect_with_another_setting_stops(interrupted_collect, refused, ocd):
    says = ["collect is stale", "unfinished", "collect.lr was 0.01, is now 0.02", "ocd collect --set collect.lr=0.02 --force"]
    refused(interrupted_collect, "collect", "--set", "collect.lr=0.02", code=3, says=says)
    ocd(interrupted_collect, "collect", "--set", "collect.lr=0.02", "--force")


@pytest.mark.parametrize("stage", ["train-base", "train-diffusion", "train-scale"])
def test_interrupted_training_continues(finished, refused, ocd, monkeypatch, stage):
    wanted = json.loads((finished.run / stage / "manifest.json").read_text())["content"]
    shutil.rmtree(finished.run / stage)
    advance, left = Trainer.advance, [3]

    def interrupted(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return advance(self)

    options = [] if stage == "train-base" else ["--set", f"{stage}.checkpoint_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", interrupted)
        refused(finished, stage, *options, code=4, says=[f"{stage} was interrupted", "run the same command again"])
    ocd(finished, stage, *options)
    assert json.loads((finished.run / stage / "manifest.json").read_text())["content"] == wanted


# A run directory from elsewhere


@pytest.mark.parametrize("name", ["../../secret", "{root}/secret", "link"])
def test_manifest_that_leads_out(refused, finished, name):
    (finished.root / "secret").write_text("secret")
    name = name.format(root=finished.root)
    if name == "link":
        (finished.run / "collect" / "link").symlink_to(finished.root / "secret")
    path = finished.run / "collect" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"size": 6, "mtime_ns": 0, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    refused(finished, "train-scale", code=3, says=["collect", name, "leads out"])


def test_ledger_that_leads_out(project, ocd, interrupted_collect):
    # A block's record names files, too: one that names others does not count, and the block is made again.
    folder = interrupted_collect
    path = folder.run / "collect.wip" / "blocks" / "000000.json"
    good = path.read_text()
    record = json.loads(good)
    record["chunks"]["../../../mymodel.py"] = {"bytes": (folder.root / "mymodel.py").stat().st_size, "sha256": "0" * 64}
    path.write_text(json.dumps(record))
    ocd(folder, "collect")
    assert json.loads((folder.run / "collect" / "blocks" / "000000.json").read_text()) == json.loads(good)


def same_size_and_time(path, change):
    """Change a file so that neither its size nor its time tell."""
    info, data = path.stat(), path.read_bytes()
    changed = change(data)
    assert changed != data
    assert len(changed) == len(data)
    path.write_bytes(changed)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize(
    ("array", "change"),
    [
        ("delta", lambda data: re.sub(rb'"shape": *\[\s*36,', lambda m: m[0].replace(b"36", b"99"), data)),
        ("rho", lambda data: data.replace(b'"float32"', b'"float64"')),
    ],
)
def test_store_that_is_not_what_its_manifest_says(refused, finished, array, change):
    same_size_and_time(finished.run / "collect" / "deltas.zarr" / array / "zarr.json", change)
    shutil.rmtree(finished.run / "train-scale")
    refused(finished, "train-scale", code=3, says=[array, "manifest says", "ocd collect --force"])


def test_chunk_with_a_flipped_byte(refused, finished):
    same_size_and_time(
        finished.run / "collect" / "deltas.zarr" / "rho" / "c.0", lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:]
    )
    shutil.rmtree(finished.run / "train-scale")
    refused(
        finished, "train-scale", code=3, says=["rho is damaged", "ocd verify names the blocks; ocd collect then redoes them"]
    )


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("train-base/base.safetensors", "select-layer"),
        ("train-diffusion/denoiser.safetensors", "infer"),
        ("train-scale/scale.safetensors", "infer"),
    ],
)
def test_weights_with_a_flipped_byte(refused, finished, file, stage):
    # Inputs are hashed before they are read, so that damage the file's size and time do not show is no silent error.
    same_size_and_time(finished.run / file, lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    shutil.rmtree(finished.run / stage)
    refused(finished, stage, code=3, says=[file.split("/")[0], "content changed"])
