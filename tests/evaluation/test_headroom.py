"""What a probe says of its trials, from estimates made by hand."""

import numpy as np
import pytest

from stages.evaluation.headroom import Trial, headroom
from stages.evaluation.rows import BASE, BLENDED, MEAN_DELTA, NEAREST, NEAREST_INPUT, ORACLE
from stages.evaluation.statistics import Estimate

# Of the difference to a row of no width itself: 95 % lie within ± 0.01.
NARROW, WIDE = 0.01, 0.3
SAMPLES = 10**6


def estimate(value, width=0.0, samples=SAMPLES):
    """Draws around a value, of which the middle 95 % are ± `width` wide."""
    return Estimate(value, width / 2, value + width * np.linspace(-1, 1, 4001) / 0.95, samples)


def trial(layer="fc.weight", *, lr=0.1, width=NARROW, **losses):
    """Losses of base, oracle, mean delta and neighbours; every difference to the base is ± `width` wide."""
    names = {"base": BASE, "oracle": ORACLE, "mean": MEAN_DELTA}
    names |= {"nearest": NEAREST, "nearest_input": NEAREST_INPUT, "blended": BLENDED}
    rows = {"base": 0.5, "oracle": 0.1, "mean": 0.49, "nearest": 0.5, **losses}
    # The others have none of their own, so that no doubt cancels another.
    losses = {names[key]: estimate(value, width if key == "base" else 0) for key, value in rows.items()}
    return Trial(layer, {"lr": lr, "steps": 3}, "mse", losses)


def test_gains_are_told_by_the_paired_interval():
    found = trial(nearest=0.48)
    assert found.gains(NEAREST, BASE)
    assert not found.gains(BASE, NEAREST)
    assert not trial(nearest=0.48, width=WIDE).gains(NEAREST, BASE)
    assert not found.gains(BASE, BASE)


def test_the_better_neighbour_of_a_trial():
    assert trial(nearest=0.4, nearest_input=0.3).neighbour == NEAREST_INPUT
    assert trial(nearest=0.2, nearest_input=0.3).neighbour == NEAREST
    assert trial(nearest=0.2).neighbour == NEAREST
    assert trial(nearest=0.4, nearest_input=0.3, blended=0.2).neighbour == BLENDED


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ({"nearest": 0.3}, True),
        ({"nearest": 0.6, "nearest_input": 0.3}, True),
        ({"nearest": 0.3, "mean": 0.301}, True),
        ({"nearest": 0.5}, False),
        # No better than what all samples could be given.
        ({"nearest": 0.3, "mean": 0.3}, False),
        # Better than that, but not than the base.
        ({"nearest": 0.5, "mean": 0.7}, False),
        ({"nearest": 0.3, "width": WIDE}, False),
    ],
)
def test_a_trial_gains_by_x(losses, found):
    assert trial(**losses).gains_by_x is found


def test_no_headroom():
    found = headroom([trial("a.weight", oracle=0.5), trial("b.weight", oracle=0.495)])
    assert (found["headroom"], found["start_with"]) == ("none", {})
    # The best of them is spoken of.
    assert found["verdict"].startswith("no headroom: mse 0.5000, 0.4950 with the deltas of the true labels")


def test_headroom_that_is_too_noisy_is_none():
    assert headroom([trial(oracle=0.4, width=WIDE)])["headroom"] == "none"


def test_headroom_that_only_labels_reach():
    found = headroom([trial("a.weight", oracle=0.3), trial("b.weight", lr=0.2, oracle=0.2), trial("c.weight", oracle=0.5)])
    assert found["headroom"] == "labels"
    assert found["start_with"] == {}
    # Of layers whose neighbours do alike, the first: no setting is put forward.
    assert found["verdict"].startswith("no headroom for x in sight: on a.weight mse 0.5000, 0.3000 with the deltas of the true")
    assert f"0.5000 with those of the {NEAREST}: not beyond chance" in found["verdict"]


def test_headroom_for_x():
    """The layer whose neighbour does best, not the one that labels do most for."""
    trials = [
        trial("a.weight", oracle=0.01),
        trial("b.weight", lr=0.3, oracle=0.2, nearest=0.6, nearest_input=0.25),
        trial("c.weight", oracle=0.1, nearest=0.3),
    ]
    found = headroom(trials)
    assert found["headroom"] == "x"
    assert found["start_with"] == {"select-layer.layer": "b.weight", "collect.lr": 0.3, "collect.steps": 3}
    assert found["verdict"] == (
        f"headroom for x: on b.weight the delta of the {NEAREST_INPUT} takes mse from 0.5000 to 0.2500, the true label's to "
        "0.2000; start with this layer and these settings"
    )
    assert headroom(trials[::-1]) == found


def test_a_neighbour_that_gains_over_the_base_alone_is_no_headroom_for_x():
    assert headroom([trial(nearest=0.3, mean=0.3)])["headroom"] == "labels"
