"""What evaluate advises, by the verdict, and by the row that validation favours."""

import pytest

from stages.evaluation.advice import advice
from stages.evaluation.rows import BASE, BLENDED, ENSEMBLE, LONGER, MEAN_NETWORK, SHUFFLED, TEMPERATURE, VALIDATED
from stages.evaluation.verdict import DOES_NOT, HARMS, HELPS, UNDECIDED, Verdict

TRAIN = "ocd train-base --set train-base.epochs=80 --set train-base.patience=0 --force"
OCD, KEEP, MORE = "predict with: ocd infer", "use the base as it is", "evaluate on more test samples"


def with_row(name):
    return f"predict with the row of the lowest validation loss, {name}: ocd infer --row auto"


@pytest.mark.parametrize(
    ("found", "best", "said"),
    [
        ((HELPS,), ENSEMBLE, OCD),
        ((HELPS,), None, OCD),
        ((HELPS,), BASE, OCD),
        ((HELPS,), BLENDED, with_row(BLENDED)),
        ((HELPS,), VALIDATED, with_row(VALIDATED)),
        ((HARMS,), BLENDED, with_row(BLENDED)),
        ((HARMS,), VALIDATED, with_row(VALIDATED)),
        ((HARMS,), MEAN_NETWORK, KEEP),
        ((HARMS,), BASE, KEEP),
        ((DOES_NOT, SHUFFLED), None, KEEP),
        ((DOES_NOT, LONGER), BASE, f"train the base longer first: {TRAIN}; and keep what it sets in ocd.toml"),
        ((DOES_NOT, LONGER), LONGER, f"train the base longer first: {TRAIN}; and keep what it sets in ocd.toml"),
        ((DOES_NOT, LONGER), BLENDED, f"{with_row(BLENDED)}; or train the base longer: {TRAIN}"),
        ((UNDECIDED, LONGER), None, f"train the base longer first: {TRAIN}; and keep what it sets in ocd.toml"),
        ((UNDECIDED, None), BLENDED, f"{MORE}; until then {with_row(BLENDED)}"),
        ((UNDECIDED, TEMPERATURE), ENSEMBLE, MORE),
    ],
)
def test_what_to_do_next(found, best, said):
    outcome, *rival = found
    assert advice(Verdict(outcome, "", *rival), best, longer=TRAIN) == said


@pytest.mark.parametrize(("outcome", "more"), [(DOES_NOT, True), (HARMS, True), (HELPS, False), (UNDECIDED, False)])
def test_what_the_paper_does_not_do_may_be_tried(outcome, more):
    by_paper, beyond = (advice(Verdict(outcome, ""), BASE, longer=TRAIN, by_paper=which) for which in (True, False))
    ask = '; or train OCD by the task\'s own loss: write objective = "task" under [train-diffusion], then '
    assert by_paper == beyond + (f"{ask}ocd run --from train-scale --force, and evaluate again" if more else "")


def test_what_is_missing_has_to_be_there_first():
    found = Verdict(UNDECIDED, "", absent=(TEMPERATURE,))
    assert advice(found, None, longer=TRAIN) == "give validation samples with task.validation, and evaluate again"
    # They were given: a dict of outputs has no temperature.
    assert advice(found, ENSEMBLE, longer=TRAIN) == OCD
    assert advice(found, BLENDED, longer=TRAIN) == with_row(BLENDED)


@pytest.mark.parametrize(
    ("rival", "gains", "said"),
    [
        (TEMPERATURE, True, "predict with what has the gain: ocd infer --row 'temperature-scaled base'"),
        (TEMPERATURE, False, KEEP),
        (SHUFFLED, True, KEEP),
    ],
)
def test_a_rival_that_gains_predicts(rival, gains, said):
    found = Verdict(DOES_NOT, "", rival, rival_gains=gains)
    assert advice(found, BASE, longer=TRAIN) == said
    assert advice(found, BLENDED, longer=TRAIN) == with_row(BLENDED)


@pytest.mark.parametrize("outcome", [HELPS, DOES_NOT, HARMS, UNDECIDED])
def test_a_base_that_is_worse_than_a_constant_comes_before_all(outcome):
    said = advice(Verdict(outcome, "", LONGER), BLENDED, longer=TRAIN, weak=True)
    assert said == "mend the base first, which is worse than a constant; train-base says how"


def test_a_plain_network_is_worth_a_trial_where_a_sample_is_one_row():
    ask = "; a plain network may do as much where a sample is one row: ocd evaluate --add 'plain network on I(x)'"
    assert advice(Verdict(HELPS, ""), None, longer=TRAIN, untried=True) == OCD + ask
    assert advice(Verdict(HARMS, ""), None, longer=TRAIN, untried=True) == KEEP


def test_every_command_repeats_the_flags():
    flags = " --run other --set collect.lr=0.1"
    for found, best in ((Verdict(HELPS, ""), ENSEMBLE), (Verdict(HELPS, ""), BLENDED), (Verdict(DOES_NOT, ""), BASE)):
        plain, flagged = (advice(found, best, longer=TRAIN, flags=which, by_paper=True) for which in ("", flags))
        assert flagged.replace(flags, "") == plain
        assert flags in flagged or plain == KEEP
