"""Neighbours as conditioning: who may be one, what is said of one, and what a run does with it."""

import copy

import numpy as np
import pytest
import torch
from folders import own_task, put_all
from overfitters import random
from planted import FAST
from torch import nn

from stages.diffusion.neighbour_encoder import NeighbourEncoder
from stages.foundation.progress import Silent
from stages.lifecycle.context import RunContext
from stages.per_sample.layer import find_layer
from stages.per_sample.runner import Runner
from stages.prediction.for_training import neighbour_search, overfitter_of, store_of
from stages.prediction.open_run import open_run
from stages.prediction.predictor import load_retrieval
from stages.run_directory.project import load_project
from stages.tasks.conditioning import fields_of
from stages.training.bank import Bank, identities
from stages.training.retrieval import best_place, caused

NEAR = {"neighbours": 5}
LOCAL = FAST | {
    "task": own_task("mytask:Local"),
    "train-base": {"epochs": 20, "lr": 3e-2, "batch_size": 50, "patience": 0},
    "select-layer": {"layer": "0.weight", "draws": 0},
    "collect": {"optimizer": "sgd", "lr": 0.1, "steps": 3},
    "train-diffusion": FAST["train-diffusion"] | NEAR | {"patience": 0},
}


def context_of(folder):
    return RunContext(load_project(folder.config), Silent())


@pytest.fixture(scope="module")
def near(make_run):
    """A run whose networks are told of neighbours: factors in the store, cells of x in the labels."""
    return make_run(LOCAL, "planted", "infer")


@pytest.fixture(scope="module")
def whole(make_run):
    """The same with whole deltas, and copies of one of the samples among them."""
    changed = {"task": own_task("mytask:Local", copies=8), "collect": {"optimizer": "adam", "lr": 0.01}}
    return make_run(LOCAL | changed, "planted", "infer")


@pytest.mark.parametrize("kind", ["near", "whole"])
def test_the_bank_is_one_row_of_each_sample_that_trains(kind, request):
    folder = request.getfixturevalue(kind)
    context = context_of(folder)
    reader, found = store_of(context), neighbour_search(context).found
    x = context.splits["all"].inputs(torch.from_numpy(reader.read("sample_index")))
    bank = Bank.read(folder.run / "train-diffusion/bank.safetensors")
    places = {row.numpy().tobytes() for row in x[found.found.row[:, 0] >= 0]}
    assert {row.numpy().tobytes() for row in bank.tensors["place"]} < places
    samples = context.splits["all"].rows[torch.from_numpy(reader.read("sample_index"))].unique()
    # One of each, a twentieth held out.
    assert len(bank) == len(samples) - round(len(samples) / 20)
    validation = context.splits["validation"].inputs(torch.arange(len(context.splits["validation"])))
    assert not set(identities(validation).tolist()) & set(bank.tensors["identity"].tolist())


