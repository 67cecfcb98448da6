"""What else a task may say: modules to watch, where its samples lie, and what its own trainer reports."""

import numpy as np
import pytest
import torch
from folders import PROJECTS, make_folder, own_task, reader_of, store
from overfitters import forward
from refusals import refusal
from torch import nn

from stages.foundation.errors import TaskError
from stages.infer import open_run
from stages.per_sample.capture import capture
from stages.per_sample.layer import find_layer
from stages.tasks.conditioning import condition
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.modules import load_object
from stages.tasks.neighbours import input_blocks, nearest, places_of
from stages.tasks.protocol import Task

SETTINGS = {"select-layer": {"layer": "fc.weight", "draws": 0}, "evaluate": {"resamples": 100, "strengths": [0.0, 1.0]}}


def known_task():
    return load_object(PROJECTS / "watched", "mytask:Watching", "task.class")()


def make(root, name="Watching", **args):
    return make_folder(root, {**SETTINGS, "task": own_task(f"mytask:{name}", **args)}, "watched")


@pytest.fixture(scope="module")
def watched_run(ocd, tmp_path_factory):
    """A project with everything done, and what its run told; not to be changed."""
    folder = make(tmp_path_factory.mktemp("watched") / "project")
    return folder, ocd(folder, "run").stderr


@pytest.fixture
def watched(watched_run, tmp_path):
    """A copy of it."""
    return watched_run[0].copy(tmp_path / "watched")


# Watched modules


def test_what_is_watched_is_stored_under_the_modules_names(watched_run):
    folder, _ = watched_run
    assert set(reader_of(folder).field_names()) == {"layer_input", "activation", "base_output", "early_gate", "early_wide"}
    arrays = store(folder)
    x = known_task().train().x[arrays["sample_index"]]
    # Too wide to keep: its mean over the 2,000.
    np.testing.assert_allclose(arrays["early_wide"], 999.5 * x[:, :3], rtol=1e-4)
    summary = folder.summary("collect")
    assert summary["pooled"] == {"early_wide": "mean over axes [1] of (2000, 3)"}
    fields = folder.read("train-diffusion/denoiser.json")["fields"]
    assert (fields["early_gate"], fields["early_wide"]) == (5, 3)


def test_the_tasks_own_conditioning_gets_them_as_they_are(ocd, tmp_path):
    folder = make(tmp_path / "project", "Conditioned")
    ocd(folder, "run", "--quiet", "--until", "collect")
    arrays = store(folder)
    assert set(reader_of(folder).field_names()) == {"widest", "gate"}
    small = known_task().train().x[arrays["sample_index"]][:, :3]
    np.testing.assert_allclose(arrays["widest"], np.maximum(1999 * small.numpy(), 0), rtol=1e-5)
    assert arrays["gate"].shape == (24, 5)


class Clashing(nn.Module):
    """Modules whose fields would have names that are taken."""

    def __init__(self):
        super().__init__()
        self.layer_input, self.a, self.a_b = nn.Linear(3, 3), nn.ModuleDict({"b": nn.Linear(3, 3)}), nn.Linear(3, 3)

    def forward(self, x):
        return self.a_b(self.a["b"](self.layer_input(x)))


@pytest.mark.parametrize(("names", "field"), [(["layer_input"], "layer_input"), (["a.b", "a_b"], "a_b")])
def test_fields_of_one_name(names, field):
    model = Clashing().requires_grad_(False)
    with pytest.raises(TaskError, match=f"watched = '{names[-1]}': the model would have two fields called {field}"):
        capture(model, find_layer(model, "a_b.weight"), forward, torch.randn(2, 3), names)
    assert not any(module._forward_hooks for module in model.modules())


def test_capture_of_watched_modules():
    torch.manual_seed(0)
    model, x = Clashing().requires_grad_(False), torch.randn(4, 3)
    output, fields = capture(model, find_layer(model, "a_b.weight"), forward, x, ["a.b"])
    assert set(fields) == {"layer_input", "activation", "a_b", "base_output"}
    assert torch.equal(fields["a_b"], model.a["b"](model.layer_input(x)))
    assert torch.equal(fields["layer_input"], fields["a_b"])
    assert torch.equal(output, fields["base_output"])
    assert not any(module._forward_hooks for module in model.modules())


