"""Weights of one's own for each sample: substitution against the loop, the loop against copies of the model, and the choice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from stages.errors import SettingsError
from stages.tasks.user_code import user_code
from stages.weights.layer import candidates, find_layer
from stages.weights.per_sample import Loop, NotSubstitutable, Substitution, choose

# float64: what differs beyond this is not rounding.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


def forward(model, x):
    return model(x)


def frozen(model):
    return model.double().eval().requires_grad_(False)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs_and_gradient(way, x, weights):
    """What a way gives, and the gradient in the weights of a sum that no two outputs enter alike."""
    leaf = weights.clone().requires_grad_()
    output = way(x, leaf)
    share = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (gradient,) = torch.autograd.grad((share * output.sin()).sum(), leaf)
    return output.detach(), gradient


def by_copies(model, name):
    """The oracle of both ways: a copy of the model for each weight, with the weight put in."""

    def run(x, weights):
        size, parts = len(x) // len(weights), []
        for i, weight in enumerate(weights):
            net = copy.deepcopy(model)
            owner = net.get_submodule(name.rpartition(".")[0])
            delattr(owner, name.rpartition(".")[2])
            setattr(owner, name.rpartition(".")[2], weight)
            parts.append(net(x[i * size : (i + 1) * size]))
        return torch.cat(parts)

    return run


def assert_equal_ways(model, name, x, weights):
    layer = find_layer(model, name)
    wanted = outputs_and_gradient(by_copies(model, name), x, weights)
    for way in (Loop, Substitution):
        found = outputs_and_gradient(way(model, layer, forward), x, weights)
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
@PROPERTY
def test_linear(groups, size, middle, inputs, outputs, bias):
    """On (B, in), (B, rows, in) and (B, rows, columns, in); G weights for G·S samples."""
    model = frozen(nn.Sequential(nn.Linear(inputs, outputs, bias), nn.Tanh(), nn.Linear(outputs, 2)))
    x = random(groups * size, *middle, inputs)
    assert_equal_ways(model, "0.weight", x, random(groups, outputs, inputs, seed=1))


def test_weight_g_serves_its_own_samples():
    model = frozen(nn.Linear(2, 2, bias=False))
    x, weights = random(6, 2), torch.stack([torch.eye(2), 10 * torch.eye(2), 100 * torch.eye(2)]).double()
    run = Substitution(model, find_layer(model, "weight"), forward)
    factors = torch.tensor([1.0, 1, 10, 10, 100, 100], dtype=torch.float64).view(-1, 1)
    torch.testing.assert_close(run(x, weights), factors * x, **EXACT)


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convolutions(draw):
    """A convolution and the size of a picture that it fits."""
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.sampled_from([1, 1, 2]))
    options = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": draw(PAIR),
        "stride": draw(PAIR),
        "padding": draw(st.tuples(st.integers(0, 2), st.integers(0, 2))),
        "dilation": draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    picture = draw(st.tuples(st.integers(3, 7), st.integers(3, 7)))
    spans = [d * (k - 1) + 1 for d, k in zip(options["dilation"], options["kernel_size"], strict=True)]
    assume(all(p + 2 * pad >= span for p, pad, span in zip(picture, options["padding"], spans, strict=True)))
    return options, picture


@given(convolution=convolutions(), groups=st.integers(1, 3), size=st.integers(1, 3))
@PROPERTY
def test_conv2d(convolution, groups, size):
    options, picture = convolution
    model = frozen(nn.Sequential(nn.Conv2d(**options), nn.Tanh()))
    x = random(groups * size, options["in_channels"], *picture)
    weights = random(groups, *model[0].weight.shape, seed=1)
    assert_equal_ways(model, "0.weight", x, weights)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv2d_with_padding_by_name(padding):
    model = frozen(nn.Conv2d(2, 3, (3, 5), padding=padding))
    assert_equal_ways(model, "weight", random(4, 2, 5, 6), random(2, 3, 2, 3, 5, seed=1))


def test_a_layer_in_the_middle_of_a_model():
    model = frozen(
        nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 3)
        )
    )
    x = random(6, 1, 6, 6)
    for name in ("0.weight", "3.weight", "5.weight"):
        weight = model.get_parameter(name)
        assert_equal_ways(model, name, x, weight + 0.1 * random(3, *weight.shape, seed=1))


def test_weights_that_do_not_divide_the_samples():
    model = frozen(nn.Linear(2, 2))
    for way in (Loop, Substitution):
        with pytest.raises(ValueError, match="3 weights cannot share 4 samples equally"):
            way(model, find_layer(model, "weight"), forward)(random(4, 2), random(3, 2, 2))


class Custom(nn.Module):
    """Parts by name, and a forward pass of one's own."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.run(self, x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 3), nn.Linear(3, 3)
        self.leave.weight = self.enter.weight

    def forward(self, x):
        return self.leave(torch.tanh(self.enter(x)))


