"""collect through the command line: methods to overfit, to store and to leave out, and what later stages make of it."""

import json
import re
import shutil

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from folders import arrays, blocks_of, reader_of, states, store
from safetensors.torch import load_file
from torch import nn

from stages.collect import Collect
from stages.foundation.errors import DataError
from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project
from stages.tasks.user_code import load_object

NAMES = {"rho", "degenerate", "base_loss", "overfit_loss", "steps", "sample_index", "layer_input", "activation", "base_output"}
LATER = ("train-diffusion", "train-scale", "infer")


def cross_entropy(output, y):
    return F.cross_entropy(output.float(), y, reduction="none")


def summary_of(ocd, folder, *words, code=0):
    return json.loads(ocd(folder, "collect", "--json", *words, code=code).stdout)


def base_of(folder):
    return load_file(folder.run / "train-base" / "base.safetensors")


def reference_of(folder, model, layer, found, **recipe):
    """The loop over copies of the model, for the samples that a store has, in its order."""
    x, y = (torch.from_numpy(part)[torch.from_numpy(found["sample_index"])] for part in arrays(40, 0))
    recipe = {"optimizer": "sgd", "lr": 0.05, "steps": 3, **recipe}
    return reference.overfit_loop(model, layer, cross_entropy, x, y, **recipe)


def assert_as_wanted(found, wanted, **close):
    for name in ("delta", "rho", "base_loss", "overfit_loss"):
        np.testing.assert_allclose(found[name], getattr(wanted, name).float().numpy(), err_msg=name, **close)
    np.testing.assert_array_equal(found["steps"], wanted.steps)
    np.testing.assert_array_equal(found["degenerate"], wanted.largest_gradient < 1e-6)


# Ways to overfit


RECIPES = {
    "adam": {"optimizer": "adam", "lr": 0.01, "steps": 3},
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "momentum": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9},
    "weight decay": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1, "momentum": 0.5},
    "until converged": {"optimizer": "sgd", "lr": 0.3, "until_converged": True, "tolerance": 0.5, "max_steps": 20},
    "until converged, adam": {"optimizer": "adam", "lr": 0.05, "until_converged": True, "tolerance": 0.7, "max_steps": 30},
}


@pytest.mark.parametrize("layer", ["0.weight", "2.weight"])
@pytest.mark.parametrize("name", RECIPES)
def test_deltas_are_those_of_the_plain_loop(project, ocd, name, layer):
    recipe = RECIPES[name]
    settings = {"steps": 3, **recipe, "block_samples": 10, "batch_size": 4}
    folder = project({"collect": settings, "select-layer": {"layer": layer}})
    ocd(folder, "run", "--until", "select-layer")
    summary = summary_of(ocd, folder)
    found = store(folder)
    assert set(found) == NAMES | {"delta"}
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model.load_state_dict(base_of(folder))
    assert_as_wanted(found, reference_of(folder, model, layer, found, **recipe), rtol=1e-3, atol=2e-6)
    assert summary["method"] == "outer product"
    assert summary["steps"] == pytest.approx(found["steps"].mean())
    assert summary["base_loss"] == pytest.approx(found["base_loss"].mean(), rel=1e-5)
    assert summary["rho"] == pytest.approx(found["rho"].mean(), rel=1e-5)
    if "until converged" in name:
        # Some stop early, some never, and each says when.
        assert len(set(found["steps"].tolist())) > 2
    else:
        assert set(found["steps"].tolist()) == {3}


@pytest.mark.parametrize("recipe", ["adam", "until converged"])
def test_another_batch_size_changes_rounding_alone(project, ocd, recipe):
    folder = project({"collect": {**RECIPES[recipe], "block_samples": 12}})
    ocd(folder, "run", "--until", "collect", "--set", "collect.batch_size=12")
    wanted = store(folder)
    for size in (1, 5, 100):
        ocd(folder, "collect", "--force", "--set", f"collect.batch_size={size}")
        for name, value in store(folder).items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-3, atol=2e-5, err_msg=f"{name} in batches of {size}")


@pytest.mark.parametrize("writers", [1, 4])
def test_the_number_of_writers_changes_nothing(ready, ocd, whole, writers):
    ocd(ready, "collect", "--set", f"collect.writers={writers}")
    whole(ready)


def test_the_store_has_what_it_promises(finished):
    found = store(finished)
    assert set(found) == NAMES | {"delta"}
    np.testing.assert_allclose(np.linalg.norm(found["delta"].reshape(36, -1), axis=1), found["rho"], rtol=1e-5)
    # 40 rows, a tenth of them held out.
    assert len(set(found["sample_index"].tolist())) == len(found["delta"]) == 36
    assert (found["overfit_loss"] < found["base_loss"]).mean() > 0.9


