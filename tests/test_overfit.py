"""Overfitting against the plain loop over copies of the model, and the conditioning against a hook of one's own."""

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from stages.errors import ComputeError, TaskError
from stages.weights.capture import capture, reduce_fields
from stages.weights.layer import find_layer
from stages.weights.overfit import Overfit, check_finite, overfit
from stages.weights.per_sample import Loop, Substitution

WAYS = [Loop, Substitution]
# optimizer, lr, steps: the authors' for LeNet5, a long one, and plain gradient descent.
RECIPES = [("adam", 5e-4, 3), ("adam", 5e-3, 10), ("sgd", 0.1, 3)]
# model: layers to overfit
LAYERS = [("dense", "0.weight"), ("dense", "2.weight"), ("convolution", "0.weight"), ("convolution", "2.weight")]


def forward(model, x):
    return model(x)


def cross_entropy(output, y):
    return F.cross_entropy(output, y, reduction="none")


def make_problem(name, dtype, rows=6):
    torch.manual_seed(3)
    if name == "dense":
        model, shape = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (4,)
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, (3, 2), 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
        )
        shape = (1, 6, 6)
    model = model.to(dtype).eval().requires_grad_(False)
    return model, torch.randn(rows, *shape, dtype=dtype), torch.arange(rows) % 3


def run_overfit(way, model, name, x, y, recipe=("sgd", 0.1, 1), loss=cross_entropy, views=None):
    layer = find_layer(model, name)
    optimizer, lr, steps = recipe
    return overfit(
        way(model, layer, forward),
        layer.weight(model),
        views or (lambda step: (x, y)),
        x,
        y,
        loss,
        optimizer=optimizer,
        lr=lr,
        steps=steps,
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("model", "name"), LAYERS)
def test_double_precision_equals_the_loop(model, name, way, recipe):
    net, x, y = make_problem(model, torch.float64)
    wanted = reference.overfit_loop(net, name, cross_entropy, x, y, *recipe)
    found = run_overfit(way, net, name, x, y, recipe)
    assert found.delta.shape == (6, *find_layer(net, name).matrix_shape)
    for got, want in (
        (found.delta, wanted.delta),
        (found.rho, wanted.rho),
        (found.base_loss, wanted.base_loss),
        (found.overfit_loss, wanted.overfit_loss),
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert found.steps.tolist() == [recipe[2]] * 6
    assert not found.degenerate.any()
    assert (found.overfit_loss < found.base_loss).all()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("model", "name"), LAYERS)
