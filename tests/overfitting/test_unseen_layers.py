"""Layers whose module is never called with the samples: nothing to condition on, but weights of their own."""

import copy

import pytest
import torch
from models import VECTORS, Attending, dense, one_by_one
from overfitters import RECIPES, equal_to_the_loop, frozen, random, way_equal_to_the_loop
from torch import nn
from torch.nn.utils import parametrizations

from stages.foundation.errors import TaskError

UNSEEN = {
    "called sample by sample": (dense(one_by_one), "fc.weight", VECTORS, "vmap"),
    "parametrised": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), parametrizations.weight_norm(nn.Linear(4, 2))),
        "2.parametrizations.weight.original1",
        random(5, 3),
        "vmap",
    ),
    "output projection": (Attending, "attention.out_proj.weight", random(5, 1, 4, 4), "vmap"),
    "old weight norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.utils.weight_norm(nn.Linear(4, 2))),
        "2.weight_v",
        random(5, 3),
        "vmap",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", UNSEEN)
def test_layers_that_see_no_input(name, recipe):
    make, layer, x, method = UNSEEN[name]
    torch.manual_seed(4)
    model = frozen(make())
    model(x)  # the old weight norm has a weight without gradients from here on, and can be copied
    assert way_equal_to_the_loop(model, layer, x, RECIPES[recipe]) == method


@pytest.mark.parametrize("name", ["output projection", "parametrised", "called sample by sample"])
def test_a_layer_that_sees_no_input_is_refused_by_the_overfitter(name):
    make, layer, x, _ = UNSEEN[name]
    with pytest.raises(TaskError, match=f"of {layer} (is not called|has shape)"):
        equal_to_the_loop(frozen(make()), layer, x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_old_weight_norm_is_left_with_a_weight_of_its_own():
    """It keeps the weight that it computes on the module; one of vmap's must not stay there."""
    torch.manual_seed(4)
    model, x = frozen(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 2)))), random(5, 4)
    before = model(x)
    way_equal_to_the_loop(model, "0.weight_v", x)
    assert torch.equal(copy.deepcopy(model)(x), before)
    assert torch.equal(model(x), before)
