"""What a comparison and a probe say of themselves, from estimates made by hand."""

import numpy as np
import pytest

from stages.evaluation.headroom import Trial, headroom
from stages.evaluation.rows import (
    BASE,
    BLENDED,
    ENSEMBLE,
    MEAN_DELTA,
    NEAREST,
    NEAREST_INPUT,
    ORACLE,
    RANDOM_TRAINING,
    SHUFFLED,
    TEMPERATURE,
    VALIDATED,
)
from stages.evaluation.statistics import Estimate
from stages.evaluation.verdict import NEIGHBOURS, Comparison, as_json, compared_with, verdict

WORDS = ("helps", "does not help", "harms")
# Of the difference to a row of no width itself: 95 % lie within ± 0.01.
NARROW, WIDE = 0.01, 0.3
CLEAR = {BASE: 0.5, TEMPERATURE: 0.48, RANDOM_TRAINING: 0.49, SHUFFLED: 0.495}


SAMPLES = 10**6


def estimate(value, width=0.0, samples=SAMPLES):
    """Draws around a value, of which the middle 95 % are ± `width` wide."""
    return Estimate(value, width / 2, value + width * np.linspace(-1, 1, 4001) / 0.95, samples)


def said(ensemble, others, width=NARROW, **options):
    """The verdict on the ensemble's loss beside other rows' losses, which must hold just one of the words."""
    losses = {ENSEMBLE: estimate(ensemble, width)} | {name: estimate(value) for name, value in others.items()}
    found = verdict(compared_with(losses), losses, "cross-entropy", **options)
    held = [word for word in WORDS if word in found]
    assert len(held) == 1, found
    assert "\n" not in found
    return held[0], found


def test_a_comparison_is_the_paired_difference():
    shared = np.random.default_rng(0).normal(size=2000)
    base, ensemble = Estimate(0.5, 1.0, shared, SAMPLES), Estimate(0.4, 1.0, shared - 0.1, SAMPLES)
    found = compared_with({BASE: base, ENSEMBLE: ensemble})[BASE]
    assert (found.difference, *found.interval) == pytest.approx((-0.1, -0.1, -0.1))
    assert (found.favours, found.against) == (True, False)


@pytest.mark.parametrize(
    ("interval", "favours", "against"),
    [
        ((-0.2, -0.1), True, False),
        ((-0.2, 0.0), False, False),
        ((-0.2, 0.1), False, False),
        ((0.0, 0.1), False, False),
        ((0.1, 0.2), False, True),
        ((float("nan"), float("nan")), False, False),
    ],
)
def test_an_interval_is_on_a_side_only_as_a_whole(interval, favours, against):
    found = Comparison(sum(interval) / 2, interval)
    assert (found.favours, found.against) == (favours, against)


def test_what_is_compared():
    losses = {name: estimate(0.5) for name in (BASE, ENSEMBLE, TEMPERATURE, VALIDATED, ORACLE, NEAREST_INPUT, SHUFFLED)}
    assert list(compared_with(losses)) == [BASE, TEMPERATURE, SHUFFLED, NEAREST_INPUT]
    assert compared_with({BASE: estimate(0.5)}) == {}


def test_it_helps():
    word, found = said(0.4, CLEAR)
    assert word == "helps"
    assert found == (
        "OCD helps: cross-entropy 0.5000 → 0.4000, -0.1000 with a 95 % interval of [-0.1100, -0.0900]; "
        f"{TEMPERATURE}, {RANDOM_TRAINING} and {SHUFFLED} do less"
    )


@pytest.mark.parametrize("absent", [(TEMPERATURE,), (RANDOM_TRAINING,), (SHUFFLED,), (RANDOM_TRAINING, SHUFFLED)])
def test_a_gain_over_fewer_rows_than_needed_is_in_doubt(absent):
    word, found = said(0.4, {name: loss for name, loss in CLEAR.items() if name not in absent})
    assert word == "does not help"
    assert f"there is no {' and '.join(absent)} to compare with; cross-entropy 0.5000 → 0.4000" in found


