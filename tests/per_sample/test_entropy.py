"""Layer selection (Eq. 6): the binned entropy against scipy's, and perturbed losses against one forward pass at a time."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from overfitters import cross_entropy, forward
from torch import nn

from stages.foundation.seeds import generator
from stages.per_sample.entropy import kde_entropy, perturbed_losses, rank_stability, ranks_of
from stages.per_sample.layer import find_layer
from stages.per_sample.weights import Loop, Substitution

# The binned density is piecewise linear between points h/16 apart: 5e-4 of its value at most at the peak of a kernel.
BINNING = 1e-3

SAMPLES = {
    "gaussian": lambda draw, n: draw.normal(3, 0.2, n),
    "exponential": lambda draw, n: draw.exponential(2, n),
    "heavy-tailed": lambda draw, n: draw.standard_t(2, n),
    "bimodal": lambda draw, n: np.concatenate([draw.normal(-5, 0.1, n // 2), draw.normal(5, 1, n - n // 2)]),
    "few values": lambda draw, n: draw.integers(0, 3, n).astype(float),
}


@pytest.mark.parametrize("count", [2, 50, 500, 5000])
@pytest.mark.parametrize("name", SAMPLES)
def test_entropy_equals_scipy(name, count):
    values = SAMPLES[name](np.random.default_rng(count), count)
    assert kde_entropy(values) == pytest.approx(reference.kde_entropy(values), abs=BINNING)


def test_entropy_of_a_gaussian_is_near_the_true_one():
    values = np.random.default_rng(0).normal(0, 0.1, 20_000)
    # Smoothing widens it by h²/2σ² = 0.009, and 20,000 draws leave 0.005 of chance.
    assert kde_entropy(values) == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 0.1**2), abs=0.03)


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e12])
def test_one_far_value(outlier):
    values = np.append(np.random.default_rng(0).normal(0, 1, 999), outlier)
    assert kde_entropy(values) == pytest.approx(reference.kde_entropy(values), abs=BINNING)


@pytest.mark.parametrize("value", [0.0, 0.7, -3e3, 1e6, 1e9, 4e10])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_constant_losses_give_the_floor(value, count):
    # A loss of 4e10 is an ordinary squared error of targets in the hundred thousands. Adding 5e-8 to 1e6 is good to four
    # digits, hence 1e-3.
    assert kde_entropy(np.full(count, value)) == pytest.approx(math.log(1e-8 * math.sqrt(2 * math.pi)), abs=1e-3)


def test_losses_that_hardly_vary_are_above_the_floor():
    draw = np.random.default_rng(0).normal(size=500)
    floor = kde_entropy(np.zeros(500))
    found = [kde_entropy(draw * spread) for spread in (1e-12, 1e-9, 1e-7, 1e-5, 1e-3)]
    assert found == sorted(found)
    assert found[0] >= floor - BINNING
    assert np.isfinite(found).all()


@given(name=st.sampled_from(sorted(SAMPLES)), shift=st.floats(-1e4, 1e4), factor=st.floats(1e-4, 1e4))
def test_shift_and_scale(name, shift, factor):
    """h(a·X + b) = h(X) + log a."""
    values = SAMPLES[name](np.random.default_rng(1), 300)
    assert kde_entropy(values * factor + shift) == pytest.approx(kde_entropy(values) + math.log(factor), abs=BINNING)


@given(st.permutations(range(60)))
@settings(max_examples=10)
def test_order_of_draws_does_not_matter(order):
    values = np.random.default_rng(2).exponential(1, 60)
    # Sums in another order.
    assert kde_entropy(values[list(order)]) == pytest.approx(kde_entropy(values), abs=1e-9)


def test_ranks():
    assert ranks_of(np.array([0.1, 5.0, -2.0, 3.0])).tolist() == [3, 1, 4, 2]
    # The first of two equal ones keeps its place, whatever the machine's sort does.
    assert ranks_of(np.array([1.0, 2.0, 2.0, 1.0])).tolist() == [3, 1, 2, 4]
    assert ranks_of(np.array([7.0])).tolist() == [1]


def test_ranks_that_are_clear_are_stable():
    draw = np.random.default_rng(0)
    entropies = np.array([[0.0], [-5.0], [5.0]]) + draw.normal(0, 0.1, (3, 32))
    assert rank_stability(entropies, np.random.default_rng(1)).tolist() == [1, 1, 1]


def test_ranks_of_equals_are_not_stable():
    draw = np.random.default_rng(0)
    entropies = np.concatenate([draw.normal(0, 1, (2, 32)), np.full((1, 32), -9.0)])
    entropies[1] += entropies[0].mean() - entropies[1].mean()
    found = rank_stability(entropies, np.random.default_rng(1))
    assert ((found >= 0) & (found <= 1)).all()
    # Two candidates of equal score swap in half of the resamples; 200 of them leave 0.035 of chance.
    assert found[:2] == pytest.approx(0.5, abs=0.15)
    assert found[2] == 1
    assert rank_stability(entropies, np.random.default_rng(1)).tolist() == found.tolist()


@pytest.fixture(scope="module")
def problem():
    """A small model in float64 with a convolution and two dense layers, and six samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 5), nn.Tanh(), nn.Linear(5, 3))
    model.double().eval().requires_grad_(False)
    return model, torch.randn(6, 1, 5, 5, dtype=torch.float64), torch.arange(6) % 3


