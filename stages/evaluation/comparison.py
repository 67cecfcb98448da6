"""Comparing rows: strengths fitted on validation samples, then every row's metrics on the test samples."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.evaluation.metrics import LOSS, Gathered, Residuals, probabilities
from stages.evaluation.rows import BASE, Members, Row
from stages.evaluation.statistics import interval_of_mean, minimum
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.foundation.seeds import generator
from stages.foundation.trees import Tree, batch_size, concatenate, take
from stages.tasks.loader import losses, naming_rows
from stages.tasks.losses import REGRESSION

# Told of the samples times rows done so far.
OnProgress = Callable[[int], None]
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Fitted:
    """A row's strength, chosen on validation samples, and the mean loss of every strength tried."""

    strength: float
    losses: Mapping[float, float]

    @classmethod
    def of(cls, losses: Mapping[float, np.ndarray], *, as_is: bool = True) -> "Fitted":
        """By the losses at each strength, in ascending order, (n,) each. Where deltas are to be taken `as_is`, of the strengths
        whose mean is within one standard error (of the paired difference) of the lowest mean, the one nearest to 1: a few
        samples always have the lowest mean at some large strength that goes far wrong elsewhere (the rule of one standard
        error, Breiman et al., 1984). Else, and where that is the base, the one with the lowest mean."""
        means = {strength: float(values.mean()) for strength, values in losses.items()}
        lowest = min(means, key=means.get)

        def is_near(strength: float) -> bool:
            above = losses[strength] - losses[lowest]
            return bool(np.isfinite(above).all() and above.mean() <= above.std(ddof=1) / len(above) ** 0.5)

        near = [strength for strength in losses if as_is and lowest and is_near(strength)]
        return cls(min(near, key=lambda strength: abs(strength - 1), default=lowest), means)


def seeded_order(count: int, seed: int, what: str, most: int | None = None) -> Tensor:
    """Positions 0 … count − 1 in a seeded order, at most `most` of them."""
    return torch.randperm(count, generator=generator(seed, "evaluate", "order", what))[:most]


@torch.no_grad()
def validation_losses(
    subject: Subject,
    evaluated: EvaluatedSamples,
    rows: Sequence[Row],
    grids: Mapping[str, Sequence[float]],
    size: int,
    on_progress: OnProgress,
) -> dict[str, dict[float, np.ndarray]]:
    """The losses of labelled samples by each row at each strength of its grid, (N,) by name and strength; 0 is the base."""
    found = {row.name: {strength: [] for strength in sorted(grids[row.name])} for row in rows}
    for batch, name, members in _every(subject, evaluated, rows, size, on_progress):
        for strength, parts in found[name].items():
            values = losses(subject.task, combined(subject, members(strength)), batch.y).double()
            # Weights thrown far enough give no numbers: no strength to choose.
            parts.append(torch.nan_to_num(values, nan=torch.inf).cpu().numpy())
    return {name: {strength: np.concatenate(parts) for strength, parts in tried.items()} for name, tried in found.items()}


def scaled(output: Tensor, temperature: float, *, normalised: bool) -> Tensor:
    """Logits divided by a temperature; log-probabilities (B, C, …), where `normalised`, stay such."""
    return F.log_softmax(output / temperature, dim=1) if normalised else output / temperature


@torch.no_grad()
def fit_temperature(subject: Subject, evaluated: EvaluatedSamples, size: int) -> tuple[float, bool] | None:
    """The T that the base's logits are divided by for the lowest mean loss on validation samples (Guo et al., 2017, 4.2).

    Returns:
        T, and whether the outputs are log-probabilities, which a shift of all classes makes something else; None where outputs
        and labels are neither logits nor such.
    """
    outputs, labels = [], []
    for positions in evaluated.parts(size):
        batch = Batch(subject, evaluated, positions)
        outputs.append(batch.first.output)
        labels.append(batch.y)
    output, y = concatenate(outputs), concatenate(labels)
    if probabilities(output, y) is None:
        return None
    own, shifted = (losses(subject.task, values, y).double() for values in (output, output + 1))
    several = output.dim() > 1 and output.shape[1] > 1 and output.numel() > y.numel()
    normalised = several and not torch.allclose(own, shifted, rtol=1e-3, atol=1e-3)

    def loss(logarithm: float) -> float:
        values = losses(subject.task, scaled(output, math.exp(logarithm), normalised=normalised), y)
        return float(values.double().mean())

    return math.exp(minimum(loss, math.log(COLDEST), math.log(HOTTEST))), normalised


