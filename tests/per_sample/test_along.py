"""Outputs along a line of weights, θ + s · delta: every method against the loop over whole forward passes."""

import prefixed
import pytest
import reference
import torch
from along import along_the_loop, deltas_of, equal_along
from hypothesis import given
from hypothesis import strategies as st
from models import OTHERS
from overfitters import EXACT, Custom, Tied, by_copies, convolutions, forward, frozen, random
from torch import nn

from stages.foundation.trees import take
from stages.per_sample.layer import find_layer
from stages.per_sample.runner import Runner
from stages.per_sample.weights import Loop, Substitution, Vmap


def test_the_loop_is_that_over_copies_of_the_model():
    torch.manual_seed(0)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), random(5, 3)
    deltas = deltas_of(model, "2.weight", 5)
    wanted = by_copies(model, "2.weight")(x, model[2].weight + 3 * deltas)
    torch.testing.assert_close(along_the_loop(model, "2.weight", x, deltas, 3), wanted, **EXACT)


@given(
    rows=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bias=st.booleans(),
    first=st.booleans(),
    batch=st.integers(1, 5),
)
def test_linear(rows, sizes, bias, first, batch):
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=bias)
    parts = [layer, nn.Tanh(), nn.Linear(sizes[1], 2)] if first else [nn.Linear(sizes[0], sizes[0]), nn.Tanh(), layer]
    model, name = frozen(nn.Sequential(*parts)), f"{parts.index(layer)}.weight"
    overfitter = equal_along(model, name, random(batch, *rows, sizes[0]))
    assert isinstance(overfitter.method, Substitution)
    assert (overfitter.prefix is None) == first


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolution=convolutions(by_name=True), first=st.booleans(), batch=st.integers(1, 4))
def test_convolutions(convolution, first, batch):
    torch.manual_seed(0)
    kind, layer, size = convolution
    inputs, outputs = layer.in_channels, layer.out_channels
    parts = [layer, nn.Tanh(), kind(outputs, 2, 1)] if first else [kind(inputs, inputs, 1), nn.Tanh(), layer]
    model, name = frozen(nn.Sequential(*parts)), f"{parts.index(layer)}.weight"
    overfitter = equal_along(model, name, random(batch, inputs, *size))
    assert isinstance(overfitter.method, Substitution), overfitter.reason
    assert (overfitter.prefix is None) == first


def in_place_twice(self, x):
    out = self.fc(self.enter(x).tanh())
    out *= 2
    out += 1
    return self.leave(out.relu_())


# name: the model, the layer, a sample's shape
MODELS = {
    "linear, then a relu in place": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        "2.weight",
        (2, 3),
    ),
    "linear without bias, then a relu in place": (
        lambda: nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(inplace=True), nn.Linear(5, 2)),
        "0.weight",
        (2, 3),
    ),
    "convolution, then a relu in place": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Flatten()
        ),
        "2.weight",
        (1, 5, 5),
    ),
    "its output changed in place": (
        lambda: Custom(in_place_twice, enter=nn.Linear(3, 4), fc=nn.Linear(4, 5), leave=nn.Linear(5, 2)),
        "fc.weight",
        (2, 3),
    ),
    "convolution in groups": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1)),
        "2.weight",
        (2, 6, 6),
    ),
    "batch norm after it": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(18, 2)),
        "0.weight",
        (1, 5, 5),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, layer, shape = MODELS[name]
    torch.manual_seed(1)
    overfitter = equal_along(frozen(make()), layer, random(5, *shape))
    assert isinstance(overfitter.method, Substitution), overfitter.reason


@pytest.mark.parametrize("name", prefixed.MODELS)
def test_models_with_something_before_the_layer(name):
    """Which may be changed in place after it, or used beside what the layer sees."""
    model, x, _ = prefixed.make(name)
    overfitter = equal_along(model, "fc.weight", x)
    assert overfitter.method.name == ("vmap" if "twice" in name else "substitution"), overfitter.reason


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_forms(name, count):
    """By the method that was to be expected; one that gives closed forms for overfitting substitutes here."""
    make, layer, x, method = OTHERS[name]
    torch.manual_seed(1)
    overfitter = equal_along(frozen(make()), layer, take(x, slice(0, count)))
    assert overfitter.method.name == method.replace("outer product", "substitution"), overfitter.reason


HOOKS = {
    "on it": lambda layer: layer.register_forward_hook(lambda module, args, output: output.clamp(-0.5, 0.5)),
    "before it": lambda layer: layer.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_of_the_users(name):
    """It acts on the whole, not on a part of the sum: the hook on the layer is not linear."""
    torch.manual_seed(2)
    model = frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh()))
    HOOKS[name](model[2])
    overfitter = equal_along(model, "2.weight", random(5, 3))
    assert isinstance(overfitter.method, Substitution), overfitter.reason


@pytest.mark.parametrize("method", [None, Vmap, Loop])
@pytest.mark.parametrize(
    ("make", "parameter", "shape"),
    [MODELS["linear, then a relu in place"], MODELS["convolution in groups"], (Tied, "enter.weight", (3,))],
    ids=["linear", "convolution", "tied"],
)
def test_members_of_every_method(make, parameter, shape, method):
    """Several lines for each sample; without a method named, by the runner's own choice."""
    torch.manual_seed(0)
    model, x = frozen(make()), random(5, *shape)
    layer = find_layer(model, parameter)
    runner = Runner(model, layer, forward, x[:2])
    if method is not None:
        runner.method = method(model, layer, forward)
    deltas = random(5, 3, *layer.matrix_shape, seed=1)
    found = runner.members_along(runner.first_pass(x), x, deltas)(1.0)
    torch.testing.assert_close(found.transpose(0, 1), reference.predict_loop(model, parameter, x, deltas), **EXACT)