def test_the_layer_itself_may_be_watched():
    torch.manual_seed(0)
    task, model, x = Task(), Clashing().requires_grad_(False), torch.randn(4, 3)
    task.watched = ["a_b"]
    _, fields, _ = condition(task, model, find_layer(model, "a_b.weight"), x)
    assert torch.equal(fields["a_b"], fields["activation"])


@pytest.mark.parametrize("watched", ["0", [0], None, [""]])
def test_watched_must_be_names(watched):
    model, task = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False), Task()
    task.watched = watched
    with pytest.raises(TaskError, match=r"watched = .*: (expected names of modules|the model has no module)"):
        condition(task, model, find_layer(model, "0.weight"), torch.randn(2, 3))


# Coordinates


def test_neighbours_are_found_where_the_task_says_samples_lie(ocd, watched):
    """By the numbers themselves the widest one would decide."""
    task = known_task()
    train, test = task.train(), task.test()
    by_place = torch.cdist(test.x[:, :3], train.x[:, :3]).argmin(1)
    by_numbers = torch.cdist(test.x, train.x).argmin(1)
    assert (by_place != by_numbers).sum() >= 3
    found = nearest(places_of(task, test.x), input_blocks(task, Split(train), torch.arange(24), torch.device("cpu")), 1)
    assert torch.equal(found.row[:, 0], by_place)
    rows = {row["name"]: row for row in ocd.json(watched, "evaluate")["rows"]}
    assert rows["nearest neighbour"]["metrics"]["mse"]["mean"] == pytest.approx(
        _with_deltas_of(watched, by_place, test), rel=1e-4
    )


def _with_deltas_of(folder, neighbours, test):
    """The mean loss on test samples with the deltas of these training samples, by hand."""
    arrays, model = store(folder), open_run(folder.config, overrides=["run.device=cpu"]).model
    place = {number: row for row, number in enumerate(arrays["sample_index"].tolist())}
    errors = []
    for x, y, neighbour in zip(test.x, test.y, neighbours.tolist(), strict=True):
        weight = model.fc.weight + torch.from_numpy(arrays["delta"][place[neighbour]])
        with torch.no_grad():
            output = torch.func.functional_call(model, {"fc.weight": weight}, (x.unsqueeze(0),))[0]
        errors.append(float((output - y).square().mean()))
    return sum(errors) / len(errors)


@pytest.mark.parametrize(
    ("shape", "says"), [("one axis", r"(5,)"), ("one row", r"(1, 3)"), ("list", "list")], ids=["one axis", "one row", "list"]
)
def test_coordinates_of_another_shape(ocd, watched, monkeypatch, shape, says):
    monkeypatch.setenv("SHAPE", shape)
    result = ocd(watched, "evaluate", "--quiet", code=2)
    first = result.stderr.splitlines()
    assert first[0].startswith("error: coordinates() gave ")
    assert first[1] == "  give one row of numbers a sample, (B, d)"
    task = Task()
    task.coordinates = lambda x: {"one axis": x[:, 0], "one row": x[:1, :3], "list": x.tolist()}[shape]
    message, _ = refusal(TaskError, places_of, task, torch.zeros(5, 4))
    assert message == f"coordinates() gave {says} for a batch of 5"


def test_without_coordinates_it_is_the_numbers():
    x = torch.randn(3, 2, 2)
    assert torch.equal(places_of(Task(), x), x.flatten(1))
    assert places_of(Task(), x.long()) is None


def test_integers_that_say_where_they_lie():
    """Inputs without a distance of their own get one."""
    task, x = Task(), torch.arange(12).view(4, 3)
    task.coordinates = lambda x: x[:, :1]
    found = list(input_blocks(task, Split(ArrayDataset(x, None)), torch.tensor([2, 0]), torch.device("cpu")))
    assert found[0][1].tolist() == [[6.0], [0.0]]
    assert found[0][1].dtype == torch.float32


# The trainer's report


def test_what_the_tasks_trainer_reports(watched_run):
    folder, told = watched_run
    assert "train-base: the task trains it\n" in told
    assert "train-base: 3 of 3 rounds" in told
    assert "error 0.1667" in told
    log = (folder.run / "train-base" / "log.txt").read_text()
    assert "the task trains it\n" in log
    assert "3/3 rounds error=0.166667\n" in log
