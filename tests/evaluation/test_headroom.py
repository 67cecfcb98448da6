"""What a probe chooses and says, from losses and estimates made by hand."""

import dataclasses

import numpy as np
import pytest

from stages.evaluation.choosing import CHOSEN, LABELS, NEIGHBOURS, Trial, choice_of, choose, gains, may_gain
from stages.evaluation.comparison import Fitted, favoured
from stages.evaluation.headroom import headroom, headroom_of, starting_point
from stages.evaluation.rows import BASE, BLENDED, MEAN_DELTA, NEAREST, NEAREST_INPUT, ORACLE
from stages.evaluation.statistics import Estimate, Mean, estimates, interval_of_mean

# Of the difference to a row of no width itself: 95 % lie within ± 0.01.
NARROW, WIDE = 0.01, 0.3
NAMES = {"base": BASE, "labels": ORACLE, "mean": MEAN_DELTA}
NAMES |= {"nearest": NEAREST, "nearest_input": NEAREST_INPUT, "blended": BLENDED}
SAMPLES, MORE = 400, "look at more"


def estimate(value, width=0.0):
    """Draws around a value, of which the middle 95 % are ± `width` wide."""
    return Estimate(value, width / 2, value + width * np.linspace(-1, 1, 4001) / 0.95, 10**6)


