"""Weights of one's own for each sample: every method against copies of the model, and the model left as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import Residual
from overfitters import EXACT, Custom, Tied, by_copies, convolutions, forward, frozen, random, twice
from torch import nn

from stages.foundation.errors import SettingsError
from stages.per_sample.layer import candidates, find_layer
from stages.per_sample.weights import Loop, NotSubstitutable, Substitution, Vmap

METHODS = (Loop, Vmap, Substitution)


def outputs_and_gradient(method, x, weights):
    """What a method gives, and the gradient in the weights of a sum that no two outputs enter alike."""
    leaf = weights.clone().requires_grad_()
    output = method(x, leaf)
    share = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (gradient,) = torch.autograd.grad((share * output.sin()).sum(), leaf)
    return output.detach(), gradient


def assert_equal_ways(model, name, x, weights):
    layer = find_layer(model, name)
    wanted = outputs_and_gradient(by_copies(model, name), x, weights)
    for method in METHODS:
        found = outputs_and_gradient(method(model, layer, forward), x, weights)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, **EXACT)


@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 3),
    middle=st.lists(st.integers(1, 3), max_size=2),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 4),
    bias=st.booleans(),
)
def test_linear(groups, size, middle, inputs, outputs, bias):
    """On (B, in), (B, rows, in) and (B, rows, columns, in); G weights for G·S samples."""
    model = frozen(nn.Sequential(nn.Linear(inputs, outputs, bias), nn.Tanh(), nn.Linear(outputs, 2)))
    x = random(groups * size, *middle, inputs)
    assert_equal_ways(model, "0.weight", x, random(groups, outputs, inputs, seed=1))


@given(groups=st.integers(1, 4), size=st.integers(1, 3), rows=st.integers(1, 4))
def test_linear_on_the_rows_of_all_samples(groups, size, rows):
    """(B·rows, in) in the order of the samples, as `flatten(0, 1)` gives it."""

    def run(self, x):
        return self.fc(x.flatten(0, 1)).tanh().view(len(x), -1)

    model = frozen(Custom(run, fc=nn.Linear(3, 2)))
    assert_equal_ways(model, "fc.weight", random(groups * size, rows, 3), random(groups, 2, 3, seed=1))


def test_weight_g_serves_its_own_samples():
    model = frozen(nn.Linear(2, 2, bias=False))
    x, weights = random(6, 2), torch.stack([torch.eye(2), 10 * torch.eye(2), 100 * torch.eye(2)]).double()
    factors = torch.tensor([1.0, 1, 10, 10, 100, 100], dtype=torch.float64).view(-1, 1)
    for method in METHODS:
        found = method(model, find_layer(model, "weight"), forward)(x, weights)
        torch.testing.assert_close(found, factors * x, **EXACT)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolution=convolutions(by_name=True), groups=st.integers(1, 3), size=st.integers(1, 3))
def test_convolutions(convolution, groups, size):
    """Every kind of padding, among them by name with each mode."""
    _, layer, picture = convolution
    weights = random(groups, *layer.weight.shape, seed=1)
    model = frozen(nn.Sequential(layer, nn.Tanh()))
    assert_equal_ways(model, "0.weight", random(groups * size, layer.in_channels, *picture), weights)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d_with_padding_by_name(padding, mode):
    """A kernel of even width, where "same" has an odd number of places to share out."""
    model = frozen(nn.Conv2d(2, 3, (3, 4), padding=padding, dilation=(2, 1), padding_mode=mode))
    assert_equal_ways(model, "weight", random(4, 2, 6, 6), random(2, 3, 2, 3, 4, seed=1))


def test_layers_of_a_whole_model():
    torch.manual_seed(0)
    model, x = frozen(Residual()), random(6, 1, 6, 6)
    for name in ("stem.0.weight", "blocks.1.conv1.weight", "head.weight"):
        weight = model.get_parameter(name)
        assert_equal_ways(model, name, x, weight + 0.1 * random(3, *weight.shape, seed=1))


def test_weights_that_do_not_divide_the_samples():
    model = frozen(nn.Linear(2, 2))
    for method in METHODS:
        with pytest.raises(ValueError, match="3 weights cannot share 4 samples equally"):
            method(model, find_layer(model, "weight"), forward)(random(4, 2), random(3, 2, 2))


def test_forward_is_restored_after_use():
    model, x = frozen(nn.Sequential(nn.Linear(3, 2))), random(4, 3)
    before = model(x)
    run = Substitution(model, find_layer(model, "0.weight"), forward)
    run(x, random(4, 2, 3, seed=1))
    assert "forward" not in vars(model[0])
    assert torch.equal(model(x), before)


def test_forward_is_restored_after_an_exception():
    def fail(self, x):
        raise RuntimeError(f"after the layer: {self.fc(x).shape}")

    models = {"after": Custom(fail, fc=nn.Linear(3, 3)), "twice": Custom(twice, fc=nn.Linear(3, 3))}
    for name, wanted in (("after", RuntimeError), ("twice", NotSubstitutable)):
        model, x = frozen(models[name]), random(4, 3)
        with pytest.raises(wanted):
            Substitution(model, find_layer(model, "fc.weight"), forward)(x, random(4, 3, 3))
        assert "forward" not in vars(model.fc)
        assert torch.equal(model.fc(x), F.linear(x, model.fc.weight, model.fc.bias))


def test_the_base_is_not_changed():
    model, x = frozen(Tied()), random(4, 3)
    before = copy.deepcopy(model.state_dict())
    layer = find_layer(model, "enter.weight")
    for method in (Loop, Vmap):
        outputs_and_gradient(method(model, layer, forward), x, random(4, 3, 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.enter.weight is model.leave.weight
    assert not any(p.requires_grad for p in model.parameters())


def test_candidates_are_matrices_and_tied_ones_stand_once():
    names = [layer.name for layer in candidates(nn.Sequential(Tied(), nn.Conv2d(1, 2, 3), nn.BatchNorm1d(3)))]
    assert names == ["0.enter.weight", "1.weight"]


def test_layer_that_is_a_vector_and_layer_that_is_not_there():
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(SettingsError, match=r"layer '0.bias' is a vector of 2"):
        find_layer(model, "0.bias")
    with pytest.raises(SettingsError, match=r"layer '0.wieght' does not exist \(did you mean 0.weight\?\)"):
        find_layer(model, "0.wieght")


def test_the_second_name_of_a_tied_weight():
    """A user who reads the state dict sees both names; the second is a matrix as well, and must not be called a vector."""
    try:
        layer = find_layer(Tied(), "leave.weight")
    except SettingsError as error:
        assert "vector" not in error.message
        assert "enter.weight" in error.message.splitlines()[0]
    else:
        assert layer.shape == (3, 3)