def attention():
    return Custom(lambda self, x: self.part(x, x, x)[0], part=nn.MultiheadAttention(4, 2, batch_first=True))


def rows_first(self, x):
    return self.fc(x.flatten(0, 1)).view(*x.shape[:2], -1).sum(1)


def twice(self, x):
    return self.fc(torch.tanh(self.fc(x)))


def elsewhere(self, x):
    return F.linear(x, self.fc.weight)


def both_ways(self, x):
    return self.fc(x) + F.linear(x, self.fc.weight).square()


# name: model, parameter, shape of a sample, reason
NOT_SUBSTITUTABLE = {
    "tied": (Tied, "enter.weight", (3,), "it is tied: enter.weight, leave.weight are one"),
    "called twice": (
        lambda: Custom(twice, fc=nn.Linear(3, 3)),
        "fc.weight",
        (3,),
        "it is called several times in one forward pass",
    ),
    "parametrised": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2))),
        "0.parametrizations.weight.original1",
        (3,),
        "it is parametrised, or not the weight parameter of a module such as Linear or Conv2d",
    ),
    "rows in the batch": (
        lambda: Custom(rows_first, fc=nn.Linear(3, 2)),
        "fc.weight",
        (4, 3),
        "its input has 8 rows for a batch of 2",
    ),
    "samples on the second axis": (
        lambda: Custom(lambda self, x: self.fc(x.transpose(0, 1)).tanh().sum(0), fc=nn.Linear(3, 2)),
        "fc.weight",
        (5, 3),
        "its input has 5 rows for a batch of 2",
    ),
    # As many rows as samples: only the numbers tell.
    "samples on the second axis, square": (
        lambda: Custom(lambda self, x: self.fc(x.transpose(0, 1)).tanh().sum(0), fc=nn.Linear(3, 2)),
        "fc.weight",
        (2, 3),
        "a self-check on two samples found substitution to give other results",
    ),
    "also used outside its module": (
        lambda: Custom(both_ways, fc=nn.Linear(3, 2)),
        "fc.weight",
        (3,),
        "a self-check on two samples found substitution to give other results",
    ),
    "used outside its module": (
        lambda: Custom(elsewhere, fc=nn.Linear(3, 2)),
        "fc.weight",
        (3,),
        "its module is not called; the weight is used from elsewhere",
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2)),
        "0.weight",
        (2, 4, 4),
        "ConvTranspose2d is neither Linear nor Conv2d",
    ),
    "one-dimensional convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2)),
        "0.weight",
        (2, 5),
        "Conv1d is neither Linear nor Conv2d",
    ),
    "packed projection": (
        attention,
        "part.in_proj_weight",
        (5, 4),
        "it is parametrised, or not the weight parameter of a module such as Linear or Conv2d",
    ),
    "output projection": (
        attention,
        "part.out_proj.weight",
        (5, 4),
        "its module is not called; the weight is used from elsewhere",
    ),
    "recurrent": (
        lambda: Custom(lambda self, x: self.part(x)[0][:, -1], part=nn.LSTM(3, 4, batch_first=True)),
        "part.weight_hh_l0",
        (5, 3),
        "it is parametrised, or not the weight parameter of a module such as Linear or Conv2d",
    ),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
        "linear1.weight",
        (5, 4),
        # Without gradients torch computes the whole layer in one kernel, and its parts are not called.
        "its module is not called; the weight is used from elsewhere",
    ),
}


