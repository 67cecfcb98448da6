"""The overfitter against the loop over copies of the model: drawn layers, closed forms, what it does not take for granted."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from overfitters import (
    EXACT,
    RECIPES,
    Custom,
    assert_near,
    assert_same,
    convolutions,
    copied,
    cross_entropy,
    equal_to_the_loop,
    frozen,
    overfitted,
    overfitter_of,
    random,
    squares,
    wanted_of,
)
from torch import nn

from stages.overfitting.recipe import Recipe


@st.composite
def recipes(draw):
    """Either optimizer, some steps or until converged."""
    optimizer = draw(st.sampled_from(["adam", "sgd"]))
    sgd = optimizer == "sgd"
    return Recipe(
        optimizer,
        lr=draw(st.sampled_from([1e-3, 0.01, 0.05])),
        steps=draw(st.integers(1, 5)),
        momentum=draw(st.sampled_from([0.0, 0.5, 0.9])) if sgd else 0.0,
        weight_decay=draw(st.sampled_from([0.0, 0.01, 0.3])) if sgd else 0.0,
        until_converged=draw(st.booleans()),
        tolerance=draw(st.sampled_from([0.1, 0.5, 0.9])),
        max_steps=draw(st.integers(1, 8)),
    )


def surrounded(layer, before, after, place):
    """A layer first, in the middle or last in a model; and its name there."""
    parts = {
        "first": [layer, nn.Tanh(), after],
        "middle": [before, nn.Tanh(), layer, nn.Tanh(), after],
        "last": [before, layer],
    }
    model = frozen(nn.Sequential(*parts[place]))
    return model, f"{parts[place].index(layer)}.weight"


PLACES = st.sampled_from(["first", "middle", "last"])


@given(
    place=PLACES,
    rows=st.lists(st.integers(1, 4), max_size=2),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    bias=st.booleans(),
    flat=st.booleans(),
    batch=st.integers(1, 6),
    recipe=recipes(),
)
def test_linear(place, rows, sizes, bias, flat, batch, recipe):
    """On (B, in), (B, rows, in), (B, rows, columns, in) and (B·rows, in)."""
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=bias)
    model, name = surrounded(layer, nn.Linear(sizes[0], sizes[0]), nn.Linear(sizes[1], 2), place)
    if flat:
        model = Custom(lambda self, x: self.net(x.flatten(0, -2)).view(*x.shape[:-1], -1), net=model)
        name = f"net.{name}"
    overfitter = equal_to_the_loop(model, name, random(batch, *rows, sizes[0]), recipe)
    one = torch.Size(rows).numel() == 1
    assert overfitter.name == ("outer product" if one else "substitution"), overfitter.why_dense
    assert (overfitter.prefix is not None) == (place != "first")


@given(convolution=convolutions(), place=PLACES, batch=st.integers(1, 6), recipe=recipes())
def test_convolutions(convolution, place, batch, recipe):
    torch.manual_seed(0)
    kind, layer, size = convolution
    inputs, outputs = layer.in_channels, layer.out_channels
    model, name = surrounded(layer, kind(inputs, inputs, 1), kind(outputs, 2, 1), place)
    overfitter = equal_to_the_loop(model, name, random(batch, inputs, *size), recipe)
    assert (overfitter.name, overfitter.prefix is not None) == ("substitution", place != "first"), overfitter.reason


# name: the layers, the layer, the shape of a sample
SINGLE = {
    "dense": (lambda: [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)], "2.weight", (6,)),
    "first": (lambda: [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)], "0.weight", (6,)),
    "tokens": (lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(), nn.Linear(6, 3)], "2.weight", (3, 4)),
    "convolution": (lambda: [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)], "0.weight", (1, 4, 4)),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SINGLE)
def test_single_precision_equals_the_loop_to_a_thousandth(name, recipe):
    make, layer, shape = SINGLE[name]
    torch.manual_seed(1)
    model, x, y = nn.Sequential(*make()).requires_grad_(False), random(8, *shape, dtype=torch.float32), torch.arange(8) % 3
    wanted = wanted_of(model, layer, x, y, RECIPES[recipe], cross_entropy)
    assert_near(overfitted(overfitter_of(model, layer, x, RECIPES[recipe], cross_entropy), x, y), wanted)


@pytest.mark.parametrize("recipe", ["sgd", "adam", "until converged"])
def test_closed_forms_where_inputs_are_zero_small_or_negative(recipe):
    """Adam divides by |i|: where i = 0 the weight stays, and where it is small ε counts."""
    torch.manual_seed(2)
    model, x = frozen(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))), random(5, 6)
    x[0], x[1, :3], x[2] = 0, 0, x[2] * 1e-8
    x[3, 0], x[4] = -1e-300, x[4] * 1e5
    overfitter = equal_to_the_loop(model, "0.weight", x, RECIPES[recipe])
    assert overfitter.name == "outer product"


@pytest.mark.parametrize("recipe", ["sgd", "adam"])
def test_closed_forms_where_no_gradient_reaches_a_sample(recipe):
    """A dead unit behind the layer: gradients of exactly zero, no step, and a sample marked degenerate."""

    def run(self, x):
        return self.head((self.fc(x).tanh() * (x[:, :1] > 0)).relu())

    torch.manual_seed(3)
    model, x = frozen(Custom(run, fc=nn.Linear(3, 4), head=nn.Linear(4, 2))), random(6, 3)
    x[:, 0] = torch.tensor([1.0, 2, -1, 3, -1, 2])
    recipe = Recipe(recipe, 0.05, 4)
    assert equal_to_the_loop(model, "fc.weight", x, recipe).name == "outer product"
    assert wanted_of(model, "fc.weight", x, torch.zeros(6), recipe).rho[2] == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_factors_are_the_delta(momentum, decay):
    """Weight decay adds a share of the weight itself, which two factors alone do not hold."""
    torch.manual_seed(4)
    model = frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    recipe = Recipe("sgd", 0.05, 4, momentum, decay)
    overfitter = equal_to_the_loop(model, "2.weight", random(5, 4), recipe, factored=True)
    assert overfitter.name == "outer product"


def test_factors_of_samples_that_leave_early():
    torch.manual_seed(4)
    model, x, y = frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), random(6, 4), random(6, seed=5)
    recipe = Recipe("sgd", 0.1, momentum=0.5, until_converged=True, tolerance=0.5, max_steps=20)
    found = overfitted(overfitter_of(model, "2.weight", x, recipe, factored=True), x, y)
    assert [part.shape for part in found.delta] == [(6, 3), (6, 5)]
    assert len(set(found.steps.tolist())) > 1, "samples are to leave at different steps"
    assert_same(found, wanted_of(model, "2.weight", x, y, recipe))


def test_views_take_the_place_of_the_prefix_and_of_closed_forms():
    torch.manual_seed(5)
    model, x, y = frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))), random(4, 4), random(4, seed=5)
    recipe = Recipe("sgd", 0.1, 2)
    overfitter = overfitter_of(model, "2.weight", x, recipe, views=True)
    assert (overfitter.name, overfitter.prefix) == ("substitution", None)
    found = overfitted(overfitter, x, y, lambda step: (x * (1 - step / 2), y))
    theta = model[2].weight.expand(4, 3, 5).clone()
    for step in range(2):
        theta.requires_grad_()
        hidden = model[:2](x * (1 - step / 2))
        output = torch.einsum("boi,bi->bo", theta, hidden) + model[2].bias
        theta = (theta - 0.1 * torch.autograd.grad(squares(output, y).sum(), theta)[0]).detach()
    torch.testing.assert_close(found.delta, theta - model[2].weight, **EXACT)


def test_results_do_not_depend_on_how_samples_are_batched():
    torch.manual_seed(9)
    model = frozen(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)))
    x, y = random(6, 1, 4, 4), random(6, seed=1)
    for name in ("0.weight", "3.weight", "5.weight"):
        overfitter, rows = overfitter_of(model, name, x, RECIPES["until converged"]), torch.tensor([5, 0, 3])
        whole, part = overfitted(overfitter, x, y), overfitted(overfitter, x[rows], y[rows])
        torch.testing.assert_close(part.delta, whole.delta[rows], **EXACT)
        assert part.steps.tolist() == whole.steps[rows].tolist()


def test_two_first_passes_may_be_under_way():
    """What one batch recorded is not disturbed by the next."""
    torch.manual_seed(9)
    model, x, y = frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), random(4, 3), random(4, seed=1)
    overfitter = overfitter_of(model, "2.weight", x, RECIPES["sgd"])
    first = overfitter.first_pass(x)
    overfitter.first_pass(copied(x) + 1)
    assert_same(overfitter.overfit(first, x, y), wanted_of(model, "2.weight", x, y, RECIPES["sgd"]))


def test_the_first_pass_gives_what_the_model_gives():
    torch.manual_seed(9)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))), random(4, 3)
    first = overfitter_of(model, "2.weight", x, RECIPES["sgd"]).first_pass(x)
    hidden = F.linear(x, model[0].weight, model[0].bias).relu()
    torch.testing.assert_close(first.output, model(x), **EXACT)
    torch.testing.assert_close(first.captured["layer_input"], hidden, **EXACT)
    torch.testing.assert_close(first.captured["activation"], model(x), **EXACT)
