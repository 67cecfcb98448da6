"""Cases in which a state, a figure or a result could quietly be wrong."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import blocks_of, states, stopped_at

from stages.foundation.progress import Silent
from stages.training.run import Plan, TrainingRun


class Counter:
    """A training whose state is its step."""

    def __init__(self):
        self.step = 0

    def advance(self):
        self.step += 1
        return 1.0 / self.step

    def state(self):
        return {"step": torch.tensor(self.step)}

    def restore(self, tensors, step):
        assert int(tensors["step"]) == step
        self.step = step


MODEL_WITH_NORM = """\
import torch
from torch import nn
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task


class Noisy(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        draw = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(count, 4, generator=draw), torch.arange(count) % 3

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(4), self.y[index]


class MyTask(Task):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def train(self):
        return Noisy(40, 0)

    def test(self):
        return Noisy(12, 1)

    def loss(self, output, y):
        return cross_entropy(output, y)

    def metrics(self, output, y):
        return {"sometimes": torch.where(y == 0, float("nan"), 1.0), **super().metrics(output, y)}

    def conditioning(self, x, output, captured):
        return {"keys": x.sum(1), "wide": captured["layer_input"]}
"""

OWN_TRAINER = """

class Trained(MyTask):
    def train_base(self, model, train, validation, **options):
        assert model.training
        x, y = train.batch(range(len(train)))
        for _ in range(20):
            model(x)
"""


def task_project(project, name="MyTask", extra=""):
    none = dict.fromkeys(("model", "loss", "train", "test"))
    folder = project({"task": {**none, "class": f"task:{name}"}})
    (folder.root / "task.py").write_text(MODEL_WITH_NORM + extra)
    return folder


def test_another_validation_set_changes_the_rows_of_train(ocd, finished):
    """With imported weights the base stays the same, but train is whole again: what was collected is not."""
    base = finished.run / "train-base" / "base.safetensors"
    weights = finished.root / "given.safetensors"
    weights.write_bytes(base.read_bytes())
    with_weights = ("--set", f"task.weights={weights}")
    ocd(finished, "run", "--force", *with_weights)
    changed = (f"task.weights={weights}", "task.validation=test.npz")
    assert set(states(ocd, finished, *changed).values()) == {"stale"}
    ocd(finished, "train-base", "--force", *with_weights, "--set", changed[1])
    found = states(ocd, finished, *changed)
    assert found["train-base"] == "done"
    assert {state for name, state in found.items() if name != "train-base"} == {"stale"}


def test_another_dataset_by_name_is_seen_without_loading_it(ocd, project):
    folder = project({"task": {"train": "data:one"}})
    code = "import numpy as np\nfrom stages.tasks.data import load_npz\nfrom pathlib import Path\n"
    code += (
        "def one():\n    return load_npz(Path(__file__).with_name('train.npz'), labels=True)\n\ndef two():\n    return one()\n"
    )
    (folder.root / "data.py").write_text(code)
    ocd(folder, "train-base")
    assert states(ocd, folder)["train-base"] == "done"
    assert states(ocd, folder, "task.train=data:two")["train-base"] == "stale"


def test_asking_for_less_does_not_delete_unfinished_work(ocd, project):
    folder = project({"collect": {"block_samples": 4}})
    ocd(folder, "run", "--until", "select-layer")
    with stopped_at(5):
        ocd(folder, "collect", code=4)
    result = ocd(folder, "collect", "--set", "collect.samples=6", code=3)
    assert "collect.samples was 'all', is now 6" in result.stderr
    assert len(blocks_of(folder)) == 5
    ocd(folder, "collect")


def test_unfinished_work_of_other_settings_is_neither_counted_nor_deleted(ocd, project):
    folder = project({"collect": {"block_samples": 4, "samples": 12}})
    ocd(folder, "run", "--until", "collect")
    with stopped_at(2):
        ocd(folder, "collect", "--force", "--set", "collect.steps=5", code=4)
    assert states(ocd, folder)["collect"] == "done"
    entry = json.loads(ocd(folder, "status", "--json", "--set", "collect.samples=20").stdout)["stages"]["collect"]
    assert entry["state"] == "stale"
    assert entry["progress"] is None
    assert "collect.steps was 5, is now 2" in ocd(folder, "collect", "--set", "collect.samples=20", code=3).stderr
    assert len(blocks_of(folder)) == 2


def test_a_task_that_trains_its_base_gets_a_model_in_train_mode(ocd, project):
    folder = task_project(project, "Trained", OWN_TRAINER)
    ocd(folder, "train-base")
    from safetensors.torch import load_file

    base = load_file(folder.run / "train-base" / "base.safetensors")
    assert base["1.running_mean"].abs().max() > 0


def test_random_augmentation_flat_fields_and_metrics_without_value(ocd, project):
    """A dataset that draws from torch's generator is the same in every process; a field of one number a sample is one column;
    a metric that is no number for some samples is left blank."""
    folder = task_project(project)
    stages = json.loads(ocd(folder, "run", "--json").stdout)["stages"]
    assert stages["infer"]["metrics"]["base"]["sometimes"] is None
    assert stages["infer"]["metrics"]["base"]["accuracy"] is not None
    assert stages["train-base"]["test"]["sometimes"] is None
    assert set(states(ocd, folder).values()) == {"done"}
    shown = ocd(folder, "infer").stdout
    assert "nan" not in shown.lower()
    store = json.loads((folder.run / "collect" / "manifest.json").read_text())["store"]
    assert store["arrays"]["keys"]["shape"][1:] == [1]


def test_imported_weights_may_move_and_are_not_forgotten(ocd, finished):
    weights = finished.root / "given.safetensors"
    weights.write_bytes((finished.run / "train-base" / "base.safetensors").read_bytes())
    ocd(finished, "train-base", "--force", "--weights", weights)
    weights.rename(finished.root / "elsewhere.safetensors")
    assert states(ocd, finished)["train-base"] == "done"
    result = ocd(finished, "train-base", "--set", "train-base.lr=0.5", code=3)
    assert f"ocd train-base --set train-base.lr=0.5 --weights {weights} --force" in result.stderr


def test_naming_the_layer_that_was_chosen_changes_nothing(ocd, finished):
    chosen = json.loads((finished.run / "select-layer" / "layer.json").read_text())["layer"]
    assert set(states(ocd, finished, f"select-layer.layer={chosen}").values()) == {"done"}
    assert "up to date" in ocd(finished, "select-layer", "--layer", chosen).stdout


def test_a_label_out_of_range_in_an_input_file_names_file_and_row(ocd, finished):
    with np.load(finished.root / "test.npz") as data:
        x, y = data["x"], data["y"].copy()
    y[20] = 7
    result = ocd(finished, "infer", "--input", finished.save("odd.npz", x, y), code=2)
    assert "odd.npz: y[20]: label 7 is out of range" in result.stderr
    assert not (finished.run / "infer" / "odd").exists()


def test_wide_outputs_are_pooled_and_the_store_says_so(ocd, project):
    model = "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(1, 3, 1), nn.Conv2d(3, 2, 1))\n"
    folder = project({"task": {"loss": "mse"}, "select-layer": {"layer": "0.weight"}}, model=model)
    x = np.random.default_rng(0).normal(size=(10, 1, 48, 48)).astype(np.float32)
    for name in ("train", "test"):
        folder.save(f"{name}.npz", x, np.concatenate([x, x], axis=1))
    ocd(folder, "run", "--until", "collect")
    summary = json.loads((folder.run / "collect" / "manifest.json").read_text())
    assert summary["summary"]["pooled"]["base_output"] == "mean over axes [2, 3] of (2, 48, 48)"
    assert summary["store"]["arrays"]["base_output"]["shape"] == [9, 2]


def test_a_layer_without_the_sample_on_its_first_axis_is_refused(ocd, project):
    model = """\
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(1, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(x.t().unsqueeze(2)).mean(0))
"""
    folder = project({"select-layer": {"layer": "inner.weight"}, "task": {"model": "mymodel:Net"}}, model=model)
    ocd(folder, "run", "--until", "select-layer")
    result = ocd(folder, "collect", code=2)
    assert "layer_input of inner.weight is not one row per sample" in result.stderr


def test_a_reader_that_stops_reading_is_no_fault(finished):
    command = f"{sys.executable} -m ocd_cli status --json --config {finished.config} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "fault" not in done.stderr


@pytest.mark.parametrize("stop", [30, 45])
def test_going_on_after_an_evaluation_off_the_grid_equals_never_stopping(tmp_path, stop):
    """The best score lies where only the shorter training looked; the longer one must not know of it."""
    done = []
    for name, ends in (("whole", [80]), ("continued", [stop, 80])):
        folder = tmp_path / name
        folder.mkdir()
        for end in ends:
            counter = Counter()
            trained = TrainingRun(
                folder,
                "fingerprint",
                counter,
                lambda counter=counter: {"score": 1.0 + abs(counter.step - 37)},
                lambda counter=counter: {"at": torch.tensor(counter.step)},
                Plan(max_steps=end, evaluate_steps=20, checkpoint_steps=7, patience=0),
                Silent(),
            ).run()
        done.append((trained.best, trained.steps, (folder / "metrics.jsonl").read_bytes()))
    assert done[0] == done[1]


def test_what_later_stages_need_is_found_before_the_base_is_trained(ocd, project):
    folder = project()
    for setting, says in (("task.test=tst.npz", "tst.npz is missing"), ("select-layer.layer=fc9.weight", "does not exist")):
        assert says in ocd(folder, "run", "--set", setting, code=2).stderr
        assert not folder.run.exists()


def test_a_dataset_class_is_made(ocd, project):
    folder = project({"task": {"train": "data:Rows"}})
    code = "from pathlib import Path\nfrom stages.tasks.data import load_npz\n\n\nclass Rows:\n    def __init__(self):\n"
    code += "        self.data = load_npz(Path(__file__).with_name('train.npz'), labels=True)\n\n    def __len__(self):\n"
    code += "        return len(self.data)\n\n    def __getitem__(self, index):\n        return self.data[index]\n"
    (folder.root / "data.py").write_text(code)
    assert json.loads(ocd(folder, "train-base", "--json").stdout)["parameters"] == 51


def test_small_trainings_take_one_thread_and_the_setting_decides_otherwise(ocd, finished):
    def threads(stage):
        return json.loads((finished.run / stage / "manifest.json").read_text())["made"]["threads"]

    before = torch.get_num_threads()
    assert threads("train-diffusion") == threads("train-scale") == 1
    ocd(finished, "train-scale", "--force", "--set", "run.threads=2")
    assert threads("train-scale") == 2
    assert torch.get_num_threads() == before
