"""The rows of the comparison: where each takes its deltas, or its outputs, from."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.diffusion.sampler import Noise
from stages.evaluation.subject import Batch, Subject
from stages.foundation.deltas import Deltas
from stages.foundation.seeds import generator, seed_of
from stages.foundation.trees import Tree, tree_map

BASE, ENSEMBLE, ONE_DRAW, VALIDATED = "base", "ocd ensemble", "ocd one draw", "ocd validated strength"
TEMPERATURE, RANDOM_TRAINING, SHUFFLED = "temperature-scaled base", "random training deltas", "shuffled conditioning"
NEAREST, NEAREST_INPUT = "nearest neighbour", "nearest neighbour in layer input"
BLENDED, BLENDED_INPUT = "nearest k blended", "nearest k blended in layer input"
ORACLE, ORACLE_ALL = "overfitted on test", "overfitted on test, all layers"
ALTERNATIVE, REGRESSION_ROW, LONGER = "alternative layer", "deterministic hypernetwork", "base trained for as long again"
WITH_X, PLAIN = "ocd conditioned on x", "plain network on I(x)"
BY_PAPER, NEAREST_LABELS, DEEP = "ocd by the paper's objective", "nearest neighbours' labels", "deep ensemble"
RANDOM_DIRECTION, MEAN_DELTA, CLASS_MEAN = "random direction", "mean delta", "mean delta of class"
NO_SCALING, MEAN_NETWORK = "no scaling", "mean network"
IN_X, IN_LAYER_INPUT = "x", "layer_input"
# What neighbours' rows take the distance in.
KINDS = {NEAREST: IN_X, NEAREST_INPUT: IN_LAYER_INPUT, BLENDED: IN_X, BLENDED_INPUT: IN_LAYER_INPUT, NEAREST_LABELS: IN_X}

# As the table shows them: the paper's rows, OCD's own, what a sceptic would try, and what else explains a gain.
OF_THE_PAPER = (BASE, ORACLE, ORACLE_ALL, NEAREST, NO_SCALING, ALTERNATIVE)
OURS = (ONE_DRAW, ENSEMBLE, VALIDATED, MEAN_NETWORK, WITH_X, BY_PAPER)
SCEPTICAL = (TEMPERATURE, RANDOM_DIRECTION, RANDOM_TRAINING, MEAN_DELTA, CLASS_MEAN)
FURTHER = (NEAREST_INPUT, BLENDED, BLENDED_INPUT, SHUFFLED, REGRESSION_ROW, NEAREST_LABELS, PLAIN, LONGER, DEEP)
TABLE = OF_THE_PAPER + OURS + SCEPTICAL + FURTHER
# What nobody predicts with: these know the labels, and those show what chance does.
OF_LABELS, CONTROLS = (ORACLE, ORACLE_ALL), (RANDOM_DIRECTION, RANDOM_TRAINING, SHUFFLED)
# A strength to outputs (E, B, …).
Members = Callable[[float], Tree]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        members: batch to outputs (E, B, …) as a function of the strength.
        validated: whether its strength is fitted on validation samples.
    """

    name: str
    members: Callable[[Batch], Members]
    validated: bool = False


def predicts(name: str) -> bool:
    """Whether predictions can be made with a row: it needs no label, and is no control."""
    return name not in OF_LABELS + CONTROLS


def delta_row(name: str, deltas: Callable[[Batch], Deltas | Tensor], *, validated: bool = False) -> Row:
    """A row that adds deltas (B, E, out, in) to the layer."""
    return Row(name, lambda batch: batch.along(deltas(batch)), validated)


def output_row(name: str, predict: Callable[[Batch], Tree]) -> Row:
    """A row that has no deltas of this layer: one output (B, …), the same at every strength."""

    def members(batch: Batch) -> Members:
        output = tree_map(lambda leaf: leaf.unsqueeze(0), predict(batch))
        return lambda strength: output

    return Row(name, members)


def elsewhere_row(name: str, elsewhere: Subject) -> Row:
    """A row whose deltas belong to another layer or another denoiser."""

    def members(batch: Batch) -> Members:
        other = Batch(elsewhere, batch.evaluated, batch.positions, batch.given)
        return other.along(other.generated[0])

    return Row(name, members, validated=True)


def base_and_oracle() -> list[Row]:
    """The base itself, and the deltas of the samples' own labels: a reference that no prediction reaches fairly."""
    oracle = delta_row(ORACLE, lambda batch: batch.overfitted.unsqueeze(1))
    return [output_row(BASE, lambda batch: batch.first.output), oracle]