@torch.no_grad()
def fit_variances(
    subject: Subject,
    evaluated: EvaluatedSamples,
    rows: Sequence[Row],
    strengths: dict[str, float],
    size: int,
    on_progress: OnProgress,
) -> dict[str, float | None]:
    """The variance of each row's residual on validation samples, by name; nothing unless the task is a regression."""
    if subject.task.kind != REGRESSION:
        return {}
    found = {row.name: Residuals() for row in rows}
    for batch, name, members in _every(subject, evaluated, rows, size, on_progress):
        outputs = members(strengths.get(name, 1.0))
        found[name].add(outputs, combined(subject, outputs), batch.y)
    return {name: residuals.variance() for name, residuals in found.items()}


@torch.no_grad()
def compare(
    subject: Subject,
    evaluated: EvaluatedSamples,
    rows: Sequence[Row],
    strengths: dict[str, float],
    variances: dict[str, float | None],
    size: int,
    on_progress: OnProgress,
) -> dict[str, Gathered]:
    """What labelled samples contribute to every row's metrics, by the row's name, as are strengths (1 where there is none) and
    the variances of a regression's residuals.

    Raises:
        DataError: a label is out of range; the row is named.
    """
    gathered = {row.name: Gathered(subject.task, variances.get(row.name)) for row in rows}
    for batch, name, members in _every(subject, evaluated, rows, size, on_progress):
        outputs = members(strengths.get(name, 1.0))
        with naming_rows(evaluated.split, batch.positions):
            gathered[name].add(outputs, combined(subject, outputs), batch.y)
    return gathered


@dataclass(frozen=True)
class CrossFitted:
    """A row of which each half of the samples has the strength that the other half favours.

    Attributes:
        strengths: of the first half and of the second.
        gathered: what all samples contribute to its metrics then.
        losses: of each half by every strength tried, (n,).
    """

    strengths: tuple[float, float]
    gathered: Gathered
    losses: tuple[dict[float, np.ndarray], dict[float, np.ndarray]]

    @classmethod
    def of(cls, tried: Sequence[dict[float, Gathered]], base: Sequence[np.ndarray]) -> "CrossFitted":
        """From what each half of the samples contributes by every strength, and the base's losses of each half."""
        losses = tuple({strength: found.values(LOSS) for strength, found in half.items()} for half in tried)
        first, second = (list(half)[favoured(list(half.values()), of)] for half, of in zip(losses, base, strict=True))
        return cls((second, first), tried[0][second].joined(tried[1][first]), losses)


def favoured(options: Sequence[np.ndarray], base: np.ndarray) -> int:
    """The place of the option that some samples favour, from their losses with each option and with the base, (n,) each.

    The surest gain is the option whose 95 % interval of the mean difference to the base has the lowest upper end. Of all that
    are as good (they surely gain, and not surely less), the one that changes losses least is favoured. The lowest mean would be
    that of an option which is right, by chance, on the few samples that the base is wrong about, and goes far wrong elsewhere.
    """
    ends = [interval_of_mean(losses - base)[1] for losses in options]
    surest = ends.index(min(ends))
    as_good = [
        place for place, losses in enumerate(options) if ends[place] < 0 and interval_of_mean(losses - options[surest])[0] <= 0
    ]
    return min(as_good or [surest], key=lambda place: np.square(options[place] - base).mean())


@torch.no_grad()
def cross_fitted(
    subject: Subject, evaluated: EvaluatedSamples, rows: Sequence[Row], grid: Sequence[float], size: int
) -> dict[str, CrossFitted]:
    """As `compare`, where few samples have to serve for both: each half at the strengths that the other favours. Rows that are
    not validated have strength 1."""
    halves = [EvaluatedSamples(evaluated.split, part, evaluated.neighbours) for part in evaluated.order.tensor_split(2)]
    tried = {
        row.name: [
            {s: Gathered(subject.task) for s in sorted(grid) if row.validated} or {1.0: Gathered(subject.task)} for _ in halves
        ]
        for row in rows
    }
    for number, half in enumerate(halves):
        for batch, name, members in _every(subject, half, rows, size):
            for strength, gathered in tried[name][number].items():
                outputs = members(strength)
                gathered.add(outputs, combined(subject, outputs), batch.y)
    base = [half[1.0].values(LOSS) for half in tried[BASE]]
    return {name: CrossFitted.of(halves, base) for name, halves in tried.items()}


def _every(
    subject: Subject, evaluated: EvaluatedSamples, rows: Sequence[Row], size: int, on_progress: OnProgress = lambda done: None
) -> Iterator[tuple[Batch, str, Members]]:
    """Each row by name, with its outputs as a function of the strength, on one batch of samples after another."""
    done = 0
    for positions in evaluated.parts(size):
        batch = Batch(subject, evaluated, positions)
        for row in rows:
            yield batch, row.name, row.members(batch)
            done += len(positions)
            on_progress(done)


def combined(subject: Subject, members: Tree) -> Tree:
    """The members' combination; a lone member's own output, as the base's is."""
    return take(members, 0) if batch_size(members) == 1 else subject.combine(members)
