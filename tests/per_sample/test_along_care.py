"""Outputs along a line of weights: nothing is disturbed, computed twice or rounded away."""

import pytest
import torch
from along import STRENGTHS, along_the_loop, close_to_the_loop, deltas_of, equal_along, line_of
from overfitters import EXACT, RECIPES, Custom, copied, forward, frozen, overfitter_of, random, twice
from torch import nn

from stages.per_sample import products as linear_product
from stages.per_sample import weights
from stages.per_sample.layer import find_layer
from stages.per_sample.weights import NotSubstitutable, Substitution


def perceptron(between=nn.Tanh):
    """A model of two layers, and inputs."""
    torch.manual_seed(4)
    return frozen(nn.Sequential(nn.Linear(3, 4), between(), nn.Linear(4, 2))), random(6, 3)


def test_strength_zero_is_the_base():
    torch.manual_seed(3)
    model, x = frozen(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))), random(6, 1, 4, 4)
    for name in ("0.weight", "3.weight"):
        torch.testing.assert_close(line_of(model, name, x, deltas_of(model, name, 6))(0.0), model(x), **EXACT)


def test_a_last_layers_outputs_are_on_a_line():
    model, x = perceptron()
    deltas = deltas_of(model, "2.weight", 6)
    at = line_of(model, "2.weight", x, deltas)
    torch.testing.assert_close(at(3.0) - at(0.0), 6 * (at(1.0) - at(0.5)), **EXACT)
    wanted = torch.einsum("boi,bi->bo", deltas, model[:2](x))
    torch.testing.assert_close(at(1.0) - at(0.0), wanted, **EXACT)


def test_lines_of_one_batch_do_not_disturb_each_other():
    """As the members of an ensemble: several deltas on one first pass, asked in turns, after another batch was seen."""
    model, x = perceptron(lambda: nn.ReLU(inplace=True))
    overfitter = overfitter_of(model, "2.weight", copied(x), RECIPES["sgd"])
    first = overfitter.first_pass(x)
    overfitter.first_pass(copied(x) + 1)
    deltas = [deltas_of(model, "2.weight", 6, seed) for seed in (1, 2)]
    lines = [overfitter.along(first, x, delta) for delta in deltas]
    for strength in STRENGTHS:
        for at, delta in zip(lines, deltas, strict=True):
            torch.testing.assert_close(at(strength), along_the_loop(model, "2.weight", x, delta, strength), **EXACT)


@pytest.fixture
def products(monkeypatch):
    """What the products of a Linear were computed with: "θ" with the layer's bias, "delta" without it."""
    product, found = linear_product.linear, []

    def noted(value, weights, bias):
        found.append("delta" if bias is None else "θ")
        return product(value, weights, bias)

    monkeypatch.setattr(linear_product, "linear", noted)
    return found


def test_neither_what_comes_before_the_layer_nor_the_product_is_computed_again(products):
    torch.manual_seed(4)
    called = []

    def noted(self, x):
        called.append("enter")
        return self.fc(x)

    model, x = frozen(nn.Sequential(Custom(noted, fc=nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2), nn.Tanh())), random(6, 3)
    overfitter, deltas = overfitter_of(model, "2.weight", copied(x), RECIPES["sgd"]), deltas_of(model, "2.weight", 6)
    first = overfitter.first_pass(x)
    called.clear()
    products.clear()
    at = overfitter.along(first, x, deltas)
    for strength in STRENGTHS:
        at(strength)
    assert (called, products) == ([], ["delta"])


@pytest.mark.parametrize("shape", [(4,), (7, 4)])
def test_products_are_kept_only_of_so_many_numbers(monkeypatch, products, shape):
    torch.manual_seed(0)
    model, x = frozen(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))), random(3, *shape)
    layer, deltas = find_layer(model, "0.weight"), random(3, 5, 4, seed=1)
    for most, wanted in ((x.numel(), ["delta"]), (x.numel() - 1, ["θ"] * len(STRENGTHS))):
        monkeypatch.setattr(weights, "MOST_KEPT", most)
        at = Substitution(model, layer, forward).along(copied(x), deltas)
        products.clear()
        outputs = [at(strength) for strength in STRENGTHS]
        assert products == wanted
        for strength, output in zip(STRENGTHS, outputs, strict=True):
            torch.testing.assert_close(output, along_the_loop(model, "0.weight", x, deltas, strength), **EXACT)


def test_outputs_are_the_callers_to_change():
    model, x = perceptron()
    at = line_of(model, "2.weight", x, deltas_of(model, "2.weight", 6))
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
    deltas, before = deltas_of(model, "fc.weight", 6), copied(x)
    weight, given = model.fc.weight.clone(), deltas.clone()
    at = line_of(model, "fc.weight", x, deltas)
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
    overfitter, deltas = overfitter_of(model, "fc.weight", copied(x), RECIPES["sgd"]), deltas_of(model, "fc.weight", 6)
    first = overfitter.first_pass(x)
    assert first.record is not None
    model.rounds = 1
    close_to_the_loop(overfitter.along(first, x, deltas), model, "fc.weight", x, deltas)


def test_deltas_of_half_the_precision_are_taken():
    model, x = perceptron()
    deltas = deltas_of(model, "2.weight", 6).float()
    found = line_of(model, "2.weight", x, deltas)(1.0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, along_the_loop(model, "2.weight", x, deltas.double(), 1.0), **EXACT)


@pytest.mark.parametrize("name", ["0.weight", "2.weight"])
def test_single_precision_far_along(name):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval().requires_grad_(False)
    x = random(20, 8, dtype=torch.float32)
    deltas = deltas_of(model, name, 20).float()
    at = line_of(model, name, x, deltas)
    for strength in (0.1, 1.0, 30.0):
        wanted = along_the_loop(model, name, x, deltas, strength)
        # float32 rounds at 6e-8 of the largest term; a hundred of these are summed.
        torch.testing.assert_close(at(strength), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


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
    model, x = perceptron(lambda: nn.ReLU(inplace=True))
    assert overfitter_of(model, "0.weight", copied(x), RECIPES["sgd"]).name == "outer product"
    equal_along(model, "0.weight", x)


def test_a_small_change_beside_a_large_bias_is_not_rounded_away():
    torch.manual_seed(6)
    model, x = frozen(nn.Sequential(nn.Linear(3, 4))).float(), random(6, 3).float()
    with torch.no_grad():
        model[0].bias.fill_(1e4)
    deltas = 1e-4 * deltas_of(model, "0.weight", 6).float()
    change = line_of(model, "0.weight", x, deltas)(1000.0) - model(x)
    wanted = 1000 * torch.einsum("boi,bi->bo", deltas, x)
    # The outputs themselves are rounded to 1e4 · 2^-24, about 1e-3.
    torch.testing.assert_close(change, wanted, rtol=0, atol=3e-3)