def generated_rows(mean_rho: float) -> list[Row]:
    """OCD, and what is made of the same draws."""

    def unscaled(batch: Batch) -> Deltas:
        deltas, rho = batch.generated
        return deltas.scaled(mean_rho / rho.clamp_min(torch.finfo(rho.dtype).tiny))

    return [
        delta_row(NO_SCALING, unscaled),
        delta_row(ONE_DRAW, lambda batch: batch.generated[0].member(slice(1))),
        delta_row(ENSEMBLE, lambda batch: batch.generated[0]),
        delta_row(VALIDATED, lambda batch: batch.generated[0], validated=True),
        delta_row(MEAN_NETWORK, lambda batch: batch.generated[0].mean()),
        # Samples come in a random order: a partner's deltas are those of a conditioning drawn from all others.
        delta_row(
            SHUFFLED, lambda batch: batch.generated[0].of_samples(batch.partners.to(batch.subject.device)), validated=True
        ),
        random_direction_row(lambda batch: batch.generated[1]),
    ]


def random_direction_row(rho_of: Callable[[Batch], Tensor]) -> Row:
    """Directions that nothing has chosen, of the same ρ, (B,): of output vectors, where OCD draws these."""

    def directions(batch: Batch) -> Deltas:
        subject, shape = batch.subject, batch.subject.layer.matrix_shape
        inputs = batch.generated[0].inputs if subject.generate else None
        generators = [generator(subject.seed, "evaluate", RANDOM_DIRECTION, row) for row in batch.rows]
        drawn = Noise(generators, (subject.ensemble, *(shape if inputs is None else shape[:1])), subject.device).draw()
        lengths = drawn.flatten(2).norm(dim=2).view(*drawn.shape[:2], *[1] * (drawn.dim() - 2))
        return Deltas(drawn / lengths, inputs).scaled(rho_of(batch))

    return delta_row(RANDOM_DIRECTION, directions, validated=True)


def random_training_row() -> Row:
    """For each member the delta of a training sample drawn at random."""

    def deltas(batch: Batch) -> Tensor:
        subject, usable = batch.subject, batch.subject.training.usable
        picked = [
            seed_of(subject.seed, "evaluate", RANDOM_TRAINING, row, member) % len(usable)
            for row in batch.rows
            for member in range(subject.ensemble)
        ]
        found = subject.training.take(usable[torch.tensor(picked)]).to(subject.device)
        return found.view(len(batch), subject.ensemble, *subject.layer.matrix_shape)

    return delta_row(RANDOM_TRAINING, deltas, validated=True)


def mean_row(mean: Tensor) -> Row:
    """One delta for all samples, the training samples' mean, (out, in)."""
    return delta_row(MEAN_DELTA, lambda batch: mean.expand(len(batch), 1, *mean.shape), validated=True)


def neighbour_rows(
    missing: Mapping[str, str], *, validated: Sequence[str] = (NEAREST_INPUT, BLENDED, BLENDED_INPUT)
) -> list[Row]:
    """The delta of the nearest training sample, and those of the k nearest blended: in x (the first is the paper's ablation),
    and in what the layer sees; not in what is `missing`. `validated` names the rows whose strength is fitted."""
    sources = {NEAREST: nearest_delta, NEAREST_INPUT: nearest_delta, BLENDED: blended_deltas, BLENDED_INPUT: blended_deltas}
    return [
        delta_row(name, functools.partial(source, kind=KINDS[name]), validated=name in validated)
        for name, source in sources.items()
        if KINDS[name] not in missing
    ]


def nearest_delta(batch: Batch, kind: str) -> Tensor:
    """The delta of each sample's nearest training sample, (B, 1, out, in)."""
    return batch.neighbour_deltas(kind)[:, :1]


def blended_deltas(batch: Batch, kind: str) -> Tensor:
    """The deltas of the k nearest training samples, weighted by 1/distance, (B, 1, out, in)."""
    deltas = batch.neighbour_deltas(kind)
    weights = 1 / batch.neighbours(kind).distance.clamp_min(1e-6).to(deltas)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("bk,bkoi->boi", weights, deltas).unsqueeze(1)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows as the table shows them; those of the task come last."""
    place = {name: number for number, name in enumerate(TABLE)}
    return sorted(rows, key=lambda row: place.get(row.name, len(place)))
