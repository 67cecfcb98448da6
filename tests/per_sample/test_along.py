"""Outputs along a line of weights, θ + s · delta: every method against the loop over whole forward passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from overfitters import EXACT, RECIPES, Custom, Tied, by_copies, convolutions, copied, forward, frozen, random, squares, twice
from torch import nn

from stages.overfitting.overfitter import Overfitter
from stages.per_sample.layer import find_layer
from stages.per_sample.weights import Loop, NotSubstitutable, Substitution

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
# Not in order, and one of them twice: what was computed for one strength must not show in the next.
STRENGTHS = (1, 0.0, 0.5, 3.0, -1.0, 0.5)


def along_the_loop(model, name, x, deltas, strength):
    """θ + s · delta put into the model, one sample and one forward pass at a time."""
    layer = find_layer(model, name)
    weights = layer.weight(model) + strength * deltas.reshape(len(deltas), *layer.shape)
    return Loop(model, layer, forward)(copied(x), weights)


def overfitter_of(model, name, x):
    return Overfitter(model, find_layer(model, name), forward, squares, RECIPES["sgd"], copied(x[:2]))


def deltas_of(model, name, count, seed=7):
    return random(count, *find_layer(model, name).matrix_shape, seed=seed)


def equal_along(model, name, x):
    """The overfitter, once its outputs are found equal to the loop's, with what was recorded before the layer and without."""
    overfitter, deltas = overfitter_of(model, name, x), deltas_of(model, name, len(x))
    for recorded in (True, False):
        batch = copied(x)
        first = overfitter.first_pass(batch)
        if not recorded:
            first = type(first)(first.output, first.captured, None)
        at = overfitter.along(first, batch, deltas)
        for strength in STRENGTHS:
            torch.testing.assert_close(at(strength), along_the_loop(model, name, x, deltas, strength), **EXACT)
    return overfitter


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
    "what comes before it changed in place": (
        lambda: Custom(residual, enter=nn.Linear(3, 4), fc=nn.Linear(4, 4), leave=nn.Linear(4, 2)),
        "fc.weight",
        (3,),
    ),
    "its output changed in place": (
        lambda: Custom(in_place_twice, enter=nn.Linear(3, 4), fc=nn.Linear(4, 4), leave=nn.Linear(4, 2)),
        "fc.weight",
        (2, 3),
    ),
    "its input used beside it": (
        lambda: Custom(gated, enter=nn.Linear(3, 4), fc=nn.Linear(4, 4), leave=nn.Linear(4, 2)),
        "fc.weight",
        (3,),
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


def test_strength_zero_is_the_base():
    torch.manual_seed(3)
    model, x = frozen(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))), random(6, 1, 4, 4)
    for name in ("0.weight", "3.weight"):
        overfitter = overfitter_of(model, name, x)
        at = overfitter.along(overfitter.first_pass(x), x, deltas_of(model, name, 6))
        torch.testing.assert_close(at(0.0), model(x), **EXACT)


def test_a_last_layers_outputs_are_on_a_line():
    torch.manual_seed(3)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), random(6, 3)
    overfitter, deltas = overfitter_of(model, "2.weight", x), deltas_of(model, "2.weight", 6)
    at = overfitter.along(overfitter.first_pass(x), x, deltas)
    torch.testing.assert_close(at(3.0) - at(0.0), 6 * (at(1.0) - at(0.5)), **EXACT)
    wanted = torch.einsum("boi,bi->bo", deltas, model[:2](x))
    torch.testing.assert_close(at(1.0) - at(0.0), wanted, **EXACT)


def test_lines_of_one_batch_do_not_disturb_each_other():
    """As the members of an ensemble: several deltas on one first pass, asked in turns, after another batch was seen."""
    torch.manual_seed(4)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))), random(6, 3)
    overfitter = overfitter_of(model, "2.weight", x)
    first = overfitter.first_pass(x)
    overfitter.first_pass(copied(x) + 1)
    deltas = [deltas_of(model, "2.weight", 6, seed) for seed in (1, 2)]
    lines = [overfitter.along(first, x, delta) for delta in deltas]
    for strength in STRENGTHS:
        for at, delta in zip(lines, deltas, strict=True):
            torch.testing.assert_close(at(strength), along_the_loop(model, "2.weight", x, delta, strength), **EXACT)


def test_neither_what_comes_before_the_layer_nor_the_product_is_computed_again(monkeypatch):
    torch.manual_seed(4)
    called = []

    def noted(self, x):
        called.append("enter")
        return self.fc(x)

    model, x = frozen(nn.Sequential(Custom(noted, fc=nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2), nn.Tanh())), random(6, 3)
    overfitter, deltas = overfitter_of(model, "2.weight", x), deltas_of(model, "2.weight", 6)
    first = overfitter.first_pass(x)
    product = overfitter.method._change
    monkeypatch.setattr(overfitter.method, "_change", lambda *given: called.append("product") or product(*given))
    called.clear()
    at = overfitter.along(first, x, deltas)
    for strength in STRENGTHS:
        at(strength)
    assert called == ["product"]


