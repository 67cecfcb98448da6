"""Overfitting against the plain loop over copies of the model."""

import math

import pytest
import torch
import torch.nn.functional as F
from overfitters import (
    EXACT,
    LAYERS,
    RECIPES,
    Custom,
    assert_near,
    assert_same,
    cross_entropy,
    forward,
    make_problem,
    wanted_of,
)
from torch import nn

from stages.foundation.errors import TaskError
from stages.overfitting.dense import DenseDescent
from stages.overfitting.descent import LabelledBatch
from stages.overfitting.overfit import overfit
from stages.overfitting.recipe import Recipe
from stages.per_sample.layer import find_layer
from stages.per_sample.weights import Loop, Substitution, Vmap

METHODS = [Loop, Vmap, Substitution]
# The authors' for LeNet5, and a long one, beside those of the overfitter's tests.
RECIPES = {"authors": Recipe("adam", 5e-4, 3), "long": Recipe("adam", 5e-3, 10), "plain": Recipe("sgd", 0.1, 3)} | RECIPES


def run_overfit(method, model, name, x, y, recipe=RECIPES["plain"], loss=cross_entropy, views=None):
    layer = find_layer(model, name)
    batch = LabelledBatch(x, y, loss, views=views)
    descent = DenseDescent(method(model, layer, forward), layer.weight(model), batch, recipe)
    return overfit(descent, loss(model(x), y), recipe)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("model", "name"), LAYERS)
def test_double_precision_equals_the_loop(model, name, method, recipe):
    net, x, y = make_problem(model, torch.float64)
    found = run_overfit(method, net, name, x, y, RECIPES[recipe])
    assert found.delta.shape == (6, *find_layer(net, name).matrix_shape)
    assert_same(found, wanted_of(net, name, x, y, RECIPES[recipe], cross_entropy))
    assert not found.degenerate.any()
    assert (found.overfit_loss < found.base_loss).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("model", "name"), LAYERS)
def test_single_precision_equals_the_loop_to_a_thousandth(model, name, method, recipe):
    net, x, y = make_problem(model, torch.float32)
    assert_near(
        run_overfit(method, net, name, x, y, RECIPES[recipe]), wanted_of(net, name, x, y, RECIPES[recipe], cross_entropy)
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    net, x, y = make_problem("convolution", torch.float64)
    whole = run_overfit(method, net, "2.weight", x, y, Recipe("adam", 1e-2, 3))
    part = run_overfit(method, net, "2.weight", x[[4, 1]], y[[4, 1]], Recipe("adam", 1e-2, 3))
    torch.testing.assert_close(part.delta, whole.delta[[4, 1]], rtol=1e-10, atol=1e-10)


def one_weight():
    return nn.Linear(1, 1, bias=False).double().requires_grad_(False)


def ones(count):
    return torch.ones(count, 1, dtype=torch.float64)


def quadratic(curvature):
    """A weight of one, and the loss c/2 · w² of its own c for each sample: after k steps w = (1 − lr · c)^k."""
    net = one_weight()
    net.weight.fill_(1)
    y = torch.tensor(curvature, dtype=torch.float64)
    return net, ones(len(y)), y, lambda output, y: y / 2 * output.squeeze(1).square()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_degenerate_is_a_largest_gradient_below_a_millionth(method, optimizer):
    """The output is the weight times one, so the gradient is the label."""
    sizes, recipe = torch.tensor([0.0, 0.9e-6, -0.9e-6, 1.1e-6, -1.1e-6, 1.0], dtype=torch.float64), Recipe(optimizer, 0.1, 2)
    found = run_overfit(method, one_weight(), "weight", ones(6), sizes, recipe, lambda output, y: output.squeeze(1) * y)
    assert found.degenerate.tolist() == [True, True, True, False, False, False]
    assert found.rho[0] == 0


@pytest.mark.parametrize("method", METHODS)
def test_largest_gradient_of_all_steps_counts(method):
    """A sample that is fitted after one step was not degenerate."""
    net, x, y, loss = quadratic([2.0, 0.0])
    found = run_overfit(method, net, "weight", x, y, Recipe("sgd", 0.5, 3), loss)
    # Half the gradient 2w is the method to the minimum: the second and third gradients are zero.
    assert found.overfit_loss[0] == 0
    assert found.degenerate.tolist() == [False, True]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "loss",
    [
        lambda output, y: torch.ones(len(y)),
        lambda output, y: y.float(),
        lambda output, y: output.detach().sum(1),
        lambda output, y: (output.argmax(1) != y).float(),
    ],
    ids=["constant", "of the label", "detached", "without gradient"],
)
def test_loss_that_does_not_depend_on_the_layer(method, loss):
    net, x, y = make_problem("dense", torch.float32)
    with pytest.raises(TaskError, match="the loss does not depend on the layer") as caught:
        run_overfit(method, net, "0.weight", x, y, loss=loss)
    assert caught.value.hint


def test_layer_that_is_not_used():
    """With gradients elsewhere in the model the sum of the losses has one, but not in the layer."""
    net = Custom(lambda self, x: self.used(x), used=nn.Linear(4, 3), unused=nn.Linear(4, 3))
    x, y = torch.randn(4, 4), torch.arange(4) % 3
    for gradient in (True, False):
        with pytest.raises(TaskError, match="the loss does not depend on the layer"):
            run_overfit(Loop, net.requires_grad_(gradient), "unused.weight", x, y)