@pytest.mark.parametrize("kind", ["near", "whole"])
def test_a_sample_its_repeats_and_its_copies_are_no_neighbours_of_it(kind, request):
    context = context_of(request.getfixturevalue(kind))
    found, reader = neighbour_search(context).found, store_of(context)
    asked = found.found.row[:, 0] >= 0
    x = context.splits["all"].inputs(torch.from_numpy(reader.read("sample_index")))[asked]
    rows, place = found.found.row[asked], found.bank.tensors["place"]
    most = int(identities(x).unique(return_counts=True)[1].max())
    assert most > 4 if kind == "whole" else most == 1
    assert not (place[rows] == x.unsqueeze(1)).all(2).any()
    # The others are the nearest there are.
    distance = torch.cdist(x.double(), place.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance[(x.unsqueeze(1) == place).all(2)] = torch.inf
    nearest = distance.topk(5, largest=False).values
    torch.testing.assert_close(found.found.distance[asked].double(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["near", "whole"])
def test_a_prediction_sees_of_a_sample_what_the_training_saw(kind, request):
    context = context_of(request.getfixturevalue(kind))
    found, reader, runner = neighbour_search(context).found, store_of(context), overfitter_of(context)
    rows = torch.nonzero(found.found.row[:, 0] >= 0).flatten()[:20]
    x = context.splits["all"].inputs(torch.from_numpy(reader.read("sample_index"))[rows])
    first = runner.first_pass(x)
    fields = fields_of(context.task, torch.nn.Linear, x, first.output, first.captured)[0]
    told = load_retrieval(context, runner)(x, first, fields)["neighbours"]
    assert told.shape[2] == 5
    # Products of other batches differ by rounding.
    torch.testing.assert_close(told, found.tokens(rows, fields), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["near", "whole"])
def test_what_neighbours_cause_is_the_base_under_their_deltas(kind, request):
    """The last numbers of a neighbour, against copies of the base."""
    context = context_of(request.getfixturevalue(kind))
    found, reader = neighbour_search(context).found, store_of(context)
    deltas, index = torch.from_numpy(reader.read("delta")), torch.from_numpy(reader.read("sample_index"))
    in_bank = {int(identity): row for row, identity in enumerate(found.bank.tensors["identity"])}
    row = int(torch.nonzero(found.found.row[:, 0] >= 0).flatten()[7])
    x = context.splits["all"].inputs(index[[row]])
    for place, neighbour in enumerate(found.found.row[row].tolist()):
        names = identities(context.splits["all"].inputs(index))
        own = next(i for i, name in enumerate(names.tolist()) if in_bank.get(name) == neighbour)
        changed = copy.deepcopy(context.base)
        changed[0].weight.data += deltas[own].view_as(changed[0].weight)
        wanted = (changed(x) - context.base(x))[0]
        torch.testing.assert_close(found.effects[row, place], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("last", [nn.Flatten(0), nn.Identity()], ids=["(B,)", "(B, 1)"])
def test_outputs_may_be_one_number_a_sample(last):
    torch.manual_seed(0)
    model, x, deltas = (
        nn.Sequential(nn.Linear(3, 1), last).eval().requires_grad_(False),
        torch.randn(4, 3),
        torch.randn(6, 1, 3),
    )
    runner = Runner(model, find_layer(model, "0.weight"), lambda net, given: net(given), x)
    row = torch.tensor([[0, 5], [1, 2], [3, 3], [4, 0]])
    found = caused(runner, Bank({"delta": deltas}), x, runner.first_pass(x), row)
    torch.testing.assert_close(found, torch.einsum("bkoi,bi->bko", deltas[row], x))


def test_what_tells_equal_inputs():
    x = random(5, 2, 3, dtype=torch.float32)
    x[3] = x[1]
    found = identities(x)
    assert found[3] == found[1]
    assert len(found.unique()) == 4
    half = identities({"a": x.bfloat16(), "b": torch.arange(5) // 3})
    assert len(half.unique()) == 5
    assert identities({"a": x.bfloat16(), "b": torch.zeros(5)}).unique().numel() == 4


def test_the_order_of_neighbours_makes_no_difference():
    torch.manual_seed(0)
    encoder, values = NeighbourEncoder((7, 5), 16), torch.randn(3, 7, 5)
    shuffled = values[:, :, torch.tensor([4, 2, 0, 1, 3])]
    torch.testing.assert_close(encoder(values.flatten(1)), encoder(shuffled.flatten(1)))
    assert not torch.allclose(encoder(values.flatten(1)), encoder(values.roll(1, 1).flatten(1)))


def test_neighbours_tell_what_the_conditioning_does_not(ocd, near, make_run):
    """An offset by cells of x, of which five neighbours tell more than a small network learns of x."""
    told = ocd.json(near, "infer")["metrics"]
    without = make_run(LOCAL | {"train-diffusion": FAST["train-diffusion"] | {"patience": 0}}, "planted", "infer")
    alone = ocd.json(without, "infer")["metrics"]
    base, one, other = (found["mse"] for found in (told["base"], told["ocd ensemble"], alone["ocd ensemble"]))
    assert one < 0.9 * other < 0.9 * base


def test_neighbours_that_tell_nothing_do_not_help(ocd, make_run):
    changed = {"task": own_task("mytask:Local", cells=0)}
    found = ocd.json(make_run(LOCAL | changed, "planted", "train-scale"), "evaluate")
    assert found["outcome"] in ("does not help", "harms", "undecided")
    assert found["outcome"] != "helps"


def test_predicting_needs_no_training_data(ocd, near, tmp_path):
    """What was found for the training is looked at by no prediction."""
    folder = near.copy(tmp_path / "copy")
    model, x = open_run(folder.config), torch.rand(4, 2)
    wanted = model.predict(x).output
    (folder.run / "branches").rename(tmp_path / "branches")
    assert torch.equal(open_run(folder.config).predict(x).output, wanted)


def test_what_was_found_is_found_again_where_it_is_damaged(ocd, near, tmp_path):
    folder = near.copy(tmp_path / "copy").without("train-scale", "infer")
    (path,) = folder.run.glob("branches/neighbours-*/found.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ocd(folder, "train-scale")
    assert path.read_bytes() == whole
    assert folder.manifest("train-scale")["content"] == near.manifest("train-scale")["content"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"neighbours": 1000},
            "error: train-diffusion.neighbours = 1000, but of 570 training samples with usable deltas some have fewer others\n"
            "  take fewer with --set train-diffusion.neighbours=N, or collect more samples\n",
        ),
        (
            {"neighbours_in": "coordinates"},
            "error: train-diffusion.neighbours_in = 'coordinates', but the task has no coordinates()\n"
            "  leave train-diffusion.neighbours_in out, and it is chosen\n",
        ),
    ],
)
def test_what_cannot_be(ocd, near, tmp_path, changed, said):
    folder = near.copy(tmp_path / "copy")
    for stage in ("train-scale", "train-diffusion"):
        found = ocd(folder, stage, "--force", *put_all("train-diffusion", changed), code=2).stderr
        assert found.endswith(said)
        assert folder.manifest(stage)["content"] == near.manifest(stage)["content"]


def test_other_places_are_looked_up_anew(ocd, near, tmp_path):
    """coordinates() that change no delta change the neighbours."""
    folder = near.copy(tmp_path / "copy")
    code = folder.root / "mytask.py"
    code.write_text(code.read_text() + "\n\nLocal.coordinates = lambda self, x: x[:, :1]\n")
    for stage in ("train-base", "select-layer", "collect", "train-scale", "train-diffusion"):
        ocd(folder, stage, "--force")
    assert folder.manifest("collect")["content"] == near.manifest("collect")["content"]
    assert Bank.read(folder.run / "train-diffusion/bank.safetensors").tensors["place"].shape[1] == 1
    assert folder.read("train-diffusion/denoiser.json")["neighbours"]["where"] == "coordinates"


def test_status_tells_train_scale_of_changed_neighbours(ocd, near, tmp_path):
    folder = near.copy(tmp_path / "copy")
    more = ("--set", "train-diffusion.neighbours=3")
    states = ocd.json(folder, "status", *more)["stages"]
    assert [states[name]["state"] for name in ("collect", "train-scale", "train-diffusion")] == ["done", "stale", "stale"]
    assert "train-diffusion.neighbours was 5, is now 3" in ocd(folder, "train-scale", *more, code=3).stderr
    # What `auto` has come to may be named.
    named = ocd.json(folder, "status", "--set", "train-diffusion.neighbours_in=x")["stages"]
    assert {stage["state"] for stage in named.values()} <= {"done", "missing"}


def test_a_scene_of_integers_is_near_in_what_the_layer_sees(near):
    """By hand: the places of samples whose x has no distance."""
    context = context_of(near)
    fields = {"layer_input": torch.zeros(3, 2)}
    assert best_place(context.task, torch.zeros(3, 2), fields) == "x"
    assert best_place(context.task, torch.zeros(3, 2, dtype=torch.long), fields) == "layer_input"
    assert np.isfinite(neighbour_search(context).found.found.distance.numpy()).all()
