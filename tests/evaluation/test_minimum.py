"""The search for the minimum of a function of one number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.evaluation.statistics import minimum


@given(place=st.floats(-3, 5), power=st.sampled_from([1.0, 1.5, 2.0]), lean=st.floats(0.2, 5))
def test_minimum_of_convex_functions(place, power, lean):
    """Steeper on one side than on the other, with or without a kink."""

    def function(at):
        return (at - place) ** power if at > place else lean * (place - at) ** power

    # Within 1e-6 of a parabola's minimum its values differ by 1e-12, which float64 tells apart.
    assert minimum(function, -4, 6) == pytest.approx(place, abs=1e-6)


def test_a_minimum_at_an_end():
    # 60 steps leave 0.618^60 = 3e-13 of the width.
    assert minimum(lambda at: at, 2, 7) == pytest.approx(2, abs=1e-10)
    assert minimum(lambda at: -at, 2, 7) == pytest.approx(7, abs=1e-10)


def test_minimum_asks_once_a_step():
    asked = []
    minimum(lambda at: asked.append(at) or (at - 1) ** 2, 0, 3, steps=10)
    assert len(asked) == 12
    assert all(0 < at < 3 for at in asked)


def test_minimum_of_a_likelihood_equals_a_fine_grid():
    """As temperature and variance are fitted: over a logarithm."""
    squared = np.random.default_rng(0).normal(0, 2, 500) ** 2

    def loss(logarithm):
        return float(np.mean(logarithm + squared / np.exp(logarithm)))

    # Its minimum is known: the mean square.
    assert np.exp(minimum(loss, -5, 8)) == pytest.approx(squared.mean(), rel=1e-6)
    grid = np.linspace(-5, 8, 2001)
    assert minimum(loss, -5, 8) == pytest.approx(grid[np.argmin([loss(at) for at in grid])], abs=13 / 2000)