def test_single_precision_equals_the_loop_to_a_thousandth(model, name, way, recipe):
    net, x, y = make_problem(model, torch.float32)
    wanted = reference.overfit_loop(net, name, cross_entropy, x, y, *recipe)
    found = run_overfit(way, net, name, x, y, recipe)
    # Where the loss is smaller, Adam normalises rounding noise, and no two correct programs agree.
    assert (wanted.base_loss > 1e-3).all()
    assert ((found.delta - wanted.delta).flatten(1).norm(dim=1) < 1e-3 * wanted.rho).all()
    torch.testing.assert_close(found.rho, wanted.rho, rtol=1e-3, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_sample_does_not_depend_on_its_batch(way):
    net, x, y = make_problem("convolution", torch.float64)
    whole = run_overfit(way, net, "2.weight", x, y, ("adam", 1e-2, 3))
    part = run_overfit(way, net, "2.weight", x[[4, 1]], y[[4, 1]], ("adam", 1e-2, 3))
    torch.testing.assert_close(part.delta, whole.delta[[4, 1]], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_degenerate_is_a_largest_gradient_below_a_millionth(way, optimizer):
    """The output is the weight times one, so the gradient is the label."""
    net = nn.Linear(1, 1, bias=False).double().requires_grad_(False)
    sizes = torch.tensor([0.0, 0.9e-6, -0.9e-6, 1.1e-6, -1.1e-6, 1.0], dtype=torch.float64)
    found = run_overfit(
        way,
        net,
        "weight",
        torch.ones(6, 1, dtype=torch.float64),
        sizes,
        (optimizer, 0.1, 2),
        loss=lambda output, y: output.squeeze(1) * y,
    )
    assert found.degenerate.tolist() == [True, True, True, False, False, False]
    assert found.rho[0] == 0


@pytest.mark.parametrize("way", WAYS)
def test_largest_gradient_of_all_steps_counts(way):
    """A sample that is fitted after one step was not degenerate."""
    net = nn.Linear(1, 1, bias=False).double().requires_grad_(False)
    scale = torch.tensor([1.0, 0.0], dtype=torch.float64)
    found = run_overfit(
        way,
        net,
        "weight",
        torch.ones(2, 1, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        ("sgd", 0.5, 3),
        loss=lambda output, y: scale * (output.squeeze(1) - y).square(),
    )
    # Half the gradient 2w is the way to the minimum: the second and third gradients are zero.
    assert found.overfit_loss[0] == 0
    assert found.degenerate.tolist() == [False, True]


@pytest.mark.parametrize("way", WAYS)
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
def test_loss_that_does_not_depend_on_the_layer(way, loss):
    net, x, y = make_problem("dense", torch.float32)
    with pytest.raises(TaskError, match="the loss does not depend on the layer") as caught:
        run_overfit(way, net, "0.weight", x, y, loss=loss)
    assert caught.value.hint


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


def test_layer_that_is_not_used():
    """With gradients elsewhere in the model the sum of the losses has one, but not in the layer."""
    net, x, y = Unused(), torch.randn(4, 4), torch.arange(4) % 3
    for gradient in (True, False):
        with pytest.raises(TaskError, match="the loss does not depend on the layer"):
            run_overfit(Loop, net.requires_grad_(gradient), "unused.weight", x, y)


@pytest.mark.parametrize("way", WAYS)
def test_each_step_sees_its_own_view(way):
    net, x, y = make_problem("dense", torch.float64)
    shown = torch.randn(3, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    asked = []

    def views(step):
        asked.append(step)
        return shown[step], (y + step) % 3

    found = run_overfit(way, net, "0.weight", x, y, ("sgd", 0.1, 3), views=views)
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
    for way in WAYS:
        run_overfit(way, net, "0.weight", x, y, ("adam", 1e-2, 3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())


def overfitted(rho, base_loss):
    rho, base_loss = torch.tensor(rho), torch.tensor(base_loss)
    none = torch.zeros(len(rho))
    return Overfit(none.view(-1, 1, 1), rho, none.bool(), base_loss, none, none.int())


def test_samples_that_are_not_finite_are_named_by_their_row():
    rows = torch.tensor([17, 4, 99])
    check_finite(overfitted([0.0, 1.0, 2.0], [0.1, 0.2, 0.3]), rows)
    nan, inf = float("nan"), float("inf")
    for rho, base_loss, row in (
        ([1.0, nan, 1.0], [0.1, 0.2, 0.3], 4),
        ([1.0, 1.0, inf], [0.1, 0.2, 0.3], 99),
        ([1.0, 1.0, 1.0], [inf, 0.2, nan], 17),
    ):
        with pytest.raises(ComputeError, match=f"overfitting sample {row} gave numbers that are not finite") as caught:
            check_finite(overfitted(rho, base_loss), rows)
        assert "collect.lr" in caught.value.hint


@pytest.mark.parametrize("way", WAYS)
def test_a_learning_rate_that_is_far_too_large_is_found(way):
    net, x, y = make_problem("dense", torch.float32)
    found = run_overfit(way, net, "0.weight", x, y, ("sgd", 1e38, 3), loss=lambda output, y: output.square().sum(1))
    with pytest.raises(ComputeError, match="overfitting sample 0 gave numbers"):
        check_finite(found, torch.arange(6))


def seen_by_a_hook(model, module, x):
    seen = {}
    handle = module.register_forward_hook(lambda _, args, output: seen.update(layer_input=args[0], activation=output))
    seen["base_output"] = model(x)
    handle.remove()
    return seen


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_capture_is_what_a_hook_sees(name, layer):
    model, x, _ = make_problem(name, torch.float32)
    wanted = seen_by_a_hook(model, model.get_submodule(layer.rpartition(".")[0]), x)
    output, fields = capture(model, find_layer(model, layer), forward, x)
    assert torch.equal(output, wanted["base_output"])
    assert list(fields) == ["layer_input", "activation", "base_output"]
    for field, value in wanted.items():
        assert torch.equal(fields[field], value), field


class Rows(nn.Module):
    """Rows of all samples in one batch, and a module called twice."""

    def __init__(self):
        super().__init__()
        self.fc, self.never = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.fc(x.flatten(0, 1)).relu()
        return {"a": self.fc(hidden).view(*x.shape).sum(1), "b": hidden.view(len(x), -1)[:, 0]}


def test_capture_gives_each_sample_its_rows_and_counts_the_last_call():
    torch.manual_seed(0)
    model, x = Rows().requires_grad_(False), torch.randn(4, 5, 3)
    output, fields = capture(model, find_layer(model, "fc.weight"), forward, x)
    hidden = model.fc(x).relu()
    torch.testing.assert_close(fields["layer_input"], hidden)
    torch.testing.assert_close(fields["activation"], model.fc(hidden))
    torch.testing.assert_close(fields["base_output"], torch.cat([output["a"], output["b"].unsqueeze(1)], dim=1))


def test_capture_of_a_layer_that_is_not_called():
    model = Rows()
    with pytest.raises(TaskError, match=r"the module of never.weight is not called in the forward pass"):
        capture(model, find_layer(model, "never.weight"), forward, torch.randn(4, 5, 3))
    assert not model.never._forward_hooks


class Shared(nn.Module):
    """Three rows for all samples of a batch together."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.fc(x[:3]).sum(0)


def test_capture_of_rows_that_do_not_divide_into_samples():
    model = Shared()
    with pytest.raises(TaskError, match=r"the input of fc.weight has shape \(3, 3\) for a batch of 4"):
        capture(model, find_layer(model, "fc.weight"), forward, torch.randn(4, 3))
    assert not model.fc._forward_hooks


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(input=x)


def test_capture_of_a_layer_called_by_keyword():
    model, x = Keyword().requires_grad_(False), torch.randn(4, 3)
    _, fields = capture(model, find_layer(model, "fc.weight"), forward, x)
    assert torch.equal(fields["layer_input"], x)
    assert torch.equal(fields["activation"], model.fc(x))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        hidden = x + 1
        output = self.fc(hidden)
        hidden += output
        return hidden


def test_the_activation_is_taken_before_a_nonlinearity_that_works_in_place():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True)).requires_grad_(False), torch.randn(5, 3)
    _, fields = capture(model, find_layer(model, "0.weight"), forward, x)
    torch.testing.assert_close(fields["activation"], F.linear(x, model[0].weight, model[0].bias))


def test_the_layer_input_is_taken_before_a_residual_sum_in_place():
    torch.manual_seed(0)
    model, x = InPlace().requires_grad_(False), torch.randn(4, 3)
    _, fields = capture(model, find_layer(model, "fc.weight"), forward, x)
    torch.testing.assert_close(fields["layer_input"], x + 1)


def not_reduced(name, value):
    return None


def test_wide_fields_of_a_convolution_are_pooled_over_the_picture():
    fields = {"layer_input": torch.randn(2, 8, 32, 32), "activation": torch.randn(2, 4, 32, 32)}
    found, notes = reduce_fields(fields, nn.Conv2d, not_reduced)
    torch.testing.assert_close(found["layer_input"], fields["layer_input"].mean((2, 3)))
    # 4,096 numbers exactly are not too wide.
    assert torch.equal(found["activation"], fields["activation"])
    assert notes == {"layer_input": "mean over axes [2, 3] of (8, 32, 32)"}


def test_wide_fields_of_other_layers_are_pooled_over_all_but_the_last_axis():
    fields = {"layer_input": torch.randn(2, 10, 7, 64), "activation": torch.randn(2, 10, 7, 5)}
    found, notes = reduce_fields(fields, nn.Linear, not_reduced)
    torch.testing.assert_close(found["layer_input"], fields["layer_input"].mean((1, 2)))
    assert torch.equal(found["activation"], fields["activation"])
    assert notes == {"layer_input": "mean over axes [1, 2] of (10, 7, 64)"}


def test_a_wide_vector_has_no_axis_to_pool_over():
    fields = {"base_output": torch.randn(2, 5000)}
    found, notes = reduce_fields(fields, nn.Linear, not_reduced)
    assert torch.equal(found["base_output"], fields["base_output"])
    assert notes == {}


def test_the_tasks_own_reduction_wins():
    fields = {"layer_input": torch.randn(2, 8, 32, 32), "activation": torch.randn(2, 6)}
    asked = []

    def reduce(name, value):
        asked.append(name)
        return value.amax((2, 3)) if name == "layer_input" else None

    found, notes = reduce_fields(fields, nn.Conv2d, reduce)
    assert "layer_input" in asked
    assert torch.equal(found["layer_input"], fields["layer_input"].amax((2, 3)))
    assert torch.equal(found["activation"], fields["activation"])
    assert notes == {"layer_input": "reduced by the task"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16])
def test_fields_are_stored_in_single_precision(dtype):
    found, _ = reduce_fields({"layer_input": torch.arange(6).view(2, 3).to(dtype)}, nn.Embedding, not_reduced)
    assert torch.equal(found["layer_input"], torch.arange(6.0).view(2, 3))