def test_outputs_are_the_callers_to_change():
    torch.manual_seed(4)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), random(6, 3)
    overfitter, deltas = overfitter_of(model, "2.weight", x), deltas_of(model, "2.weight", 6)
    at = overfitter.along(overfitter.first_pass(x), x, deltas)
    wanted = at(0.0).clone()
    at(0.0).zero_()
    at(1.0).zero_()
    torch.testing.assert_close(at(0.0), wanted, **EXACT)


def test_what_goes_in_is_left_as_it_was():
    torch.manual_seed(4)

    def run(self, x):
        x /= 2
        return self.fc(x)

    model, x = frozen(Custom(run, fc=nn.Linear(3, 2))), random(6, 3)
    overfitter, deltas, before = overfitter_of(model, "fc.weight", x), deltas_of(model, "fc.weight", 6), copied(x)
    weight, given = model.fc.weight.clone(), deltas.clone()
    at = overfitter.along(overfitter.first_pass(x), x, deltas)
    found = [at(strength) for strength in (1.0, 1.0)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(x, before)
    assert torch.equal(deltas, given)
    assert torch.equal(model.fc.weight, weight)
    assert "forward" not in vars(model.fc)
    assert not found[0].requires_grad


def in_rounds(self, x):
    for _ in range(self.rounds):
        x = self.enter(x).tanh()
    return self.fc(x)


def test_a_model_that_comes_to_the_layer_by_another_way_than_recorded():
    """What the record gives is then not used, and all is computed anew."""
    torch.manual_seed(5)
    model, x = frozen(Custom(in_rounds, enter=nn.Linear(3, 3), fc=nn.Linear(3, 2), rounds=2)), random(6, 3)
    overfitter, deltas = overfitter_of(model, "fc.weight", x), deltas_of(model, "fc.weight", 6)
    first = overfitter.first_pass(x)
    assert first.record is not None
    model.rounds = 1
    at = overfitter.along(first, x, deltas)
    for strength in STRENGTHS:
        torch.testing.assert_close(at(strength), along_the_loop(model, "fc.weight", x, deltas, strength), **EXACT)


def test_deltas_of_half_the_precision_are_taken():
    torch.manual_seed(5)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), random(6, 3)
    overfitter, deltas = overfitter_of(model, "2.weight", x), deltas_of(model, "2.weight", 6).float()
    found = overfitter.along(overfitter.first_pass(x), x, deltas)(1.0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, along_the_loop(model, "2.weight", x, deltas.double(), 1.0), **EXACT)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_single_precision_far_along(name):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval().requires_grad_(False)
    x = random(20, 8, dtype=torch.float32)
    overfitter, deltas = overfitter_of(model, name, x), deltas_of(model, name, 20).float()
    at = overfitter.along(overfitter.first_pass(x), x, deltas)
    for strength in (0.1, 1.0, 30.0):
        wanted = along_the_loop(model, name, x, deltas, strength)
        # float32 rounds at 6e-8 of the largest term; a hundred of these are summed.
        torch.testing.assert_close(at(strength), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# Substitution itself, without an overfitter to fall back


def test_substitution_along_equals_a_pass_with_the_weight():
    torch.manual_seed(7)
    model = frozen(nn.Sequential(nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(inplace=True), nn.Flatten()))
    layer, x = find_layer(model, "0.weight"), random(5, 2, 6)
    deltas, method = random(5, *layer.shape, seed=1), Substitution(model, layer, forward)
    at = method.along(x, deltas)
    for strength in STRENGTHS:
        torch.testing.assert_close(at(strength), method(x, layer.weight(model) + strength * deltas), **EXACT)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (twice, "several times"),
        (lambda self, x: self.fc(x[1:]), "3 rows for a batch of 4"),
        (lambda self, x: x @ self.fc.weight.T, "not called"),
    ],
    ids=["called twice", "rows that are not the samples", "not called"],
)
def test_substitution_refuses(run, why):
    model = frozen(Custom(run, fc=nn.Linear(3, 3)))
    method = Substitution(model, find_layer(model, "fc.weight"), forward)
    with pytest.raises(NotSubstitutable, match=why):
        method.along(random(4, 3), random(4, 3, 3, seed=1))(1.0)
    assert "forward" not in vars(model.fc)


def test_a_linear_followed_at_once_by_what_works_in_place():
    """As in the heads of AlexNet and VGG; the closed form must neither fail nor have its own numbers overwritten."""
    torch.manual_seed(5)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))), random(6, 3)
    assert overfitter_of(model, "0.weight", x).name == "outer product"
    equal_along(model, "0.weight", x)


def test_a_small_change_beside_a_large_bias_is_not_rounded_away():
    torch.manual_seed(6)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4))).float(), random(6, 3).float()
    with torch.no_grad():
        model[0].bias.fill_(1e4)
    overfitter = overfitter_of(model, "0.weight", x)
    deltas = 1e-4 * deltas_of(model, "0.weight", 6).float()
    change = overfitter.along(overfitter.first_pass(x), x, deltas)(1000.0) - model(x)
    wanted = 1000 * torch.einsum("boi,bi->bo", deltas, x)
    # The outputs themselves are rounded to 1e4 · 2^-24, about 1e-3.
    torch.testing.assert_close(change, wanted, rtol=0, atol=3e-3)
