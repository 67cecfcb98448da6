"""What validation samples decide: each row's strength, the base's temperature, and which row predicts best."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from stages.evaluation import rows as row
from stages.evaluation.comparison import Fitted, OnProgress, fit_temperature, scaled, validation_losses
from stages.evaluation.rows import Row
from stages.evaluation.statistics import interval_of_mean
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.evaluation.verdict import RIVALS, SMALLEST_GAIN, VERDICT_TAIL
from stages.foundation.memory import AtOnce
from stages.foundation.numbers import ROUNDING
from stages.run_directory.descriptions import Strength
from stages.run_directory.pipeline import AUTO
from stages.tasks.scoring import finite

# OCD's own rows, which have the strength that `[infer]` asks for.
AS_ASKED = (row.ONE_DRAW, row.ENSEMBLE, row.NO_SCALING, row.MEAN_NETWORK)


@dataclass(frozen=True)
class OnValidation:
    """What was found on validation samples; without any, nothing.

    Attributes:
        asked: the strength that `[infer]` asks for, or `auto`.
        tried: each row's losses at each strength tried, (N,) by name and strength.
        fitted: the strengths that rows are given, by name.
        temperature: of the base's logits, which `normalised` says are log-probabilities.
        samples: how many there were.
    """

    asked: float | str
    tried: Mapping[str, Mapping[float, np.ndarray]] = field(default_factory=dict)
    fitted: Mapping[str, Fitted] = field(default_factory=dict)
    temperature: float | None = None
    normalised: bool = False
    samples: int = 0

    def strengths(self, rows: Sequence[Row]) -> dict[str, float]:
        """Every row's strength by name: as fitted; of OCD's own rows, and where nothing could be fitted, as asked."""
        found = {name: one.strength for name, one in self.fitted.items()}
        asked = found.get(row.VALIDATED, 1.0) if self.asked == AUTO else self.asked
        found |= dict.fromkeys(AS_ASKED, asked)
        found |= {one.name: asked for one in rows if one.validated and one.name not in found}
        return found | {row.NEAREST: 1.0, row.ORACLE: 1.0}

    def loss_of(self, name: str, strengths: Mapping[str, float]) -> float | None:
        """A row's mean loss at its strength."""
        found = self.tried.get(name, {}).get(strengths.get(name, 1.0))
        return None if found is None else float(found.mean())

    def at_the_edge(self) -> list[str]:
        """The rows that predict best at the largest strength tried, and gain."""
        largest = max((max(one.losses) for one in self.fitted.values()), default=0)
        found = {name: one.strength for name, one in self.fitted.items() if 0 < one.strength == largest}
        return [name for name, strength in found.items() if row.predicts(name) and self._gains(name, strength)]

    def _gains(self, name: str, strength: float) -> bool:
        """Whether a row is better than the base by as much as counts, and beyond doubt (paired 99 % interval)."""
        base = self.tried[row.BASE][1.0]
        differences = self.tried[name][strength] - base
        _, high = interval_of_mean(differences, VERDICT_TAIL)
        return bool(high < 0 and differences.mean() <= -SMALLEST_GAIN * abs(base.mean()))

    def best(self, rows: Sequence[Row]) -> str | None:
        """Of the rows that predict, the one with the lowest loss (of those that are equal but for rounding the first), or the
        ensemble where that gains and cannot be told from it; the base where it does not gain, None where nothing was judged.
        Not the task's own rows, which are given the validation samples to be made with."""
        strengths = self.strengths(rows)
        names = [one.name for one in rows if row.predicts(one.name) and one.name in row.TABLE]
        known = {name: loss for name in names if (loss := self.loss_of(name, strengths)) is not None and math.isfinite(loss)}
        if not known:
            return None
        lowest = min(known.values())
        found = next(name for name, loss in known.items() if loss <= lowest + ROUNDING * abs(lowest))
        if not self._gains(found, strengths.get(found, 1.0)):
            return row.BASE
        if row.ENSEMBLE in known and self._gains(row.ENSEMBLE, strengths[row.ENSEMBLE]):
            ours, other = (self.tried[name][strengths.get(name, 1.0)] for name in (row.ENSEMBLE, found))
            # The lowest of twenty losses is lower by chance alone.
            return found if interval_of_mean(other - ours, VERDICT_TAIL)[1] < 0 else row.ENSEMBLE
        return found

    def record(self, rows: Sequence[Row], ensemble: int) -> Strength:
        """`strength.json`: what predicts, at which strength, and which row has the lowest loss."""
        strengths = self.strengths(rows)
        ours = self.fitted.get(row.VALIDATED)
        return Strength(
            strength=ours.strength if ours else None,
            losses={str(key): finite(value) for key, value in ours.losses.items()} if ours else {},
            ensemble=ensemble,
            samples=self.samples,
            rows={one.name: strengths.get(one.name) for one in rows if row.predicts(one.name)},
            best=self.best(rows),
            temperature=self.temperature,
            normalised=self.normalised,
        )


def temperature_row(temperature: float, *, normalised: bool) -> Row:
    """The base's logits divided by a temperature."""

    def predict(batch: Batch) -> Tensor:
        return scaled(batch.first.output, temperature, normalised=normalised)

    return row.output_row(row.TEMPERATURE, predict)


def fit_rows(
    subject: Subject,
    validation: EvaluatedSamples,
    rows: Sequence[Row],
    grid: Sequence[float],
    asked: float | str,
    *,
    classification: bool,
    at_once: AtOnce,
    progress: Callable[[str, int], OnProgress],
) -> tuple[list[Row], OnValidation]:
    """Fit a temperature, then the strengths of the rows that have one to fit, and judge all rows that predict.

    Returns:
        the rows, the temperature-scaled base among them where the outputs have a temperature; and what was found.
    """
    scale = at_once.whole(lambda size: fit_temperature(subject, validation, size)) if classification else None
    temperature, normalised = scale or (None, False)
    if temperature is not None:
        rows = row.in_order([*rows, temperature_row(temperature, normalised=normalised)])
    free = {name for name in AS_ASKED if asked == AUTO} | {one.name for one in rows if one.validated}
    fixed = dict.fromkeys(AS_ASKED, (asked,))
    wanted = [one for one in rows if row.predicts(one.name) or one.validated]
    grids = {one.name: grid if one.name in free else fixed.get(one.name, (1.0,)) for one in wanted}
    if subject.generate.denoiser.lengths is not None:
        # The task's loss has chosen the lengths. Where OCD makes no error on validation samples, larger ones would only seem
        # to gain: they make rare errors worse.
        shorter = tuple(strength for strength in grid if strength <= 1) or (1.0,)
        grids |= {name: shorter for name in (row.VALIDATED, *AS_ASKED) if name in free and name in grids}
    on_progress = progress("validation samples × rows", len(validation.order) * len(wanted))
    tried = at_once.whole(lambda size: validation_losses(subject, validation, wanted, grids, size, on_progress))
    # What OCD has to beat is to be as good as it can be.
    at_its_best = (*RIVALS, *row.CONTROLS)
    fitted = {one.name: Fitted.of(tried[one.name], as_is=one.name not in at_its_best) for one in wanted if one.validated}
    return list(rows), OnValidation(asked, tried, fitted, temperature, normalised, len(validation.order))