def trial(layer="fc.weight", *, lr=0.1, width=NARROW, samples=SAMPLES, first=None, **losses):
    """A trial whose rows have the same loss on every sample, but for the base: each difference to it is ± `width` wide. `first`
    are rows whose loss is another one on the first half."""
    spread = width / 2 * samples**0.5 * (-1.0) ** np.arange(samples)
    rows = {"base": 0.5, "labels": 0.1, "mean": 0.5, "nearest": 0.5, **losses}
    values = {NAMES[key]: np.full(samples, value) + (spread if key == "base" else 0) for key, value in rows.items()}
    for key, value in (first or {}).items():
        values[NAMES[key]][: samples // 2] = value
    found = estimates({name: Mean(losses) for name, losses in values.items()}, samples, 500, np.random.default_rng(0))
    halves = {name: tuple({1.0: half} for half in np.split(losses, 2)) for name, losses in values.items()}
    return Trial(layer, {"optimizer": "sgd", "lr": lr, "steps": 3}, "mse", found, halves)


def said(*trials, **options):
    """The verdict over trials."""
    return headroom(trials, choose(trials, 500, np.random.default_rng(0)), more=MORE, **options)


# Rules


@pytest.mark.parametrize(
    ("losses", "open_to", "found"),
    [
        ({NEIGHBOURS: 0.3}, (), "x"),
        ({NEIGHBOURS: 0.3}, (NEIGHBOURS, LABELS), "x"),
        # Neighbours may do more than the labels: these are a reference.
        ({NEIGHBOURS: 0.3, LABELS: 0.5}, (), "x"),
        # No more than one delta for all.
        ({NEIGHBOURS: 0.3, MEAN_DELTA: 0.3}, (NEIGHBOURS,), "labels"),
        ({NEIGHBOURS: 0.3, MEAN_DELTA: 0.3, LABELS: 0.5}, (), "none"),
        # A larger loss is no gain, however sure.
        ({NEIGHBOURS: 0.7, MEAN_DELTA: 0.8}, (), "labels"),
        ({}, (), "labels"),
        ({}, (LABELS,), "labels"),
        ({}, (NEIGHBOURS,), "unknown"),
        ({LABELS: 0.5}, (), "none"),
        ({LABELS: 0.5}, (LABELS,), "unknown"),
        ({LABELS: 0.5}, (NEIGHBOURS,), "unknown"),
        ({NEIGHBOURS: 0.3, LABELS: 0.3, "width": WIDE}, (), "none"),
        ({NEIGHBOURS: 0.3, LABELS: 0.3, "width": WIDE}, (NEIGHBOURS, LABELS), "unknown"),
    ],
)
def test_rules(losses, open_to, found):
    values = {NEIGHBOURS: 0.5, MEAN_DELTA: 0.5, LABELS: 0.1} | losses
    width = values.pop("width", NARROW)
    made = {name: estimate(value) for name, value in values.items()} | {BASE: estimate(0.5, width)}
    assert headroom_of(made, open_to) == found


def test_a_loss_that_is_not_finite_is_no_gain():
    """Also where resamples without the one bad sample seem to have one."""
    draws = np.append(np.full(100, 0.1), np.inf)
    for value in (np.inf, np.nan):
        assert not gains({BASE: Estimate(0.5, 0.0, np.full(101, 0.5), 100), LABELS: Estimate(value, 0.0, draws, 100)}, LABELS)


# Choosing


def test_each_half_is_looked_at_with_what_the_other_favours():
    """On the first half a neighbour seems to do wonders, which it does not on the second."""
    trials = [trial("a.weight", nearest=0.6, first={"nearest": 0.1}), trial("b.weight", nearest=0.45)]
    assert [choice_of(trials, CHOSEN[NEIGHBOURS], [half]).trial.layer for half in (0, 1)] == ["a.weight", "b.weight"]
    found = choose(trials, 500, np.random.default_rng(0))[NEIGHBOURS]
    assert [choice.trial.layer for choice in found.choices] == ["a.weight", "b.weight"]
    # The second half as the first one chose, and the other way round.
    assert found.loss.value == pytest.approx((0.6 + 0.45) / 2)


def test_a_sure_gain_is_favoured_over_a_large_one():
    """Ten samples of a hundred gain much and seven lose more, or all gain a little: the latter, whatever the means."""
    base = np.full(100, 1.0)
    lucky, sure = base.copy(), base - 0.05
    lucky[:10], lucky[10:17] = -1.0, 3.0
    lucky -= 0.02
    assert lucky.mean() < sure.mean()
    assert favoured([base, lucky, sure], base) == 2
    assert favoured([lucky], base) == 0


def test_of_what_does_as_well_the_gentlest_is_favoured():
    base, draw = np.full(100, 1.0), np.random.default_rng(0)
    gentle, less = base - 0.09 + 0.01 * draw.normal(size=100), base - 0.04
    harsh = base - 0.1 + 0.2 * draw.normal(size=100)
    assert favoured([base, harsh, gentle, less], base) == 2
    assert favoured([base, base - 0.1, gentle, less], base) == 1


def test_where_no_gain_is_sure_the_base_is_favoured():
    noisy = 1 - np.random.default_rng(0).normal(0.01, 1.0, size=50)
    assert favoured([np.full(50, 1.0), noisy, np.full(50, np.inf), np.full(50, np.nan)], np.full(50, 1.0)) == 0


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"nearest": 0.5}, False),
        ({"nearest": 0.49}, False),
        # As wide as a gain of a tenth.
        ({"nearest": 0.47, "width": 0.04}, True),
        ({"nearest": 0.49, "width": 0.03}, False),
        # Worse than the base, whatever the width.
        ({"nearest": 0.55, "width": WIDE}, False),
        ({"nearest": 0.55, "nearest_input": 0.48, "width": WIDE}, True),
        ({"nearest": np.nan}, True),
    ],
)
def test_a_gain_that_is_not_excluded(values, found):
    assert (
        may_gain([trial(nearest_input=0.5) if "nearest_input" in values else trial(), trial(**values)], CHOSEN[NEIGHBOURS])
        is found
    )


def test_students_interval_of_a_mean():
    low, high = interval_of_mean(np.arange(11.0))
    # t of ten degrees is 2.228; s / sqrt(11) is 1.
    assert (low, high) == pytest.approx((5 - 2.228, 5 + 2.228), abs=1e-3)
    assert interval_of_mean(np.array([1.0])) == interval_of_mean(np.array([1.0, np.inf])) == (-np.inf, np.inf)


