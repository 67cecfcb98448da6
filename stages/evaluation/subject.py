"""What is evaluated: a model with one layer, its training deltas and generated ones, and batches of samples."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.foundation.deltas import Deltas
from stages.foundation.trees import Tree, to_device
from stages.overfitting.overfitter import Overfitter
from stages.per_sample.capture import LAYER_INPUT
from stages.per_sample.layer import Layer
from stages.per_sample.runner import FirstPass
from stages.tasks.conditioning import fields_of
from stages.tasks.data import Split
from stages.tasks.neighbours import Neighbours
from stages.tasks.protocol import Task
from stages.tasks.user_code import user_code

# conditioning {name: (B, …)}, row numbers (B,), members, and `seen`, what the layer sees (B, …) -> B times E deltas of strength
# 1, and predicted rho (B,)
Generate = Callable[..., tuple[Deltas, Tensor]]
# x (B, …), the base's pass over it, conditioning -> conditioning with what is said of neighbours
Retrieve = Callable[[Tree, FirstPass, dict[str, Tensor]], dict[str, Tensor]]
# split, positions (B,), their (x, y) -> deltas (B, out, in), overfitted on the labels, and which are degenerate (B,) bool
OverfitSamples = Callable[[Split, Tensor, tuple[Tree, Tree]], tuple[Tensor, Tensor]]


class TrainingDeltas(Protocol):
    """The deltas of the training samples; a degenerate one is zero: nothing was to change.

    Attributes:
        usable: rows that are not degenerate, (n,).
    """

    usable: Tensor

    def take(self, rows: Tensor) -> Tensor:
        """Deltas of some rows, (n,) to (n, out, in)."""

    def of_samples(self, places: Tensor) -> Tensor:
        """Of some samples, by their place among those that have rows, the mean of their deltas: (n,) to (n, out, in)."""


@dataclass(frozen=True)
class Subject:
    """A model with a layer whose weight may be another for each sample.

    Attributes:
        base: in eval mode.
        overfitter: runs the base with a weight for each sample, and reuses what comes before the layer.
        overfit: the deltas that labels give.
        generate: the deltas that the conditioning gives; None before there is a denoiser.
        ensemble: members E.
        retrieve: adds what is said of neighbours to the conditioning, where the denoiser knows of them.
    """

    task: Task
    base: nn.Module
    layer: Layer
    overfitter: Overfitter
    overfit: OverfitSamples
    device: torch.device
    seed: int
    generate: Generate | None = None
    ensemble: int = 1
    training: TrainingDeltas | None = None
    retrieve: Retrieve | None = None

    def combine(self, members: Tree) -> Tree:
        """The members' combination: (E, B, …) to (B, …)."""
        with user_code("combine()"):
            return self.task.combine(members)


@dataclass
class EvaluatedSamples:
    """Labelled samples that rows are compared on.

    Attributes:
        order: their positions, (N,), in a seeded order: whoever is next to a sample is any other one.
        neighbours: nearest training samples by position in the split, and by what distance is taken in.
    """

    split: Split
    order: Tensor
    neighbours: dict[str, Neighbours] = field(default_factory=dict)

    def parts(self, size: int) -> tuple[Tensor, ...]:
        """The order in parts of at most `size` samples (and one): of an even number, but for the last, and never a lone one, so
        that partners stay together whatever the size."""
        parts = list(self.order.split(max(2, size // 2 * 2)))
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts[-2:] = [torch.cat(parts[-2:])]
        return tuple(parts)


class Batch:
    """Some samples, at positions (B,) in the split, and what of them is computed once, whoever asks for it.

    Args:
        given: their x and y, where they have been read; y is None where nothing asks for labels.
    """

    def __init__(
        self,
        subject: Subject,
        evaluated: EvaluatedSamples,
        positions: Tensor,
        given: tuple[Tree, Tree | None] | None = None,
    ) -> None:
        self.subject, self.evaluated, self.positions = subject, evaluated, positions
        self.given = evaluated.split.batch(positions) if given is None else given
        self.x, self.y = (None if tree is None else to_device(tree, subject.device) for tree in self.given)
        self._of_neighbours: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def rows(self) -> list[int]:
        """What seeds the draws of each sample: as `infer` on the same split."""
        return self.positions.tolist()

    @cached_property
    def first(self) -> FirstPass:
        """The base's own pass."""
        return self.subject.overfitter.first_pass(self.x)

    @cached_property
    def fields(self) -> dict[str, Tensor]:
        """The conditioning, each (B, …)."""
        subject = self.subject
        kind = type(subject.layer.module(subject.base))
        return fields_of(subject.task, kind, self.x, self.first.output, self.first.captured)[0]

    @cached_property
    def seen(self) -> dict[str, Tensor]:
        """What the networks see: the conditioning, and what is said of neighbours, each (B, …)."""
        retrieve = self.subject.retrieve
        return self.fields if retrieve is None else retrieve(self.x, self.first, self.fields)

    @cached_property
    def generated(self) -> tuple[Deltas, Tensor]:
        """Generated deltas of strength 1, B times E, and their predicted ρ, (B,)."""
        members, seen = range(self.subject.ensemble), self.first.captured[LAYER_INPUT]
        return self.subject.generate(self.seen, self.rows, members, seen=seen)

    @property
    def partners(self) -> Tensor:
        """The place in the batch of each sample's partner: of two that follow each other in the order, the other one; of an odd
        number the last three go round."""
        count = len(self.positions)
        place = torch.arange(count) ^ 1
        if count % 2 and count > 1:
            place[-3:] = torch.tensor([count - 2, count - 1, count - 3])
        return place.clamp_max(count - 1)

    @cached_property
    def overfitted(self) -> Tensor:
        """The deltas that the samples' own labels give, (B, out, in)."""
        return self.subject.overfit(self.evaluated.split, self.positions, self.given)[0]

    def along(self, deltas: Deltas | Tensor) -> Callable[[float], Tree]:
        """Outputs with θ + strength · delta as a function of the strength: deltas (B, E, out, in) to (E, B, …)."""
        return self.subject.overfitter.members_along(self.first, self.x, deltas)

    def neighbours(self, kind: str) -> Neighbours:
        """The samples' nearest training samples."""
        found = self.evaluated.neighbours[kind]
        return Neighbours(found.distance[self.positions], found.row[self.positions])

    def neighbour_deltas(self, kind: str) -> Tensor:
        """Their deltas, (B, k, out, in)."""
        if kind not in self._of_neighbours:
            row = self.neighbours(kind).row
            taken = self.subject.training.of_samples(row.reshape(-1)).to(self.subject.device)
            self._of_neighbours[kind] = taken.view(*row.shape, *self.subject.layer.matrix_shape)
        return self._of_neighbours[kind]
