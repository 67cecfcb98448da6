"""What a probe's trials say: is there headroom, and does x tell anything about it?"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stages.evaluation.choosing import CHOSEN, LABELS, NEIGHBOURS, PART, Chosen, Trial, choice_of, gains, may_gain
from stages.evaluation.rows import BASE, MEAN_DELTA, ORACLE
from stages.evaluation.statistics import Estimate
from stages.foundation.numbers import figure, signed

NONE, X, UNKNOWN = "none", "x", "unknown"


def headroom(trials: Sequence[Trial], chosen: Mapping[str, Chosen], *, more: str, seen: bool = False) -> dict[str, Any]:
    """The verdict, and where to start.

    Args:
        chosen: what `choosing.choose` gives of the trials.
        more: how to get more samples.
        seen: whether the base was probably trained on the samples; then only a gain is a finding.

    Returns:
        {"verdict", "headroom", "start_with", "chosen"}.
    """
    losses = {name: found.loss for name, found in chosen.items()}
    kind, start = headroom_of(losses, [name for name in CHOSEN if may_gain(trials, CHOSEN[name])]), {}
    text = _sentence(kind, chosen, trials[0].metric)
    if kind == X:
        best = starting_point([choice.trial for choice in chosen[NEIGHBOURS].choices])
        start = start_of(best)
        text += f"; start with {best.layer} and {settings_text(best.settings)}" + _doubt(chosen[NEIGHBOURS])
        if seen:
            text += "; the base was probably trained on these samples: on others the gain may be another"
    elif seen:
        kind = UNKNOWN
        text = "no finding: the base was probably trained on these samples"
    elif kind == UNKNOWN:
        text += f"; {more}"
    shown = {name: found.as_json(chosen[BASE]) for name, found in chosen.items() if name != BASE}
    return {"verdict": text, "headroom": kind, "start_with": start, "chosen": shown}


def headroom_of(losses: Mapping[str, Estimate], open_to: Collection[str]) -> str:
    """`x`, `labels`, `none` or `unknown`. The first of these rules that fits holds:

    1. x, where neighbours gain, and one mean delta for all samples has a larger loss than they;
    2. unknown, where neighbours do not gain, but may;
    3. labels, where the deltas of the true labels gain;
    4. unknown, where they do not gain, but may;
    5. none.

    Args:
        losses: by the keys of `choosing.CHOSEN`, each of what one half of the samples favours on the other half. A row gains
            where the 95 % interval of its paired difference to the base is below zero as a whole.
        open_to: those that may gain, as `choosing.may_gain` has it.
    """
    if gains(losses, NEIGHBOURS):
        if losses[NEIGHBOURS].value < losses[MEAN_DELTA].value:
            return X
    elif NEIGHBOURS in open_to:
        return UNKNOWN
    if gains(losses, LABELS):
        return LABELS
    return UNKNOWN if LABELS in open_to else NONE


def starting_point(trials: Sequence[Trial]) -> Trial:
    """Of the trials that the halves of the samples have chosen, on that of their layers which all samples favour, the one whose
    neighbours do best; where both do as well (paired 95 % interval), the one that overfits least: a strength can make more of a
    small delta, but few samples do not show how wrong a large one may go."""
    layer = choice_of(trials, CHOSEN[NEIGHBOURS]).trial.layer
    same = [trial for trial in trials if trial.layer == layer]
    with_x = [trial for trial in same if trial.gains_by_x] or same
    best = min(with_x, key=lambda trial: trial.losses[trial.neighbour].value)

    def does_as_well(trial: Trial) -> bool:
        return trial.losses[trial.neighbour].minus(best.losses[best.neighbour])[1][0] <= 0

    return max(filter(does_as_well, with_x), key=lambda trial: trial.losses[ORACLE].value, default=best)


def start_of(trial: Trial) -> dict[str, Any]:
    """Its layer and settings, by dotted name."""
    return {"select-layer.layer": trial.layer} | {f"collect.{key}": value for key, value in trial.settings.items()}


def settings_text(settings: Mapping[str, Any]) -> str:
    """A recipe in a few words."""
    return f"{settings['optimizer']} {settings['lr']:g} × {settings['steps']}"


def _sentence(kind: str, chosen: Mapping[str, Chosen], metric: str) -> str:
    """What is said of the figures."""
    base, mean = (figure(chosen[name].loss.value) for name in (BASE, MEAN_DELTA))
    labels, neighbours = _figures(chosen, LABELS), _figures(chosen, NEIGHBOURS)
    if kind == X:
        return (
            f"headroom for x: with the deltas of nearest training samples {metric} goes from {base} to {neighbours}, with one "
            f"mean delta for all to {mean}; for reference, with the deltas of the true labels to {labels}"
        )
    figures = (
        f"with the deltas of the true labels {metric} goes from {base} to {labels}, with those of nearest training samples to "
        f"{neighbours}"
    )
    if kind == UNKNOWN:
        count = chosen[BASE].loss.samples
        return f"too few samples to tell: {figures}; with {count:,} samples a gain of {100 * PART:g} % may be missed"
    gained = gains({name: found.loss for name, found in chosen.items()}, NEIGHBOURS)
    better = chosen[MEAN_DELTA].loss.value < chosen[NEIGHBOURS].loss.value
    same = (
        f"; one mean delta for all does {'better' if better else 'as well'} ({mean})" if gained else ", no gain beyond chance"
    )
    if kind == LABELS:
        return f"no headroom for x in sight: {figures}{same}"
    return f"no headroom: {figures}{same}; a larger collect.lr or more collect.steps may show some"


def _figures(chosen: Mapping[str, Chosen], name: str) -> str:
    loss = figure(chosen[name].loss.value)
    if not any(choice.strength for choice in chosen[name].choices):
        return f"{loss} (no strength is sure to gain)"
    difference, (low, high) = chosen[name].loss.minus(chosen[BASE].loss)
    return f"{loss} ({signed(difference)}, 95 % interval [{signed(low)}, {signed(high)}])"


def _doubt(chosen: Chosen) -> str:
    first, second = (choice.trial.layer for choice in chosen.choices)
    if first == second:
        return ""
    return f"; the layer is not certain: half of the samples favours {first}, the other half {second}"
