"""Choosing among trials by one half of the samples and looking at the other half: no figure is of samples that chose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stages.evaluation.comparison import favoured
from stages.evaluation.rows import BASE, MEAN_DELTA, ORACLE
from stages.evaluation.statistics import Estimate, Mean, estimates, interval_of_mean
from stages.evaluation.verdict import NEIGHBOURS as NEIGHBOUR_ROWS
from stages.tasks.scoring import finite

LABELS, NEIGHBOURS = "labels", "neighbours"
# Samples are too few where they do not exclude a gain of this part of the base's loss.
PART = 0.1
# What is chosen, and the rows that it is chosen from.
CHOSEN = {BASE: (BASE,), NEIGHBOURS: NEIGHBOUR_ROWS, MEAN_DELTA: (MEAN_DELTA,), LABELS: (ORACLE,)}


@dataclass(frozen=True)
class Trial:
    """One layer with settings of `[collect]` on held-out samples.

    Attributes:
        losses: of each row, by name: its mean over all samples, of each half with the strength that the other half favours.
        halves: of each row, by name: the losses of each half of the samples by strength, (n,).
    """

    layer: str
    settings: Mapping[str, Any]
    metric: str
    losses: Mapping[str, Estimate]
    halves: Mapping[str, tuple[Mapping[float, np.ndarray], Mapping[float, np.ndarray]]]

    @property
    def neighbour(self) -> str:
        """The best of the neighbours' rows."""
        return min((name for name in NEIGHBOUR_ROWS if name in self.losses), key=lambda name: self.losses[name].value)

    @property
    def gains_by_x(self) -> bool:
        """Whether neighbours' deltas gain over the base, and more than the one delta that all samples could be given."""
        return gains(self.losses, self.neighbour) and self.losses[self.neighbour].value < self.losses[MEAN_DELTA].value


def gains(losses: Mapping[str, Estimate], name: str) -> bool:
    """Whether a loss, and the whole 95 % interval of its paired difference to the base, is below the base's."""
    difference, (_, high) = losses[name].minus(losses[BASE])
    return difference < 0 and high < 0


@dataclass(frozen=True)
class Choice:
    """What some samples favour: a row of a trial, with a strength."""

    trial: Trial
    row: str
    strength: float

    def losses(self, halves: Sequence[int] = (0, 1)) -> np.ndarray:
        """Of the samples, (n,)."""
        return np.concatenate([self.trial.halves[self.row][half][self.strength] for half in halves])

    def as_json(self) -> dict[str, Any]:
        return {
            "layer": self.trial.layer,
            "settings": self.trial.settings,
            "row": self.row,
            "strength": self.strength,
        }


@dataclass(frozen=True)
class Chosen:
    """What each half of the samples favours, and the mean loss of each half with what the other half favours."""

    choices: tuple[Choice, Choice]
    loss: Estimate

    def as_json(self, base: "Chosen") -> dict[str, Any]:
        difference, interval = self.loss.minus(base.loss)
        return {
            "mean": finite(self.loss.value),
            "difference": finite(difference),
            "interval": None if np.isnan(interval[0]) else list(interval),
            "favoured": [choice.as_json() for choice in self.choices],
        }


def choice_of(trials: Sequence[Trial], rows: Sequence[str], halves: Sequence[int] = (0, 1)) -> Choice:
    """The trial, the row among `rows` and the strength that all samples favour, or those of one half: of each row the strength
    that is `favoured`, and of these the surest gain."""
    base = Choice(trials[0], BASE, 1.0).losses(halves)

    def with_its_strength(trial: Trial, name: str) -> Choice:
        options = [Choice(trial, name, strength) for strength in trial.halves[name][0]]
        return options[favoured([choice.losses(halves) for choice in options], base)]

    found = [with_its_strength(trial, name) for trial in trials for name in rows if name in trial.halves]
    return min(found, key=lambda choice: interval_of_mean(choice.losses(halves) - base)[1])


def may_gain(trials: Sequence[Trial], rows: Sequence[str]) -> bool:
    """Whether a gain of a tenth of the base's loss is in sight: one of `rows`, with one of its strengths, has a lower loss than
    the base on all samples (or none that is finite), and the 95 % interval of the difference does not exclude such a gain."""
    for trial in trials:
        base = Choice(trial, BASE, 1.0).losses()
        for name in set(rows) & set(trial.halves):
            for strength in trial.halves[name][0]:
                differences = Choice(trial, name, strength).losses() - base
                if not differences.mean() >= 0 and not interval_of_mean(differences)[0] >= -PART * abs(base.mean()):
                    return True
    return False


def choose(trials: Sequence[Trial], resamples: int, rng: np.random.Generator) -> dict[str, Chosen]:
    """What choosing among all trials gives, by the keys of `CHOSEN`, all over the same resamples."""
    choices = {name: tuple(choice_of(trials, rows, [half]) for half in (0, 1)) for name, rows in CHOSEN.items()}
    losses = {name: np.concatenate([second.losses([0]), first.losses([1])]) for name, (first, second) in choices.items()}
    means = {name: Mean(values) for name, values in losses.items()}
    found = estimates(means, len(losses[BASE]), resamples, rng)
    return {name: Chosen(choices[name], found[name]) for name in CHOSEN}
