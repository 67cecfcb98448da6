"""The variance of a regression's residuals: the likeliest, however little or much there is to go by."""

import math

import numpy as np
import pytest
import torch
from gathering import MEMBERS, ROUNDING, Numbers, figures, gathered
from overfitters import random

from stages.evaluation.metrics import Residuals


def residuals(members, y, batch=13):
    found = Residuals()
    for start in range(0, len(y), batch):
        part = members[:, start : start + batch]
        found.add(part, part.mean(0), y[start : start + batch])
    return found


def loss_of(variance, members, y):
    """Minus twice the mean log-likelihood, but for a constant."""
    total = members.numpy().var(0) + variance
    return np.mean(np.log(total) + (y.numpy() - members.numpy().mean(0)) ** 2 / total)


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_the_variance_is_the_likeliest(noise, shape):
    members = random(MEMBERS, 300, *shape) * random(1, 300, *shape, seed=3)
    y = members.mean(0) + noise * random(300, *shape, seed=1) + members.std(0) * random(300, *shape, seed=2)
    found = residuals(members, y).variance()
    grid = np.exp(np.linspace(-10, 5, 3001))
    wanted = grid[np.argmin([loss_of(variance, members, y) for variance in grid])]
    # The grid's own step.
    assert found == pytest.approx(wanted, rel=0.006)
    assert all(loss_of(found, members, y) <= loss_of(found * factor, members, y) for factor in (0.99, 1.01))


def test_the_variance_of_one_member_is_the_mean_square():
    members, y = random(1, 300), random(300, seed=1)
    assert residuals(members, y).variance() == pytest.approx(float((y - members[0]).square().mean()), rel=ROUNDING)


def test_the_variance_of_a_simulation_is_found():
    """Residuals N(0, 0.7 + v_i) with v_i from 0.1 to 10."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.linspace(math.log(0.1), math.log(10), 20_000, dtype=torch.float64).exp()
    # Two members at ± sqrt(v) have mean 0 and variance v.
    members = torch.stack([spread.sqrt(), -spread.sqrt()])
    y = torch.randn(20_000, generator=draw, dtype=torch.float64) * (0.7 + spread).sqrt()
    # Its standard error is sqrt(2 / Σ 1/(0.7 + v)²) = 0.012.
    assert residuals(members, y).variance() == pytest.approx(0.7, abs=0.05)


def test_members_that_vary_more_than_they_err_leave_next_to_nothing():
    members, y = 10 * random(MEMBERS, 300), random(300, seed=1)
    y = members.mean(0) + y
    assert residuals(members, y).variance() < 1e-4


def test_without_errors_the_variance_is_small_but_above_zero():
    members = random(1, 300)
    assert residuals(members, members[0].clone()).variance() == pytest.approx(1e-12)
    # A likelihood can then still be had.
    found = figures(gathered(Numbers(), members, members[0].clone(), variance=1e-12))
    assert math.isfinite(found["log_likelihood"])


def test_wide_outputs_are_thinned_evenly():
    """The residual of each number is its place."""
    members, y = torch.zeros(1, 4, 1000), torch.arange(1000.0).expand(4, -1)
    found = residuals(members, y)
    kept = found.parts[0][0]
    assert kept.shape[1] <= Residuals.most_numbers
    assert kept[0].diff().unique().tolist() == [4.0]
    # Every fourth of 0 … 999.
    assert found.variance() == pytest.approx(float(torch.arange(0.0, 1000, 4).square().mean()), rel=1e-6)


def test_no_variance_without_residuals():
    found = Residuals()
    assert found.variance() is None
    found.add(random(2, 5, 3), random(5, 3), random(5, 2))
    assert found.variance() is None
