"""Comparing rows: strengths fitted on validation samples, then every row's metrics on the test samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.evaluation.metrics import LOSS, Gathered, Residuals, probabilities
from stages.evaluation.rows import Row
from stages.evaluation.statistics import minimum
from stages.evaluation.subject import Batch, EvaluatedSamples, Subject
from stages.foundation.seeds import generator
from stages.foundation.trees import Tree, batch_size, take, tree_map
from stages.tasks.loader import losses, naming_rows
from stages.tasks.losses import REGRESSION

# Told of the samples times rows done so far.
OnProgress = Callable[[int], None]
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Fitted:
    """A row's strength.

    Attributes:
        strength: the one with the lowest mean loss on validation samples; of equal ones the smallest.
        losses: every strength tried, and its mean loss.
    """

    strength: float
    losses: dict[float, float]


def seeded_order(count: int, seed: int, what: str, most: int | None = None) -> Tensor:
    """Positions 0 … count − 1 in a seeded order, at most `most` of them."""
    return torch.randperm(count, generator=generator(seed, "evaluate", "order", what))[:most]


@torch.no_grad()
def fit_strengths(
    subject: Subject,
    evaluated: EvaluatedSamples,
    rows: Sequence[Row],
    grid: Sequence[float],
    size: int,
    on_progress: OnProgress,
) -> dict[str, Fitted]:
    """The strength of the lowest mean loss for each row, by name.

    Args:
        subject: what is evaluated.
        evaluated: validation samples.
        rows: those to fit.
        grid: strengths to try; 0 is the base.
        size: samples at once.
        on_progress: of progress.
    """
    sums = {row.name: dict.fromkeys(sorted(grid), 0.0) for row in rows}
    done = 0
    for positions in evaluated.parts(size):
        batch = Batch(subject, evaluated, positions)
        for row in rows:
            members = row.members(batch)
            for strength in sums[row.name]:
                output = _combined(subject, members(strength))
                values = losses(subject.task, output, batch.y).double()
                # Weights thrown far enough give no numbers: no strength to choose.
                sums[row.name][strength] += float(torch.nan_to_num(values, nan=torch.inf).sum())
            done += len(positions)
            on_progress(done)
    found = {}
    for name, by_strength in sums.items():
        means = {strength: total / len(evaluated.order) for strength, total in by_strength.items()}
        found[name] = Fitted(min(means, key=means.get), means)
    return found


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
    output, y = (tree_map(lambda *parts: torch.cat(parts), *trees) for trees in (outputs, labels))
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
    done = 0
    for positions in evaluated.parts(size):
        batch = Batch(subject, evaluated, positions)
        for row in rows:
            members = row.members(batch)(strengths.get(row.name, 1.0))
            found[row.name].add(members, _combined(subject, members), batch.y)
            done += len(positions)
            on_progress(done)
    return {name: residuals.variance() for name, residuals in found.items()}


@dataclass
class Compared:
    """Rows on the same samples.

    Attributes:
        gathered: what the samples contribute to each row's metrics, by the row's name.
        members: of each row.
        order: the samples' positions in the split, (N,).
    """

    gathered: dict[str, Gathered]
    members: dict[str, int]
    order: Tensor


@torch.no_grad()
def compare(
    subject: Subject,
    evaluated: EvaluatedSamples,
    rows: Sequence[Row],
    strengths: dict[str, float],
    variances: dict[str, float | None],
    size: int,
    on_progress: OnProgress,
) -> Compared:
    """Every row's metrics on labelled samples.

    Args:
        subject: what is evaluated.
        evaluated: test samples.
        rows: what to compare.
        strengths: by name, 1 where there is none.
        variances: of a regression's residuals, by name.
        size: samples at once.
        on_progress: of progress.

    Raises:
        DataError: a label is out of range; the row is named.
    """
    gathered = {row.name: Gathered(subject.task, variances.get(row.name)) for row in rows}
    members: dict[str, int] = {}
    done = 0
    for positions in evaluated.parts(size):
        batch = Batch(subject, evaluated, positions)
        for row in rows:
            outputs = row.members(batch)(strengths.get(row.name, 1.0))
            with naming_rows(evaluated.split, positions):
                gathered[row.name].add(outputs, _combined(subject, outputs), batch.y)
            members[row.name] = batch_size(outputs)
            done += len(positions)
            on_progress(done)
    return Compared(gathered, members, evaluated.order)


@torch.no_grad()
def cross_fitted(
    subject: Subject, evaluated: EvaluatedSamples, rows: Sequence[Row], grid: Sequence[float], size: int
) -> tuple[Compared, dict[str, list[float]]]:
    """Every row's metrics where few samples have to serve for both: each half at the strengths of the lowest loss on the other.

    Args:
        subject: what is evaluated.
        evaluated: labelled samples.
        rows: what to compare; those not validated have strength 1.
        grid: strengths to try.
        size: samples at once.

    Returns:
        the comparison, and both strengths of every validated row.
    """
    halves = [EvaluatedSamples(evaluated.split, part, evaluated.neighbours) for part in evaluated.order.tensor_split(2)]
    tried = {
        row.name: [
            {s: Gathered(subject.task) for s in sorted(grid) if row.validated} or {1.0: Gathered(subject.task)} for _ in halves
        ]
        for row in rows
    }
    members: dict[str, int] = {}
    for number, half in enumerate(halves):
        for positions in half.parts(size):
            batch = Batch(subject, half, positions)
            for row in rows:
                at = row.members(batch)
                for strength, gathered in tried[row.name][number].items():
                    outputs = at(strength)
                    gathered.add(outputs, _combined(subject, outputs), batch.y)
                members[row.name] = batch_size(outputs)
    found, strengths = {}, {}
    for name, (first, second) in tried.items():
        best = [min(one, key=lambda strength, one=one: _mean_loss(one[strength])) for one in (second, first)]
        found[name] = first[best[0]].joined(second[best[1]])
        if len(first) > 1:
            strengths[name] = best
    return Compared(found, members, evaluated.order), strengths


def _mean_loss(gathered: Gathered) -> float:
    return float(np.nan_to_num(gathered.values(LOSS).mean(), nan=np.inf))


def _combined(subject: Subject, members: Tree) -> Tree:
    """The members' combination; a lone member's own output, as the base's is."""
    return take(members, 0) if batch_size(members) == 1 else subject.combine(members)
