"""What a comparison says of itself, from estimates made by hand."""

import numpy as np
import pytest

from stages.evaluation.rows import (
    BASE,
    ENSEMBLE,
    LONGER,
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
from stages.evaluation.verdict import (
    DOES_NOT,
    HARMS,
    HELPS,
    NEIGHBOURS,
    UNDECIDED,
    Comparison,
    Verdict,
    as_json,
    compared_with,
    samples_to_decide,
    verdict,
)

# Of the difference to a row of no width itself: 99 % lie within ± 0.01.
NARROW, WIDE = 0.01, 0.3
FAR = {BASE: 0.5, TEMPERATURE: 0.95, RANDOM_TRAINING: 0.95, SHUFFLED: 0.95}
CLEAR = {BASE: 0.5, TEMPERATURE: 0.48, RANDOM_TRAINING: 0.49, SHUFFLED: 0.495}
SAMPLES = 10**6
WORDS = (HELPS, DOES_NOT, HARMS, UNDECIDED)


def estimate(value, width=0.0, samples=SAMPLES):
    """Draws around a value, of which the middle 99 % are ± `width` wide."""
    return Estimate(value, width / 2, value + width * np.linspace(-1, 1, 4001) / 0.99, samples)


def judged(losses, metric="cross-entropy", **options):
    """The verdict on estimates, whose sentence must hold its outcome and no other one."""
    found = verdict(compared_with(losses), losses, metric, **options)
    assert [word for word in WORDS if word in found.sentence] == [found.outcome], found
    assert "\n" not in found.sentence
    return found


def said(ensemble, others, width=NARROW, samples=SAMPLES, **options):
    """The verdict on the ensemble's loss beside other rows' losses, which have no width of their own."""
    losses = {name: estimate(value, samples=samples) for name, value in others.items()}
    return judged({ENSEMBLE: estimate(ensemble, width, samples)} | losses, **options)


def test_a_comparison_is_the_paired_difference():
    shared = np.random.default_rng(0).normal(size=2000)
    base, ensemble = Estimate(0.5, 1.0, shared, SAMPLES), Estimate(0.4, 1.0, shared - 0.1, SAMPLES)
    found = compared_with({BASE: base, ENSEMBLE: ensemble})[BASE]
    assert (found.difference, *found.interval) == pytest.approx((-0.1, -0.1, -0.1))
    assert (found.favours, found.against) == (True, False)


@pytest.mark.parametrize(
    ("interval", "favours", "against", "no_gain"),
    [
        ((-0.2, -0.1), True, False, False),
        ((-0.2, 0.0), False, False, False),
        ((-0.2, 0.1), False, False, False),
        ((-0.04, 0.1), False, False, True),
        # A gain beyond doubt is one, however small.
        ((-0.04, -0.01), True, False, False),
        ((0.0, 0.1), False, False, True),
        ((0.1, 0.2), False, True, True),
        ((float("nan"), float("nan")), False, False, False),
    ],
)
def test_an_interval_is_on_a_side_only_as_a_whole(interval, favours, against, no_gain):
    found = Comparison(sum(interval) / 2, interval)
    assert (found.favours, found.against, found.leaves_no_gain(0.05)) == (favours, against, no_gain)


@pytest.mark.parametrize(
    ("difference", "interval", "samples"),
    [
        # A gain of 0.1 known to ± 0.2: half the width takes four times the samples.
        (-0.1, (-0.3, 0.1), 400),
        # As it is, the difference leaves no gain of 0.05; to be sure takes an interval of ± 0.05, or of ± 0.15.
        (0.0, (-0.1, 0.1), 400),
        (0.1, (-0.2, 0.4), 400),
        # Both could come true: the one that takes fewer.
        (-0.04, (-0.08, 0.01), 157),
        # Half-way between a gain and none.
        (0.0, (-1e3, 1e3), None),
        (float("nan"), (float("nan"), float("nan")), None),
    ],
)
def test_how_many_samples_decide(difference, interval, samples):
    found = samples_to_decide([Comparison(difference, interval)], 100, 0.05)
    assert found == (None if samples is None else pytest.approx(samples, abs=1))


def test_one_comparison_without_a_gain_decides():
    """Where all have to favour the ensemble, it takes as many as the slowest one."""
    fast, slow = Comparison(-0.1, (-0.3, 0.1)), Comparison(-0.1, (-0.5, 0.3))
    assert samples_to_decide([fast, slow], 100, 0.05) == pytest.approx(1600, abs=1)
    for other in (fast, slow, Comparison(-0.05, (-1e3, 1e3)), Comparison(float("nan"), (float("nan"),) * 2)):
        assert samples_to_decide([Comparison(0.0, (-0.1, 0.1)), other], 100, 0.05) == pytest.approx(400, abs=1)


def test_what_is_compared():
    names = (BASE, ENSEMBLE, TEMPERATURE, VALIDATED, ORACLE, NEAREST_INPUT, SHUFFLED, LONGER)
    losses = {name: estimate(0.5) for name in names}
    assert list(compared_with(losses)) == [BASE, TEMPERATURE, SHUFFLED, LONGER, NEAREST_INPUT]
    assert compared_with({BASE: estimate(0.5)}) == {}


@pytest.mark.parametrize("sign", [1, -1])
def test_rounding_is_no_difference(sign):
    others = {name: loss + (1 if name != BASE else 0) for name, loss in CLEAR.items()}
    found = said(0.5 + sign * 2e-7, others, width=1e-7)
    assert found.outcome == DOES_NOT
    assert "cross-entropy 0.5 → 0.5, 0 with a 99 % interval of [0, 0], leaves no room" in found.sentence


def test_it_helps():
    found = said(0.4, CLEAR)
    assert found == Verdict(
        HELPS,
        "OCD helps: cross-entropy 0.5 → 0.4, -0.1 with a 99 % interval of [-0.11, -0.09]; "
        f"{TEMPERATURE}, {RANDOM_TRAINING} and {SHUFFLED} do less; a longer training of the base was not tried",
    )
    assert said(0.4, {**CLEAR, LONGER: 0.45}).sentence.endswith(f"{SHUFFLED} and {LONGER} do less")


@pytest.mark.parametrize("absent", [(TEMPERATURE,), (RANDOM_TRAINING,), (SHUFFLED,), (RANDOM_TRAINING, SHUFFLED)])
def test_a_gain_over_fewer_rows_than_needed_is_undecided(absent):
    found = said(0.4, {name: loss for name, loss in CLEAR.items() if name not in absent})
    assert (found.outcome, found.rival, found.samples, found.absent) == (UNDECIDED, None, None, absent)
    assert f"there is no {' and '.join(absent)} to compare with; cross-entropy 0.5 → 0.4" in found.sentence


def test_without_classes_there_is_no_temperature_to_miss():
    others = {name: loss for name, loss in CLEAR.items() if name != TEMPERATURE}
    found = said(0.4, others, classes=False)
    assert found.outcome == HELPS
    assert found.sentence.endswith(f"; {RANDOM_TRAINING} and {SHUFFLED} do less; a longer training of the base was not tried")
    assert said(0.4, {BASE: 0.5, SHUFFLED: 0.49}, classes=False).outcome == UNDECIDED


@pytest.mark.parametrize("others", [CLEAR, {**CLEAR, TEMPERATURE: 0.3}, {BASE: 0.5}])
def test_it_harms(others):
    """Whatever the rivals do."""
    found = said(0.6, others)
    assert found == Verdict(HARMS, "OCD harms: cross-entropy 0.5 → 0.6, +0.1 with a 99 % interval of [+0.09, +0.11]")


@pytest.mark.parametrize(("ensemble", "width"), [(0.497, 0.001), (0.499, 0.003), (0.5, 0.004), (0.504, 0.008)])
def test_it_does_not_help_where_no_gain_of_one_per_cent_is_possible(ensemble, width):
    found = said(ensemble, FAR, width)
    assert found.outcome == (HELPS if ensemble == 0.497 else DOES_NOT)
    if found.outcome == DOES_NOT:
        assert found.sentence.endswith("leaves no room for a gain of 1 %")
        assert (found.rival, found.samples) == (None, None)


@pytest.mark.parametrize(("ensemble", "samples"), [(0.45, 3600), (0.5, 360_000), (0.55, 2976)])
def test_it_is_undecided_where_the_samples_are_too_few(ensemble, samples):
    """An interval of ± 0.3 allows a gain and none."""
    found = said(ensemble, FAR, WIDE, samples=100)
    assert found.outcome == UNDECIDED
    assert found.samples == pytest.approx(samples, rel=0.05)
    assert found.sentence.startswith("undecided: 100 test samples do not tell the ensemble from the base, about ")
    assert f" would; cross-entropy 0.5 → {ensemble:g}, " in found.sentence


@pytest.mark.parametrize("rival", [TEMPERATURE, RANDOM_TRAINING, SHUFFLED, LONGER])
@pytest.mark.parametrize("loss", [0.3, 0.38, 0.398])
def test_the_gain_is_a_rivals(rival, loss):
    """The rival is better, or gains as much, as far as one can see."""
    found = said(0.4, {**CLEAR, rival: loss})
    assert (found.outcome, found.rival) == (DOES_NOT, rival)
    gains_more = loss < 0.39
    why = f"{rival} ({loss:g}) gains more" if gains_more else f"the gain is that of {rival} ({loss:g})"
    assert f"OCD does not help: {why}; " in found.sentence


def test_a_rival_that_is_as_good_as_can_be_told_has_the_gain():
    """No gain of 1 % of the base's loss over it is possible."""
    found = said(0.4, {**CLEAR, SHUFFLED: 0.401}, width=0.003)
    assert (found.outcome, found.rival) == (DOES_NOT, SHUFFLED)


def test_a_base_that_may_be_worse_is_no_help_where_a_rival_is_better():
    losses = {name: estimate(loss) for name, loss in CLEAR.items()}
    shared = WIDE * np.linspace(-1, 1, 4001)
    losses[ENSEMBLE], losses[LONGER] = (Estimate(at, 0.1, at + shared, SAMPLES) for at in (0.45, 0.4))
    found = judged(losses)
    assert (found.outcome, found.rival) == (DOES_NOT, LONGER)
    assert f"it does no better than {LONGER} (0.4)" in found.sentence


def test_where_no_number_of_samples_would_do():
    """Half-way between a gain of 1 % and none."""
    found = said(0.5, {**FAR, BASE: 0.5}, width=1e3, samples=100)
    assert (found.outcome, found.samples) == (UNDECIDED, None)
    assert "100 test samples do not tell the ensemble from the base, more than 10,000,000 would; " in found.sentence


@pytest.mark.parametrize(
    ("loss", "samples", "tell"), [(0.4, 1, "1 test sample does"), (float("nan"), 20, "20 test samples do")]
)
def test_without_an_interval_nothing_is_said_of_more_samples(loss, samples, tell):
    found = said(loss, CLEAR, samples=samples)
    assert (found.outcome, found.samples) == (UNDECIDED, None)
    assert found.sentence.startswith(f"undecided: {tell} not tell the ensemble from the base; cross-entropy 0.5 → {loss}, ")
    assert found.sentence.endswith(" without an interval")


def test_a_base_without_any_loss_leaves_no_room():
    found = said(0.0, dict.fromkeys(CLEAR, 0.0), width=0.0)
    assert found.outcome == DOES_NOT
    assert "0 with a 99 % interval of [0, 0], leaves no room" in found.sentence


def test_of_several_rivals_the_best_is_named():
    found = said(0.4, {**CLEAR, TEMPERATURE: 0.399, SHUFFLED: 0.395})
    assert f"the gain is that of {SHUFFLED} (0.395)" in found.sentence
    assert TEMPERATURE not in found.sentence


@pytest.mark.parametrize("rival", [TEMPERATURE, RANDOM_TRAINING, SHUFFLED, LONGER])
@pytest.mark.parametrize("loss", [0.41, 0.51, 0.6])
def test_too_few_samples_to_tell_a_rival(rival, loss):
    """The rival seems to do less, but its difference to the ensemble is too noisy."""
    losses = {ENSEMBLE: estimate(0.4, NARROW, 1000)} | {name: estimate(value, samples=1000) for name, value in CLEAR.items()}
    losses[rival] = estimate(loss, WIDE, 1000)
    found = judged(losses, "mse")
    assert (found.outcome, found.rival) == (UNDECIDED, rival)
    assert f"do not tell the ensemble from {rival} ({loss:g}), about " in found.sentence
    assert "; mse 0.5 → 0.4, " in found.sentence


@pytest.mark.parametrize(("loss", "how"), [(0.3, "is better than"), (0.395, "cannot be told from"), (0.45, "is worse than")])
@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("others", [CLEAR, {**CLEAR, SHUFFLED: 0.4}, {BASE: 0.46}])
def test_a_neighbour_that_gains_is_named_whoever_wins(loss, how, neighbour, others):
    assert said(0.4, {**others, neighbour: loss}).sentence.endswith(f"; {neighbour} ({loss:g}) {how} the ensemble")


@pytest.mark.parametrize("loss", [0.5, 0.50000001, 0.6])
def test_a_neighbour_that_does_not_gain_is_not_named(loss):
    assert NEAREST not in said(0.6, {**CLEAR, NEAREST: loss}).sentence


def test_the_better_neighbour_is_named():
    found = said(0.4, {**CLEAR, NEAREST: 0.39, NEAREST_INPUT: 0.3}).sentence
    assert found.endswith(f"; {NEAREST_INPUT} (0.3) is better than the ensemble")
    assert f"; {NEAREST} (" not in found


@pytest.mark.parametrize(("loss", "told"), [(0.3, True), (0.395, False), (0.45, False)])
def test_a_validated_strength_that_does_better_is_told_of(loss, told):
    found = said(0.4, {**CLEAR, VALIDATED: loss})
    assert found.outcome == HELPS
    assert found.sentence.endswith("; at its validated strength OCD has 0.3") == told
    # A strength of 0 is the base.
    assert "validated" not in said(0.6, {**CLEAR, VALIDATED: 0.5}).sentence


@pytest.mark.parametrize("loss", [0.3, 0.398])
def test_one_mean_delta_for_all_may_have_the_gain(loss):
    found = said(0.4, {**CLEAR, MEAN_DELTA: loss})
    assert (found.outcome, found.rival) == (DOES_NOT, MEAN_DELTA)


def test_a_neighbour_does_not_change_the_verdict():
    assert said(0.4, {**CLEAR, NEAREST: 0.1}).outcome == HELPS


def test_names_with_braces_are_names():
    found = said(0.4, {**CLEAR, "mine {0}": 0.3}, metric="{loss}")
    assert found.sentence.startswith("OCD helps: {loss} 0.5 → 0.4, ")
    assert found.sentence.endswith("; mine {0} (0.3) is better than the ensemble")


def test_comparisons_as_json():
    found = as_json({BASE: Comparison(-0.1, (-0.2, -0.05))})
    assert found == {BASE: {"difference": -0.1, "interval": [-0.2, -0.05]}}