def test_without_classes_there_is_no_temperature_to_miss():
    others = {name: loss for name, loss in CLEAR.items() if name != TEMPERATURE}
    word, found = said(0.4, others, classes=False)
    assert word == "helps"
    assert found.endswith(f"; {RANDOM_TRAINING} and {SHUFFLED} do less")
    assert said(0.4, {BASE: 0.5, SHUFFLED: 0.49}, classes=False)[0] == "does not help"


@pytest.mark.parametrize("others", [CLEAR, {**CLEAR, TEMPERATURE: 0.3}, {BASE: 0.5}])
def test_it_harms(others):
    """Whatever the rivals do."""
    word, found = said(0.6, others)
    assert word == "harms"
    assert found.startswith("OCD harms: cross-entropy 0.5000 → 0.6000, +0.1000 with a 95 % interval of [+0.0900, +0.1100]")


@pytest.mark.parametrize("ensemble", [0.45, 0.5, 0.55])
def test_it_does_not_help_where_there_is_no_difference(ensemble):
    word, found = said(ensemble, CLEAR, WIDE)
    assert word == "does not help"
    assert "is no difference" in found
    assert f"0.5000 → {ensemble:.4f}" in found


@pytest.mark.parametrize("rival", [TEMPERATURE, RANDOM_TRAINING, SHUFFLED])
@pytest.mark.parametrize("loss", [0.3, 0.395, 0.405])
def test_the_gain_is_a_rivals(rival, loss):
    """The rival is better, or as good to within the interval."""
    word, found = said(0.4, {**CLEAR, rival: loss})
    assert word == "does not help"
    assert f"the gain is that of {rival} ({loss:.4f})" in found


def test_of_several_rivals_the_best_is_named():
    _, found = said(0.4, {**CLEAR, TEMPERATURE: 0.405, SHUFFLED: 0.395})
    assert f"the gain is that of {SHUFFLED} (0.3950)" in found
    assert TEMPERATURE not in found


@pytest.mark.parametrize("rival", [TEMPERATURE, RANDOM_TRAINING, SHUFFLED])
def test_too_few_samples_to_tell(rival):
    """The rival has no gain of its own, but its difference to the ensemble is too noisy."""
    losses = {ENSEMBLE: estimate(0.4, NARROW)} | {name: estimate(value) for name, value in CLEAR.items()}
    losses[rival] = estimate(0.51, WIDE)
    found = verdict(compared_with(losses), losses, "mse")
    assert [word for word in WORDS if word in found] == ["does not help"]
    assert f"too few samples to tell it from {rival} (0.5100); mse 0.5000 → 0.4000" in found


@pytest.mark.parametrize("loss", [0.5, 0.6])
def test_a_rival_that_gains_nothing_is_not_said_to_have_the_gain(loss):
    losses = {ENSEMBLE: estimate(0.4, NARROW), BASE: estimate(0.5), SHUFFLED: estimate(loss, WIDE)}
    found = verdict(compared_with(losses), losses, "mse")
    assert f"too few samples to tell it from {SHUFFLED}" in found
    assert "the gain is that of" not in found


@pytest.mark.parametrize(("loss", "how"), [(0.3, "is better"), (0.395, "does as well"), (0.45, "is worse")])
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("others", [CLEAR, {**CLEAR, SHUFFLED: 0.4}, {BASE: 0.4}, {BASE: 0.2}])
def test_the_neighbour_is_named_whoever_wins(loss, how, neighbour, others):
    _, found = said(0.4, {**others, neighbour: loss})
    assert found.endswith(f"; the {neighbour} {how} ({loss:.4f})")


def test_the_better_neighbour_is_named():
    _, found = said(0.4, {**CLEAR, NEAREST: 0.39, NEAREST_INPUT: 0.3})
    assert found.endswith(f"; the {NEAREST_INPUT} is better (0.3000)")
    assert f"the {NEAREST} " not in found.replace(NEAREST_INPUT, "")


def test_a_neighbour_does_not_change_the_verdict():
    assert said(0.4, {**CLEAR, NEAREST: 0.1})[0] == "helps"


def test_comparisons_as_json():
    found = as_json({BASE: Comparison(-0.1, (-0.2, -0.05))})
    assert found == {BASE: {"difference": -0.1, "interval": [-0.2, -0.05]}}


# Headroom


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