@pytest.mark.parametrize("method", METHODS)
def test_each_step_sees_its_own_view(method):
    net, x, y = make_problem("dense", torch.float64)
    shown = torch.randn(3, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    asked = []

    def views(step):
        asked.append(step)
        return shown[step], (y + step) % 3

    found = run_overfit(method, net, "0.weight", x, y, Recipe("sgd", 0.1, 3), views=views)
    assert asked == [0, 1, 2]
    for i in range(len(x)):
        theta = net[0].weight.clone()
        for step in range(3):
            theta.requires_grad_()
            hidden = F.linear(shown[step, i], theta, net[0].bias).relu()
            loss = F.cross_entropy(net[2](hidden), (y[i] + step) % 3)
            theta = (theta - 0.1 * torch.autograd.grad(loss, theta)[0]).detach()
        torch.testing.assert_close(found.delta[i], theta - net[0].weight, rtol=1e-10, atol=1e-12)
        # The losses before and after are those of the whole sample.
        hidden = F.linear(x[i], theta, net[0].bias).relu()
        assert float(found.overfit_loss[i]) == pytest.approx(float(F.cross_entropy(net[2](hidden), y[i])), rel=1e-10)
        assert float(found.base_loss[i]) == pytest.approx(float(F.cross_entropy(net(x[i]), y[i])), rel=1e-10)


def test_the_base_is_not_changed():
    net, x, y = make_problem("convolution", torch.float32)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for method in METHODS:
        run_overfit(method, net, "0.weight", x, y, Recipe("adam", 1e-2, 3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_samples_leave_when_their_own_gradient_has_fallen(method):
    curvature = [0.5, 0.1, 0.9, 0.0, 1.0, 0.7, 0.1]
    net, x, y, loss = quadratic(curvature)
    recipe = Recipe("sgd", 1.0, until_converged=True, tolerance=0.05, max_steps=8)
    found = run_overfit(method, net, "weight", x, y, recipe, loss)
    # The smallest k with (1 − c)^k <= 0.05, at most 8; none without a gradient, and one where that ends it.
    steps = [math.ceil(math.log(0.05) / math.log(1 - c)) if 0 < c < 1 else int(c) for c in curvature]
    assert found.steps.tolist() == [min(k, 8) for k in steps] == [5, 8, 2, 0, 1, 3, 8]
    left = (1 - y) ** found.steps
    torch.testing.assert_close(found.delta.flatten(), left - 1, **EXACT)
    torch.testing.assert_close(found.rho, 1 - left, **EXACT)
    torch.testing.assert_close(found.overfit_loss, y / 2 * left**2, **EXACT)
    assert found.degenerate.tolist() == [c == 0 for c in curvature]


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_below_a_millionth_ends_the_descent(method):
    """However small the tolerance: the gradient c · (1 − c)^k of c = 0.9 is below a millionth at k = 6."""
    net, x, y, loss = quadratic([0.9, 0.5])
    recipe = Recipe("sgd", 1.0, until_converged=True, tolerance=1e-12, max_steps=9)
    assert run_overfit(method, net, "weight", x, y, recipe, loss).steps.tolist() == [6, 9]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", METHODS)
def test_the_optimizers_state_goes_with_the_samples_that_stay(method, optimizer):
    net, x, y = make_problem("convolution", torch.float64)
    momentum = 0.8 if optimizer == "sgd" else 0.0
    recipe = Recipe(optimizer, 0.05, momentum=momentum, until_converged=True, tolerance=0.5, max_steps=20)
    found = run_overfit(method, net, "2.weight", x, y, recipe)
    assert len(set(found.steps.tolist())) > 2, "samples are to leave at different steps"
    assert_same(found, wanted_of(net, "2.weight", x, y, recipe, cross_entropy))


@pytest.mark.parametrize("method", METHODS)
def test_views_stay_with_their_samples_when_others_leave(method):
    """The losses are those of the whole samples, for the ones that leave early as well."""
    curvature = [0.5, 0.1, 1e-7, 0.2]
    # What a sample shows at each step: the second leaves before step 1, the third at once, the last before step 2.
    scale = torch.tensor([[1, 2, 3], [1, 0.5, 1], [1, 1, 1], [1, 2, 0.1]], dtype=torch.float64)
    net, x, y, loss = quadratic(curvature)
    recipe = Recipe("sgd", 0.1, until_converged=True, tolerance=0.6, max_steps=3)
    found = run_overfit(method, net, "weight", x, y, recipe, loss, views=lambda step: (x * scale[:, step : step + 1], y))
    assert found.steps.tolist() == [3, 1, 0, 2]
    for i, c in enumerate(curvature):
        w = 1.0
        for step in range(int(found.steps[i])):
            w -= 0.1 * c * w * float(scale[i, step]) ** 2
        assert float(found.delta[i]) == pytest.approx(w - 1, rel=1e-10, abs=1e-12)
        assert float(found.overfit_loss[i]) == pytest.approx(c / 2 * w**2, rel=1e-10)