def guarded(model, x):
    """A forward pass as the stages make it: what the user's code raises becomes an error of the task."""
    with user_code("the model's forward pass"):
        return model(x)


@pytest.mark.parametrize("name", NOT_SUBSTITUTABLE)
@pytest.mark.parametrize("run_forward", [forward, guarded])
def test_choice_falls_back_to_the_loop_and_says_why(name, run_forward):
    make, parameter, shape, reason = NOT_SUBSTITUTABLE[name]
    torch.manual_seed(0)
    model, x = frozen(make()), random(2, *shape)
    layer = find_layer(model, parameter)
    run, found = choose(model, layer, run_forward, x)
    assert (run.name, found) == ("loop", reason)


@pytest.mark.parametrize("name", NOT_SUBSTITUTABLE)
@pytest.mark.parametrize("gradient", [True, False])
def test_the_loop_is_right_where_substitution_is_not(name, gradient):
    """With and without gradients torch may take another way through a model."""
    make, parameter, shape, _ = NOT_SUBSTITUTABLE[name]
    torch.manual_seed(0)
    model, x = frozen(make()), random(4, *shape)
    layer = find_layer(model, parameter)
    weights = layer.weight(model) + 0.3 * random(4, *layer.shape, seed=1)
    parts = []
    for i, weight in enumerate(weights):
        net = copy.deepcopy(model)
        net.get_parameter(parameter).copy_(weight)
        parts.append(net(x[i : i + 1]))
    with torch.set_grad_enabled(gradient):
        found = Loop(model, layer, forward)(x, weights.requires_grad_(gradient))
    torch.testing.assert_close(found.detach(), torch.cat(parts), **EXACT)


SUBSTITUTABLE = {
    "dense": (lambda: nn.Sequential(nn.Linear(3, 2)), "0.weight", (3,)),
    "the model itself": (lambda: nn.Linear(3, 2), "weight", (3,)),
    "tokens": (lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), "0.weight", (5, 3)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()), "0.weight", (2, 5, 5)),
}


@pytest.mark.parametrize("name", SUBSTITUTABLE)
@pytest.mark.parametrize("count", [1, 2])
def test_choice_takes_substitution_where_it_is_right(name, count):
    make, parameter, shape = SUBSTITUTABLE[name]
    model = frozen(make())
    run, reason = choose(model, find_layer(model, parameter), forward, random(count, *shape))
    assert (run.name, reason) == ("substitution", "")


def test_a_layer_called_by_keyword():
    model, x = frozen(Custom(lambda self, x: self.fc(input=x), fc=nn.Linear(3, 2))), random(4, 3)
    run, _ = choose(model, find_layer(model, "fc.weight"), forward, x[:2])
    weights = random(4, 2, 3, seed=1)
    torch.testing.assert_close(run(x, weights), by_copies(model, "fc.weight")(x, weights), **EXACT)


def test_choice_with_outputs_of_several_forms():
    """A dict of a float and an integer tensor: the integer has no gradient to compare."""

    def run(self, x):
        logits = self.fc(x["a"])
        return {"logits": logits, "class": logits.argmax(1)}

    model = frozen(Custom(run, fc=nn.Linear(3, 2)))
    assert choose(model, find_layer(model, "fc.weight"), forward, {"a": random(2, 3)})[1] == ""


class Doubled(nn.Linear):
    """A Linear with a forward pass of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_parent():
    model = frozen(nn.Sequential(Doubled(3, 2)))
    run, reason = choose(model, find_layer(model, "0.weight"), forward, random(2, 3))
    assert (run.name, reason) == ("loop", "Doubled is neither Linear nor Conv2d")


def test_a_forward_that_is_replaced_already_is_left_alone():
    model = frozen(nn.Sequential(nn.Linear(3, 2)))
    model[0].forward = lambda x: x[:, :2]
    run, reason = choose(model, find_layer(model, "0.weight"), forward, random(2, 3))
    assert (run.name, reason) == ("loop", "its module's forward pass is replaced already")
    assert "forward" in vars(model[0])


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
    for way in (Loop, choose(model, layer, forward, x[:2])[0].__class__):
        outputs_and_gradient(way(model, layer, forward), x, random(4, 3, 3))
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