# Where to start


def test_the_better_neighbour_of_a_trial():
    assert trial(nearest=0.4, nearest_input=0.3).neighbour == NEAREST_INPUT
    assert trial(nearest=0.2, nearest_input=0.3).neighbour == NEAREST
    assert trial(nearest=0.4, nearest_input=0.3, blended=0.2).neighbour == BLENDED


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ({"nearest": 0.3}, True),
        ({"nearest": 0.6, "nearest_input": 0.3}, True),
        ({"nearest": 0.3, "mean": 0.301}, True),
        ({"nearest": 0.5}, False),
        ({"nearest": 0.3, "mean": 0.3}, False),
        # Better than the mean delta, but not than the base.
        ({"nearest": 0.5, "mean": 0.7}, False),
        ({"nearest": 0.3, "width": WIDE}, False),
    ],
)
def test_a_trial_gains_by_x(losses, found):
    assert trial(**losses).gains_by_x is found


def test_it_starts_where_neighbours_do_best_and_as_gently_as_does_as_well():
    harsh, gentle = trial("b.weight", lr=0.3, labels=0.1, nearest=0.25), trial("b.weight", lr=0.2, labels=0.2, nearest=0.25)
    assert starting_point([harsh, gentle]) is starting_point([gentle, harsh]) is gentle
    assert starting_point([harsh, harsh]) is harsh
    other = trial("c.weight", labels=0.01, nearest=0.3)
    assert starting_point([other, gentle]) is starting_point([gentle, other]) is gentle
    weak = trial("b.weight", lr=0.1, labels=0.3, nearest=0.4)
    assert starting_point([weak, harsh]) is harsh


def test_it_starts_with_what_the_halves_have_chosen():
    """Settings that do as well on all samples, and that no half has chosen, are none to start with."""
    found = said(trial(labels=0.1, nearest=0.25), trial(lr=0.05, labels=0.3, nearest=0.2505))
    favoured = [one["settings"]["lr"] for one in found["chosen"]["neighbours"]["favoured"]]
    assert found["start_with"]["collect.lr"] in favoured


# What is said


def test_headroom_for_x():
    found = said(trial("a.weight"), trial("b.weight", lr=0.3, labels=0.2, nearest=0.6, nearest_input=0.25))
    assert found["headroom"] == "x"
    assert found["start_with"] == {
        "select-layer.layer": "b.weight",
        "collect.optimizer": "sgd",
        "collect.lr": 0.3,
        "collect.steps": 3,
    }
    text = found["verdict"]
    assert text.startswith(
        "headroom for x: with the deltas of nearest training samples mse goes from 0.5 to 0.25 (-0.25, 95 % in"
    )
    assert "with one mean delta for all to 0.5; for reference, with the deltas of the true labels to 0.1 (-0.4, " in text
    assert text.endswith("; start with b.weight and sgd 0.3 × 3")
    assert found["chosen"]["neighbours"]["mean"] == pytest.approx(0.25)
    assert [one["row"] for one in found["chosen"]["neighbours"]["favoured"]] == [NEAREST_INPUT] * 2


def test_halves_that_favour_different_layers_are_told_of():
    found = said(trial("fc1.weight", nearest=0.3, first={"nearest": 0.2}), trial("fc2.weight", nearest=0.25))
    assert found["headroom"] == "x"
    assert found["verdict"].endswith(
        "; the layer is not certain: half of the samples favours fc1.weight, the other half fc2.weight"
    )


def test_what_is_lucky_on_its_own_half_is_no_headroom():
    found = said(*(trial(f"{n}.weight", nearest=0.6, first={"nearest": 0.4}) for n in "ab"), trial("c.weight"))
    assert found["headroom"] == "labels"
    assert found["chosen"]["neighbours"]["mean"] > 0.5