def losses(problem, name, *, method=Substitution, samples=slice(None), loss=cross_entropy, **options):
    model, x, y = problem
    layer, options = find_layer(model, name), {"draws": 20, "at_once": 20, "sigma": 0.5, "seed": 4} | options
    run, weight = method(model, layer, forward), layer.weight(model)
    return np.concatenate(list(perturbed_losses(run, layer, weight, x[samples], y[samples], loss, **options)))


NAMES = ["0.weight", "3.weight", "5.weight"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [Substitution, Loop])
def test_losses_and_entropies_equal_the_direct_way(problem, name, method):
    model, x, y = problem
    shape = model.get_parameter(name).shape
    noise = torch.stack([torch.randn(shape, generator=generator(4, "select-layer", name, j)) for j in range(20)]).double()
    wanted, entropies = reference.direct_entropy_score(model, name, cross_entropy, x, y, noise, sigma=0.5)
    found = losses(problem, name, method=method)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([kde_entropy(column) for column in found.T], entropies, atol=BINNING)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_draws_in_one_pass_do_not_matter(problem, name, at_once):
    np.testing.assert_allclose(losses(problem, name, at_once=at_once), losses(problem, name), rtol=1e-12, atol=1e-12)


def test_more_draws_are_the_same_ones_and_some(problem):
    np.testing.assert_allclose(losses(problem, "3.weight", draws=30)[:20], losses(problem, "3.weight"), rtol=1e-12, atol=1e-12)


def test_all_samples_see_the_same_draws(problem):
    alone = np.concatenate([losses(problem, "3.weight", samples=slice(i, i + 1)) for i in range(6)], axis=1)
    np.testing.assert_allclose(losses(problem, "3.weight"), alone, rtol=1e-12, atol=1e-12)


def test_layers_see_draws_of_their_own():
    """Two layers of one shape and one weight: with the same noise their losses would be one."""
    layer = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(layer, nn.Linear(3, 3, bias=False)).requires_grad_(False)
    model[1].weight.copy_(layer.weight)
    problem = model, torch.eye(3), torch.arange(3)
    first, second = losses(problem, "0.weight"), losses(problem, "1.weight")
    assert np.abs(first - second).max() > 0.01


def test_no_noise_gives_the_base_loss(problem):
    model, x, y = problem
    base = cross_entropy(model(x), y).numpy()
    np.testing.assert_allclose(losses(problem, "3.weight", sigma=0.0), np.tile(base, (20, 1)), rtol=1e-12)


def test_a_single_number_has_no_spread_to_scale_by():
    """Its standard deviation is undefined; it is left as it is, rather than turned into nan."""
    problem = nn.Linear(1, 1).requires_grad_(False), torch.ones(2, 1), torch.zeros(2, 1)
    assert np.isfinite(losses(problem, "weight", loss=lambda output, y: (output - y).square().flatten())).all()