def test_more_samples_keep_the_blocks_that_are_there(ocd, project):
    folder = project({"collect": {"samples": 20, "block_samples": 8}})
    ocd(folder, "run", "--until", "collect")
    kept = folder.run / "collect" / "deltas.zarr" / "delta" / "c.0.0.0"
    inode = kept.stat().st_ino
    assert states(ocd, folder, "collect.samples=30")["collect"] == "partial"
    ocd(folder, "collect", "--set", "collect.samples=30")
    assert kept.stat().st_ino == inode
    grown = folder.files()
    ocd(folder, "collect", "--set", "collect.samples=30", "--force")
    fresh = folder.files()
    chunks = [name for name in fresh if "/c." in name]
    assert chunks
    assert {name: grown[name] for name in chunks} == {name: fresh[name] for name in chunks}


# Factored


FACTORED = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "store": "factored", "block_samples": 8}


def test_a_factored_store_holds_the_same_deltas(project, ocd, tmp_path):
    folder = project({"collect": FACTORED})
    ocd(folder, "run", "--until", "collect")
    factored = store(folder)
    kept = {path.name for path in (folder.run / "collect" / "deltas.zarr").iterdir() if path.is_dir()}
    assert kept == NAMES | {"delta_output", "delta_input"}
    assert factored["delta_output"].shape == (36, 3)
    assert factored["delta_input"].shape == (36, 6)
    ocd(folder, "run", "--until", "collect", "--run", tmp_path / "run", "--set", "collect.store=dense")
    shutil.rmtree(folder.run)
    shutil.move(tmp_path / "run", folder.run)
    dense = store(folder)
    for name, value in dense.items():
        np.testing.assert_allclose(factored[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_later_stages_take_a_factored_store(project, ocd):
    folder = project({"collect": FACTORED})
    found = json.loads(ocd(folder, "run", "--json").stdout)["stages"]
    assert found["train-diffusion"]["samples"] > 30
    assert found["infer"]["metrics"]["base"]["accuracy"] is not None
    ocd(folder, "infer", "--save-deltas")
    ocd(folder, "verify")
    # Samples that come later are factored, too; the description of the whole is the store's.
    assert reader_of(folder).description.arrays["delta"].shape == [36, 3, 6]


# Samples that are left out


@pytest.fixture
def with_bad_rows(project, finished_run, ocd):
    """Makes a project whose store has samples of NaN at these positions, about to collect; gives it and their numbers.

    Nobody trains on NaN: the base is imported, and the layer is chosen by other samples.
    """

    def make(*positions):
        rows = store(finished_run)["sample_index"][list(positions)].tolist()
        settings = {
            "task": {"train": "data:Rows"},
            "select-layer": {"layer": "2.weight", "samples": 1},
            "collect": {"block_samples": 8, "batch_size": 4},
        }
        folder = project(settings, code="models")
        (folder.root / "nan.json").write_text(json.dumps(rows))
        ocd(folder, "train-base", "--weights", finished_run.run / "train-base" / "base.safetensors")
        ocd(folder, "select-layer")
        return folder, rows

    return make


def test_a_sample_that_is_not_finite_is_named(with_bad_rows, ocd):
    folder, (row,) = with_bad_rows(21)
    result = ocd(folder, "collect", "--quiet", code=1)
    assert result.stderr == (
        f"error: overfitting sample {row} gave numbers that are not finite\n"
        "  try a smaller collect.lr, remove that sample, or leave such samples out with --set collect.skip_bad=true\n"
    )
    assert not (folder.run / "collect").exists()
    # The blocks before it are there.
    assert {0, 1} <= {int(path.stem) for path in blocks_of(folder)}
    # It is another store that leaves samples out: what was begun is not mixed with it.
    result = ocd(folder, "collect", "--set", "collect.skip_bad=true", code=3)
    assert "collect.skip_bad was False, is now True" in result.stderr
    ocd(folder, "collect", "--set", "collect.skip_bad=true", "--force")


@pytest.mark.parametrize("positions", [(21,), (0,), (1, 2, 35)], ids=["in the middle", "the first", "several"])
def test_bad_samples_are_left_out(with_bad_rows, ocd, positions):
    folder, rows = with_bad_rows(*positions)
    words = ("--set", "collect.skip_bad=true")
    summary = summary_of(ocd, folder, *words)
    assert summary["skipped"] == sorted(rows)
    assert summary["degenerate"] == 0
    assert summary["samples"] == 36
    found = store(folder)
    bad = np.isin(found["sample_index"], rows)
    assert np.flatnonzero(bad).tolist() == list(positions)
    for name, value in found.items():
        if name == "degenerate":
            np.testing.assert_array_equal(value, bad)
        elif name != "sample_index":
            assert not value[bad].any()
            assert np.isfinite(value).all()
    assert summary["base_loss"] == pytest.approx(found["base_loss"][~bad].mean(), rel=1e-5)
    assert f"{len(rows)} left out (not finite)" in ocd(folder, "collect", *words).stdout
    for stage in LATER:
        result = json.loads(ocd(folder, stage, "--json", *words).stdout)
        if stage != "infer":
            # Some are held out for the evaluation; those left out are in neither part.
            assert result["samples"] == 36 - len(rows) - round((36 - len(rows)) * 0.05)
            assert np.isfinite(result["held_out_loss"])


def test_a_bad_sample_in_a_factored_store(with_bad_rows, ocd):
    folder, rows = with_bad_rows(21)
    words = [f"--set=collect.{word}" for word in ("skip_bad=true", "store=factored", "optimizer=sgd")]
    assert summary_of(ocd, folder, *words)["skipped"] == rows
    found = store(folder)
    assert not found["delta"][21].any()
    assert np.isfinite(found["delta"]).all()


# Half precision


class HalfButForALayer(nn.Sequential):
    """The base in half precision, its last layer in single: what the deltas are of."""

    def forward(self, x):
        half = self[0].weight.dtype
        return self[2](self[1](self[0](x.to(half))).float()).to(half)


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_a_base_of_half_precision(project, ocd, dtype):
    folder = project({"select-layer": {"layer": "2.weight"}, "task": {"model": f"mymodel:{dtype}"}}, code="models")
    torch.manual_seed(0)
    model = HalfButForALayer(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    getattr(model, dtype)()
    torch.save(model.state_dict(), folder.root / "given.pt")
    ocd(folder, "train-base", "--weights", folder.root / "given.pt")
    assert {str(value.dtype) for value in base_of(folder).values()} == {str(model[0].weight.dtype)}
    found = json.loads(ocd(folder, "run", "--json", "--set", "collect.optimizer=sgd").stdout)["stages"]
    assert found["infer"]["metrics"]["ocd ensemble"]["accuracy"] is not None
    deltas = store(folder)
    assert all(value.dtype == np.float32 for name, value in deltas.items() if value.dtype.kind == "f")
    model[2].float()
    wanted = reference_of(folder, model, "2.weight", deltas, steps=2, lr=0.01)
    # Outputs are of half precision, and their gradients with them; the deltas themselves are far finer than that.
    np.testing.assert_allclose(deltas["delta"], wanted.delta.numpy(), rtol=0.02, atol=1e-5)
    assert len(np.unique(deltas["delta"])) > 300
    assert deltas["degenerate"].sum() == 0
    ocd(folder, "infer", "--set", "collect.optimizer=sgd", "--save-deltas")
    ocd(folder, "verify")


def test_a_layer_whose_base_is_half_but_itself_single_is_left_alone(project, ocd):
    folder = project({"task": {"model": "mymodel:HalfBody"}, "select-layer": {"layer": "head.weight"}}, code="models")
    torch.manual_seed(0)
    torch.save({"body.weight": torch.randn(6, 4).half(), "body.bias": torch.zeros(6).half(), "head.weight": torch.randn(3, 6),
                "head.bias": torch.zeros(3)}, folder.root / "given.pt")  # fmt: skip
    ocd(folder, "train-base", "--weights", folder.root / "given.pt")
    ocd(folder, "run", "--until", "train-scale")
    assert store(folder)["rho"].min() > 0


# Slow methods


@pytest.mark.parametrize(
    ("model", "name"), [("Attending", "attention.in_proj_weight"), ("Recurrent", "rnn.weight_hh_l0")], ids=["attention", "rnn"]
)
def test_a_slow_way_is_told(project, ocd, model, name):
    folder = project({"task": {"model": f"mymodel:{model}"}, "collect": {"samples": 12}}, code="models")
    ocd(folder, "run", "--until", "train-base")
    ocd(folder, "select-layer", "--layer", name)
    result = ocd(folder, "collect", "--json")
    summary = json.loads(result.stdout)
    assert summary["method"] in ("vmap", "loop")
    assert summary["method_reason"]
    method = {"vmap": "vmap, not by substitution", "loop": "the plain loop, one sample at a time"}[summary["method"]]
    (line,) = [line for line in result.stderr.splitlines() if "is overfitted by" in line]
    assert line.startswith(f"collect: {name} is overfitted by {method}: {summary['method_reason']}; about ")
    assert re.search(r"; about [\d.]+ ms a sample, \d+:\d\d:\d\d for 12$", line)
    assert f"by {summary['method']}" in ocd(folder, "collect").stdout
    # It is the truth, too.
    base = load_object(folder.root, f"mymodel:{model}", "task.model")()
    base.load_state_dict(base_of(folder))
    found = store(folder)
    assert_as_wanted(found, reference_of(folder, base, name, found, optimizer="adam", lr=0.01, steps=2), rtol=1e-2, atol=1e-5)
    for stage in LATER:
        ocd(folder, stage)


def test_a_fast_way_is_not_worth_a_word(ready, ocd):
    result = ocd(ready, "collect", "--json")
    assert "is overfitted by" not in result.stderr
    found = json.loads(result.stdout)
    assert found["method"] == "outer product"
    assert found["method_reason"] == ""
    assert found["prefix_reused"] is True


def test_a_label_that_cannot_be_is_found_beforehand_wherever_it_stands(ready):
    """Not only among the samples that are tried first."""
    stage = Collect(RunContext(load_project(ready.config)))
    stage.context.splits["all"].dataset.y[int(stage.rows.rows[-1])] = 7
    with pytest.raises(DataError, match=rf"y\[{int(stage.rows.rows[-1])}\]: label 7 is out of range"):
        stage.check()