def test_headroom_that_only_labels_reach():
    found = said(trial("a.weight", labels=0.3), trial("b.weight", labels=0.2))
    assert (found["headroom"], found["start_with"]) == ("labels", {})
    text = found["verdict"]
    assert text.startswith(
        "no headroom for x in sight: with the deltas of the true labels mse goes from 0.5 to 0.2 (-0.3, 95 %"
    )
    assert "with those of nearest training samples to 0.5 (" in text
    assert text.endswith(", no gain beyond chance")
    same = said(trial(nearest=0.3, mean=0.3))
    assert same["headroom"] == "labels"
    assert same["verdict"].endswith("; one mean delta for all does as well (0.3)")
    assert said(trial(nearest=0.3, mean=0.2))["verdict"].endswith("; one mean delta for all does better (0.2)")


def test_no_headroom():
    found = said(trial("a.weight", labels=0.5), trial("b.weight", labels=0.496))
    assert (found["headroom"], found["start_with"]) == ("none", {})
    assert found["verdict"].startswith("no headroom: with the deltas of the true labels mse goes from 0.5 to 0.496 (")
    assert found["verdict"].endswith("; a larger collect.lr or more collect.steps may show some")


def test_too_few_samples():
    found = said(trial(nearest=0.4, width=WIDE, samples=12))
    assert (found["headroom"], found["start_with"]) == ("unknown", {})
    assert found["verdict"].startswith("too few samples to tell: with the deltas of the true labels mse goes from 0.5 to 0.1")
    assert found["verdict"].endswith(f"; with 12 samples a gain of 10 % may be missed; {MORE}")


def test_neighbours_that_are_best_left_alone():
    made = trial(nearest=0.6)
    halves = {name: tuple({0.0: half[1.0] * 0 + 0.5, **half} for half in both) for name, both in made.halves.items()}
    halves[BASE] = tuple({1.0: half[0.0]} for half in halves[BASE])
    found = said(dataclasses.replace(made, halves=halves))
    assert "training samples to 0.5 (no strength is sure to gain), no gain beyond chance" in found["verdict"]


@pytest.mark.parametrize("values", [{}, {"labels": 0.5}, {"width": WIDE, "nearest": 0.4}])
def test_of_samples_that_the_base_was_trained_on_no_headroom_is_no_finding(values):
    found = said(trial(**values), seen=True)
    assert (found["headroom"], found["start_with"]) == ("unknown", {})
    assert found["verdict"] == "no finding: the base was probably trained on these samples"


def test_of_such_samples_a_gain_is_a_finding_with_a_caveat():
    found = said(trial(nearest=0.3), seen=True)
    assert found["headroom"] == "x"
    assert found["verdict"].endswith("; the base was probably trained on these samples: on others the gain may be another")


def test_rivals_have_the_strength_that_suits_them_best():
    """What OCD has to beat is not held back for want of certainty; what is to predict is."""
    draw = np.random.default_rng(0)
    base = 1 + draw.exponential(1, 60)
    losses = {0.0: base, 1.0: base - 0.20 + draw.normal(0, 0.1, 60), 2.0: base - 0.25 + draw.normal(0, 0.9, 60)}
    losses[2.0] -= losses[2.0].mean() - losses[1.0].mean() + 0.05
    assert Fitted.of(losses, as_is=False).strength == 2.0
    # The larger one is less than its standard error, 0.12, better.
    assert Fitted.of(losses).strength == 1.0
    assert Fitted.of(losses | {2.0: base - 0.6}).strength == 2.0
    assert Fitted.of(losses | {2.0: np.full(60, np.inf)}).strength == 1.0
    assert Fitted.of({0.0: base, 0.5: base - 0.3, 1.0: base + 0.3}).strength == 0.5
    # Where nothing is better than the base, nothing is what is taken.
    assert Fitted.of({0.0: base, 1.0: base + 0.01 + draw.normal(0, 0.001, 60)}).strength == 0
    assert Fitted.of(losses).losses[0.0] == pytest.approx(base.mean())
