"""collect through the command line: methods to overfit, to store and to leave out, and what later stages make of it."""

import shutil

import numpy as np
import pytest
from collecting import NAMES, assert_as_wanted, base_of, reference_of
from folders import reader_of, store
from torch import nn

from stages.collect import Collect
from stages.foundation.errors import DataError
from stages.lifecycle.context import RunContext
from stages.run_directory.project import load_project

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
    folder = project({"collect": settings, "select-layer": {"layer": layer}}, until="select-layer")
    summary = ocd.json(folder, "collect")
    found = store(folder)
    one_product = recipe["optimizer"] == "sgd" and "weight_decay" not in recipe
    assert set(found) == NAMES | {"delta"} | ({"delta_output", "delta_input"} if one_product else set())
    # 40 rows, a tenth of them held out.
    assert len(set(found["sample_index"].tolist())) == len(found["delta"]) == 36
    assert (found["overfit_loss"] < found["base_loss"]).mean() > 0.9
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


FACTORED = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "store": "factored", "block_samples": 8}


def test_a_factored_store_holds_the_same_deltas(project, ocd, tmp_path):
    folder = project({"collect": FACTORED}, until="collect")
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
    found = ocd.json(folder, "run")["stages"]
    assert found["train-diffusion"]["samples"] > 30
    assert found["infer"]["metrics"]["base"]["accuracy"] is not None
    ocd(folder, "infer", "--save-deltas")
    ocd(folder, "verify")
    # Samples that come later are factored, too; the description of the whole is the store's.
    assert reader_of(folder).description.arrays["delta"].shape == [36, 3, 6]


def test_a_label_that_cannot_be_is_found_beforehand_wherever_it_stands(ready):
    """Not only among the samples that are tried first."""
    stage = Collect(RunContext(load_project(ready.config)))
    stage.context.splits["all"].dataset.y[int(stage.rows.rows[-1])] = 7
    with pytest.raises(DataError, match=rf"y\[{int(stage.rows.rows[-1])}\]: label 7 is out of range"):
        stage.check()
