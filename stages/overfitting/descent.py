"""Gradient steps on a batch of samples, each its own; and what makes them each sample's own."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.foundation.errors import TaskError
from stages.foundation.trees import Tree, take
from stages.overfitting.recipe import LossFunction, Recipe, Views
from stages.per_sample.prefix import Record
from stages.tasks.user_code import user_faults

BACKWARD = "the backward pass"
# Rows that are looked at one by one: the worst of them may be one of rounding alone.
MOST_SUSPECTS = 8
# Multiples of it, without their whole part, lie far from one another.
GOLDEN_RATIO = 0.6180339887
# To make a record for fewer samples takes a pass over them.
WORTH_LEAVING = 0.25


@dataclass(frozen=True)
class Recorded:
    """What comes before the layer for the samples of a batch, and how it is recorded for others.

    Attributes:
        record: for these samples, or None.
        make: inputs (b, …) to their record.
    """

    record: Record | None = None
    make: Callable[[Tree], Record | None] | None = None

    def of(self, x: Tree) -> "Recorded":
        """For some of the samples, whose inputs are x: the model runs over them once more."""
        return self if self.make is None or self.record is None else Recorded(self.make(x), self.make)

    @property
    def worth_leaving(self) -> float:
        """One pass over the others must be worth it."""
        return 0.0 if self.record is None else WORTH_LEAVING


@dataclass(frozen=True)
class LabelledBatch:
    """B samples to overfit.

    Attributes:
        x: inputs (B, …).
        y: labels (B, …).
        loss: (output, y) to (B,).
        prefix: what comes before the layer.
        views: step to the (x, y) used at it, each (B, …); None: the whole samples.
        check: find out whether samples get into each other's rows.
    """

    x: Tree
    y: Tree
    loss: LossFunction
    prefix: Recorded = Recorded()
    views: Views | None = None
    check: bool = True

    def alone(self, row: int) -> "LabelledBatch":
        """One sample of it as a batch of its own, with nothing recorded."""
        place, views = slice(row, row + 1), self.views
        shown = None if views is None else lambda step: tuple(take(tree, place) for tree in views(step))
        return LabelledBatch(take(self.x, place), take(self.y, place), self.loss, views=shown)


class Descent(ABC):
    """The gradient steps of a batch, whatever form the weights have; every tensor has a row for each sample still in it.

    Args:
        batch: the samples.
        recipe: optimizer and learning rate.
    """

    def __init__(self, batch: LabelledBatch, recipe: Recipe) -> None:
        self._x, self._y, self._loss, self._recipe = batch.x, batch.y, batch.loss, recipe
        self._prefix, self._check = batch.prefix, batch.check

    @property
    def replays(self) -> bool:
        """Whether a record is in use."""
        return self._prefix.record is not None

    @property
    def worth_leaving(self) -> float:
        """The share of the batch that has to be finished before the others go on without it: a record must be made anew."""
        return self._prefix.worth_leaving

    @abstractmethod
    def gradient(self, step: int) -> Tensor:
        """Find the gradient at the present weights, before step `step`; the losses of the whole samples there, (B,)."""

    @abstractmethod
    def gradient_size(self) -> tuple[Tensor, Tensor]:
        """The largest entry and the norm of each sample's gradient, (B,), (B,)."""

    @abstractmethod
    def advance(self, step: int) -> None:
        """Take the step, counted from 0."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the samples, (B,) bool."""
        self._x, self._y = take(self._x, rows), take(self._y, rows)
        self._prefix = self._prefix.of(self._x)

    @abstractmethod
    def losses(self) -> Tensor:
        """The losses of the whole samples at the present weights, (B,)."""

    @abstractmethod
    def delta(self) -> tuple[Tensor, ...]:
        """What the weights have changed by: (B, out, in), or two factors (B, out), (B, in)."""

    @abstractmethod
    def norm(self) -> Tensor:
        """The Frobenius norm of that, (B,)."""


def own_gradients(values: Tensor, leaf: Tensor, *, check: bool) -> Tensor:
    """Each sample's gradient of its own loss, from the gradient of the losses' sum.

    Args:
        values: losses (B,).
        leaf: a row for each sample, (B, …).
        check: find out whether a sample's loss depends on another one's row.

    Returns:
        (B, …).

    Raises:
        TaskError: the losses do not depend on `leaf`, or samples get into each other's rows.
    """
    total, check, gradient = values.sum(), check and len(values) > 1, None
    if total.requires_grad:
        with user_faults(BACKWARD):
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True, retain_graph=check)
    if gradient is None:
        raise TaskError("the loss does not depend on the layer", "choose another layer, or let the loss keep its gradient")
    if check:
        _check_own(values, leaf, gradient)
    return gradient


def _check_own(values: Tensor, leaf: Tensor, gradient: Tensor) -> None:
    """With the losses multiplied by different factors each gradient must come out multiplied by its own; a row that does not
    must have no gradient of the others' losses.

    Raises:
        TaskError: samples get into each other's rows.
    """
    # Powers of two round nothing, but for the smallest numbers of half precision.
    factors = 2 ** (8 * (torch.arange(len(values), device=values.device, dtype=values.dtype) * GOLDEN_RATIO % 1)).floor()
    with user_faults(BACKWARD):
        (scaled,) = torch.autograd.grad((factors * values).sum(), leaf, retain_graph=True)
    norms = gradient.flatten(1).norm(dim=1).nan_to_num(0)
    scaled.div_(factors.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))).sub_(gradient)
    # Rounding is far below the first term, except where a gradient is itself next to nothing.
    wrong = scaled.flatten(1).norm(dim=1).nan_to_num(0) / (1e-2 * norms + 1e-6 * norms.max() + torch.finfo(norms.dtype).tiny)
    worst = wrong.topk(min(MOST_SUSPECTS, len(wrong)))
    # Both at once: a GPU is waited for each time it is asked.
    for share, row in torch.stack([part.float() for part in worst], 1).tolist():
        if share <= 1:
            return
        row = int(row)
        others = torch.ones_like(values)
        others[row] = 0
        with user_faults(BACKWARD):
            (left,) = torch.autograd.grad((others * values).sum(), leaf, retain_graph=True)
        if left[row].norm() > 1e-3 * norms[row]:
            raise TaskError(
                "samples get into each other's rows on their way to the layer: model or loss sorts, routes or mixes them",
                "choose another layer with --set select-layer.layer=NAME, or in ocd.toml",
            )
