"""Outputs along a line of weights, θ + s · delta: every method against the loop over whole forward passes."""

import pytest
import reference
import torch
from along import along_the_loop, deltas_of, equal_along
from hypothesis import given, settings
from hypothesis import strategies as st
from overfitters import EXACT, Custom, Tied, by_copies, convolutions, forward, frozen, random, twice
from torch import nn

from stages.per_sample.layer import find_layer
from stages.per_sample.runner import Runner
from stages.per_sample.weights import Loop, Substitution, Vmap

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


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
@PROPERTY
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
@PROPERTY
def test_convolutions(convolution, first, batch):
    torch.manual_seed(0)
    kind, layer, size = convolution
    inputs, outputs = layer.in_channels, layer.out_channels
    parts = [layer, nn.Tanh(), kind(outputs, 2, 1)] if first else [kind(inputs, inputs, 1), nn.Tanh(), layer]
    model, name = frozen(nn.Sequential(*parts)), f"{parts.index(layer)}.weight"
    overfitter = equal_along(model, name, random(batch, inputs, *size))
    assert isinstance(overfitter.method, Substitution), overfitter.reason
    assert (overfitter.prefix is None) == first


def residual(self, x):
    """What was recorded before the layer is changed in place after it."""
    hidden = self.enter(x)
    out = self.fc(hidden.tanh())
    hidden += out
    return self.leave(hidden)


def in_place_twice(self, x):
    out = self.fc(self.enter(x).tanh())
    out *= 2
    out += 1
    return self.leave(out.relu_())


def gated(self, x):
    """Values decide where the computation goes on, but the same way for all samples."""
    hidden = self.enter(x)
    hidden[hidden < 0] = 0
    return self.leave(self.fc(hidden).sigmoid() * hidden)


def around(run):
    return lambda: Custom(run, enter=nn.Linear(3, 4), fc=nn.Linear(4, 4), leave=nn.Linear(4, 2))


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
    "a relu in place before it": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        "2.weight",
        (3,),
    ),
    "what comes before it changed in place": (around(residual), "fc.weight", (3,)),
    "its output changed in place": (around(in_place_twice), "fc.weight", (2, 3)),
    "its input used beside it": (around(gated), "fc.weight", (3,)),
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


def asked(self, x):
    """A branch on a value: nothing but the loop runs it."""
    return self.fc(x) if float(self.enter(x).detach().sum()) > 1e9 else self.fc(torch.tanh(self.fc(x)))


OTHER_METHODS = {
    "used twice": (lambda: Custom(twice, fc=nn.Linear(3, 3)), "fc.weight", (3,), "vmap"),
    "used twice after something": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), Custom(twice, fc=nn.Linear(3, 3))),
        "2.fc.weight",
        (3,),
        "vmap",
    ),
    "tied": (Tied, "enter.weight", (3,), "vmap"),
    "of three axes": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(inplace=True), nn.Flatten()),
        "0.weight",
        (1, 3, 3, 3),
        "vmap",
    ),
    "behind a branch": (lambda: Custom(asked, enter=nn.Linear(3, 3), fc=nn.Linear(3, 3)), "fc.weight", (3,), "loop"),
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_layers_that_cannot_be_substituted(name):
    make, layer, shape, method = OTHER_METHODS[name]
    torch.manual_seed(1)
    overfitter = equal_along(frozen(make()), layer, random(5, *shape))
    assert overfitter.method.name == method, overfitter.reason


@pytest.mark.parametrize("name", ["used twice after something", "behind a branch"])
def test_one_sample_by_another_way(name):
    make, layer, shape, _ = OTHER_METHODS[name]
    torch.manual_seed(1)
    equal_along(frozen(make()), layer, random(1, *shape))


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
@pytest.mark.parametrize("name", ["linear, then a relu in place", "convolution in groups", "tied"])
def test_members_of_every_method(name, method):
    """Several lines for each sample; without a method named, by the runner's own choice."""
    make, parameter, shape, *_ = (MODELS | OTHER_METHODS)[name]
    torch.manual_seed(0)
    model, x = frozen(make()), random(5, *shape)
    layer = find_layer(model, parameter)
    runner = Runner(model, layer, forward, x[:2])
    if method is not None:
        runner.method = method(model, layer, forward)
    deltas = random(5, 3, *layer.matrix_shape, seed=1)
    found = runner.members_along(runner.first_pass(x), x, deltas)(1.0)
    torch.testing.assert_close(found.transpose(0, 1), reference.predict_loop(model, parameter, x, deltas), **EXACT)
