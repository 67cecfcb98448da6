"""Figures over samples and their bootstrap: against scikit-learn, plain loops and what the theory says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from stages.evaluation.statistics import (
    RESAMPLES_AT_ONCE,
    Auroc,
    CalibrationError,
    Estimate,
    Mean,
    RootMean,
    estimates,
    interval_of,
    resample_weights,
    student,
)

# Sums in another order, in float64.
ROUNDING = 1e-12


def resampled(samples, resamples, seed=0):
    return np.concatenate(list(resample_weights(samples, resamples, np.random.default_rng(seed))))


def indices_of(weights):
    """The samples of one resample, each as often as it was drawn."""
    return np.repeat(np.arange(len(weights)), np.rint(weights * len(weights)).astype(int))


def whole(samples):
    return np.full((1, samples), 1 / samples)


def calibration_error(confidence, correct, bins):
    """Guo et al., 2017, Eq. 3, as it reads: |B_b|/n · |acc(B_b) − conf(B_b)| over bins ((b − 1)/bins, b/bins]."""
    total = 0.0
    for b in range(1, bins + 1):
        held = [(c, r) for c, r in zip(confidence, correct, strict=True) if (b - 1) / bins < c <= b / bins]
        if held:
            accuracy, mean = sum(r for _, r in held) / len(held), sum(c for c, _ in held) / len(held)
            total += len(held) / len(confidence) * abs(accuracy - mean)
    return total


# name: values of 60 samples to a statistic, and to the figure of any of them.
FIGURES = {
    "mean": (Mean, lambda v: v.mean()),
    "root mean": (lambda v: RootMean(np.abs(v)), lambda v: np.sqrt(np.abs(v).mean())),
    "calibration error": (
        lambda v: CalibrationError.of(1 / (1 + np.exp(-v))[:, None], (v > 0.3)[:, None].astype(float), 10),
        lambda v: calibration_error(1 / (1 + np.exp(-v)), v > 0.3, 10),
    ),
    "area": (lambda v: Auroc(np.round(v, 1), np.sin(9 * v) > 0), lambda v: roc_auc_score(np.sin(9 * v) > 0, np.round(v, 1))),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_resample_counts_a_sample_as_often_as_it_was_drawn(name):
    """The weighted figure is the plain figure of the samples written out."""
    make, plain = FIGURES[name]
    values = np.random.default_rng(0).normal(size=60)
    weights = np.concatenate([whole(60), resampled(60, 30)])
    wanted = [plain(values[indices_of(row)]) for row in weights]
    np.testing.assert_allclose(make(values)(weights), wanted, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", FIGURES)
def test_the_order_of_samples_does_not_matter(name):
    make, _ = FIGURES[name]
    values, order = np.random.default_rng(0).normal(size=60), np.random.default_rng(1).permutation(60)
    weights = resampled(60, 5)
    np.testing.assert_allclose(make(values[order])(weights[:, order]), make(values)(weights), rtol=ROUNDING, atol=ROUNDING)


def test_standard_error_of_a_mean():
    values = np.array([1.0, 2.0, 4.0])
    # s² = (16 + 1 + 25)/9 / 2 = 7/3, over three samples.
    assert Mean(values).standard_error(np.zeros(5)) == pytest.approx(math.sqrt(7) / 3, abs=ROUNDING)
    assert math.isnan(Mean(values[:1]).standard_error(np.zeros(5)))


@pytest.mark.parametrize("name", ["root mean", "calibration error", "area"])
def test_standard_error_of_other_figures_is_the_spread_of_their_draws(name):
    make, _ = FIGURES[name]
    statistic = make(np.random.default_rng(0).normal(size=60))
    # s² = (1 + 0 + 1)/2; a draw without a value counts for nothing.
    assert statistic.standard_error(np.array([1.0, np.nan, 2.0, 3.0])) == pytest.approx(1, abs=ROUNDING)
    assert math.isnan(statistic.standard_error(np.array([np.nan, 2.0])))


def test_the_spread_of_a_means_draws_is_near_its_standard_error():
    values = np.random.default_rng(0).exponential(size=400)
    found = estimates({"v": Mean(values)}, 400, 2000, np.random.default_rng(1))["v"]
    # The spread of 2,000 draws is good to 1/sqrt(4000) = 1.6 %.
    assert found.draws.std() == pytest.approx(found.standard_error, rel=0.08)


# Calibration


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("predictions", [1, 4])
def test_calibration_error_equals_the_loop_over_bins(bins, predictions):
    draw = np.random.default_rng(bins)
    confidence, correct = draw.uniform(0, 1, (50, predictions)), draw.integers(0, 2, (50, predictions)).astype(float)
    found = CalibrationError.of(confidence, correct, bins)(whole(50))
    wanted = calibration_error(confidence.ravel(), correct.ravel(), bins)
    np.testing.assert_allclose(found, [wanted], rtol=ROUNDING)


def test_calibration_error_at_the_ends_of_the_scale():
    confidence, correct = np.array([[1.0], [0.0], [0.5]]), np.array([[1.0], [1.0], [0.0]])
    # Bins [0, 1/2] and (1/2, 1]: |0 − 1 + 0.5 − 0|/3 in the first, 0 in the second.
    assert CalibrationError.of(confidence, correct, 2)(whole(3)) == pytest.approx(0.5 / 3, abs=ROUNDING)


def test_calibration_error_of_the_sure():
    sure = np.ones((20, 1))
    assert CalibrationError.of(sure, sure)(whole(20)) == 0
    assert CalibrationError.of(sure, 0 * sure)(whole(20)) == pytest.approx(1, abs=ROUNDING)


def test_the_calibrated_have_little_calibration_error():
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.2, 1, (50_000, 1))
    right = (draw.uniform(size=(50_000, 1)) < confidence).astype(float)
    # Each of 12 bins errs by 0.4/sqrt(4,200) = 0.006 of chance.
    assert CalibrationError.of(confidence, right)(whole(50_000)) < 0.01
    assert CalibrationError.of(confidence, (confidence > 0.5).astype(float))(whole(50_000)) > 0.2


# The area under the ROC curve

SCORES = {
    "all different": lambda draw: draw.normal(size=80),
    "some ties": lambda draw: draw.integers(0, 6, 80).astype(float),
    "many ties": lambda draw: draw.integers(0, 2, 80).astype(float),
    "all equal": lambda draw: np.zeros(80),
    "large": lambda draw: draw.normal(size=80) * 1e12,
}


@pytest.mark.parametrize("name", SCORES)
def test_area_equals_scikit_learns(name):
    draw = np.random.default_rng(0)
    scores, positive = SCORES[name](draw), draw.uniform(size=80) < 0.3
    weights = np.concatenate([whole(80), resampled(80, 40), draw.dirichlet(np.ones(80), 5)])
    wanted = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(Auroc(scores, positive)(weights), wanted, rtol=ROUNDING)


@given(scores=st.lists(st.integers(0, 4), min_size=2, max_size=12), data=st.data())
def test_area_is_the_share_of_pairs_in_order(scores, data):
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    scores = np.array(scores, dtype=float)
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    found = Auroc(scores, positive)(whole(len(scores)))[0]
    if pairs:
        assert found == pytest.approx(np.mean(pairs), abs=ROUNDING)
    else:
        assert math.isnan(found)


def test_area_of_scores_turned_round_stretched_and_split():
    draw = np.random.default_rng(0)
    scores, positive, weights = draw.integers(0, 9, 60).astype(float), draw.uniform(size=60) < 0.5, resampled(60, 20)
    area = Auroc(scores, positive)(weights)
    np.testing.assert_allclose(Auroc(-scores, positive)(weights), 1 - area, rtol=ROUNDING)
    np.testing.assert_allclose(Auroc(scores, ~positive)(weights), 1 - area, rtol=ROUNDING)
    np.testing.assert_allclose(Auroc(np.exp(scores), positive)(weights), area, rtol=ROUNDING)
    np.testing.assert_allclose(Auroc(positive.astype(float), positive)(weights), 1, rtol=ROUNDING)


def test_a_resample_without_one_kind_has_no_area():
    found = Auroc(np.array([1.0, 2.0, 3.0]), np.array([True, False, False]))
    weights = np.array([[1, 1, 1], [0, 2, 1], [3, 0, 0], [1, 2, 0]]) / 3
    np.testing.assert_array_equal(np.isnan(found(weights)), [False, True, True, False])


# The bootstrap


@pytest.mark.parametrize("resamples", [1, RESAMPLES_AT_ONCE, 2 * RESAMPLES_AT_ONCE + 7])
@pytest.mark.parametrize("samples", [1, 2, 33])
def test_weights_are_counts_out_of_the_samples(samples, resamples):
    blocks = list(resample_weights(samples, resamples, np.random.default_rng(0)))
    assert max(map(len, blocks)) <= RESAMPLES_AT_ONCE
    found = np.concatenate(blocks)
    assert found.shape == (resamples, samples)
    counts = found * samples
    np.testing.assert_allclose(counts, np.rint(counts), atol=ROUNDING * samples)
    assert (np.rint(counts) >= 0).all()
    assert (np.rint(counts).sum(1) == samples).all()
    np.testing.assert_array_equal(found, resampled(samples, resamples))


def test_weights_are_those_of_drawing_with_replacement():
    counts = resampled(50, 4000, seed=3) * 50
    # Multinomial: mean 1, variance 1 − 1/50. A mean of 4,000 is good to 0.016, the variance of 200,000 to 0.004.
    assert np.abs(counts.mean(0) - 1).max() < 0.08
    assert counts.var() == pytest.approx(0.98, abs=0.02)
    # (1 − 1/50)^50 = 0.364 of the samples are left out.
    assert np.mean(counts == 0) == pytest.approx(0.364, abs=0.005)


def test_estimates_are_each_statistic_over_the_same_resamples():
    draw = np.random.default_rng(0)
    statistics = {name: make(draw.normal(size=60)) for name, (make, _) in FIGURES.items()}
    on_progress = []
    found = estimates(statistics, 60, 150, np.random.default_rng(5), on_progress.append)
    weights = resampled(60, 150, seed=5)
    assert found.keys() == statistics.keys()
    for name, statistic in statistics.items():
        assert found[name].value == pytest.approx(float(statistic(whole(60))[0]), abs=ROUNDING)
        np.testing.assert_allclose(found[name].draws, statistic(weights), rtol=ROUNDING, atol=ROUNDING)
        assert found[name].standard_error == pytest.approx(statistic.standard_error(found[name].draws), abs=ROUNDING)
    assert on_progress == [64, 128, 150]


def test_a_figure_does_not_depend_on_those_beside_it():
    values = np.random.default_rng(0).normal(size=(2, 30))
    alone = estimates({"a": Mean(values[0])}, 30, 100, np.random.default_rng(2))["a"]
    beside = estimates({"b": Mean(values[1]), "a": Mean(values[0])}, 30, 100, np.random.default_rng(2))["a"]
    np.testing.assert_array_equal(alone.draws, beside.draws)


def test_a_constant_shift_leaves_no_doubt():
    values = np.random.default_rng(0).normal(size=40) * 10
    found = estimates({"a": Mean(values), "b": Mean(values + 0.25)}, 40, 200, np.random.default_rng(0))
    difference, (low, high) = found["b"].minus(found["a"])
    assert difference == pytest.approx(0.25, abs=ROUNDING)
    assert (low, high) == pytest.approx((0.25, 0.25), abs=ROUNDING)
    # Unpaired, the interval would be some standard errors wide: 10/sqrt(40) each.
    assert np.ptp(interval_of(found["b"].draws, 40)) > 3


def test_the_difference_of_means_has_students_interval():
    draw = np.random.default_rng(3)
    a, b = draw.normal(0.3, 1, 200), draw.normal(0, 1, 200)
    found = estimates({"a": Mean(a), "b": Mean(b)}, 200, 4000, draw)
    (_, middle_95), (_, middle_99) = (found["a"].minus(found["b"], tail) for tail in (0.025, 0.005))
    mean, error = (a - b).mean(), (a - b).std(ddof=1) / 200**0.5
    assert middle_95 == pytest.approx((mean - 1.97196 * error, mean + 1.97196 * error), abs=1e-5)
    assert middle_99 == pytest.approx((mean - 2.60076 * error, mean + 2.60076 * error), abs=1e-5)
    # The percentiles of resamples lie there, too: of 4,000 draws the 2.5th is known to 0.04 standard errors.
    assert interval_of(found["a"].draws - found["b"].draws, 200) == pytest.approx(middle_95, abs=0.2 * error)


@pytest.mark.parametrize("samples", range(1, 6))
def test_means_of_a_handful_of_samples_have_no_interval(samples):
    values = np.arange(samples) / 10
    found = estimates({"a": Mean(values), "b": Mean(values + 1)}, samples, 100, np.random.default_rng(0))
    assert all(math.isnan(end) for end in found["b"].minus(found["a"])[1])


def test_minus_is_antisymmetric_and_without_difference_to_itself():
    draw = np.random.default_rng(0)
    a, b = (Estimate(float(draw.normal()), 0.1, draw.normal(size=100), 50) for _ in range(2))
    there, (low, high) = a.minus(b)
    back, interval = b.minus(a)
    assert (back, *interval) == pytest.approx((-there, -high, -low), abs=ROUNDING)
    assert a.minus(a) == (0, (0, 0))


def test_an_interval_holds_95_of_100_draws():
    # Of 0 … 1000 the 2.5th and 97.5th percentiles are 25 and 975.
    draws, many = np.random.default_rng(0).permutation(1001).astype(float), 10**9
    assert interval_of(draws, many) == pytest.approx((25, 975), abs=1e-5)
    assert interval_of(np.append(draws, [np.nan, np.inf]), many) == pytest.approx((25, 975), abs=1e-5)
    assert all(math.isnan(end) for end in interval_of(np.full(3, np.nan), many))


@pytest.mark.parametrize("samples", range(1, 6))
def test_no_percentiles_of_so_few_samples_are_an_interval(samples):
    """Two samples hold the truth between them in one of two experiments, whatever is made of their resamples."""
    draws = np.random.default_rng(0).normal(size=1000)
    assert all(math.isnan(end) for end in interval_of(draws, samples))
    assert interval_of(draws, 6)[0] < interval_of(draws, 60)[0]


@pytest.mark.parametrize(
    ("degrees", "middle_95", "middle_99"),
    [
        (1, 12.7062, 63.6567),
        (4, 2.7764, 4.6041),
        (11, 2.2010, 3.1058),
        (29, 2.0452, 2.7564),
        (100, 1.9840, 2.6259),
        (10**7, 1.95996, 2.57583),
    ],
)
def test_students_quantile_is_that_of_the_tables(degrees, middle_95, middle_99):
    # The tables have five digits.
    assert student(degrees) == pytest.approx(middle_95, rel=2e-5)
    assert student(degrees, 0.005) == pytest.approx(middle_99, rel=2e-5)


@pytest.mark.parametrize("samples", [8, 12, 30])
def test_an_interval_of_few_samples_is_as_wide_as_students(samples):
    draw, held, trials = np.random.default_rng(1), 0, 600
    for _ in range(trials):
        found = estimates({"a": Mean(draw.normal(1, 1, samples))}, samples, 600, draw)["a"]
        low, high = interval_of(found.draws, samples)
        held += low <= 1 <= high
    # 600 experiments leave 0.009 of chance; plain percentiles hold the truth in 0.88 of them with 8 samples.
    assert 0.93 < held / trials < 0.97


def test_the_interval_of_a_paired_difference_holds_the_truth_in_95_of_100_experiments():
    draw, held, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        shared = draw.normal(0, 3, 100)
        a, b = shared + draw.normal(0.5, 1, 100), shared + draw.exponential(1, 100)
        found = estimates({"a": Mean(a), "b": Mean(b)}, 100, 400, draw)
        low, high = found["a"].minus(found["b"])[1]
        # The means are 0.5 and 1.
        held += low <= -0.5 <= high
    # 400 experiments leave 0.011 of chance; percentiles of 100 samples are a little narrow, 0.94.
    assert 0.91 < held / trials < 0.98
