"""Overfitting: a few gradient steps on one sample, on the layer only, starting from the base, many samples at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.foundation.trees import Tree
from stages.per_sample.prefix import PrefixChanged

DEGENERATE_GRADIENT = 1e-6

LossFunction = Callable[[Tree, Tree], Tensor]
Views = Callable[[int], tuple[Tree, Tree]]


@dataclass(frozen=True)
class Recipe:
    """How a sample is overfitted.

    Attributes:
        optimizer: "adam" (β 0.9, 0.999, ε 1e-8) or "sgd".
        lr: learning rate.
        steps: gradient steps, unless until_converged.
        momentum: of sgd.
        weight_decay: of sgd, towards zero as in torch.optim.SGD.
        until_converged: step until the gradient's norm is at most `tolerance` of its first, at most `max_steps` times.
        tolerance: share of the first gradient's norm.
        max_steps: gradient steps at most, if until_converged.
    """

    optimizer: str
    lr: float
    steps: int = 3
    momentum: float = 0.0
    weight_decay: float = 0.0
    until_converged: bool = False
    tolerance: float = 0.1
    max_steps: int = 100

    @property
    def most_steps(self) -> int:
        """The number of steps that no sample exceeds."""
        return self.max_steps if self.until_converged else self.steps


@dataclass(frozen=True)
class OverfitResult:
    """What overfitting a batch of B samples gives.

    Attributes:
        delta: θ_s − θ, (B, out, in); or its factors (B, out) and (B, in), whose outer product it is.
        rho: its Frobenius norm, (B,).
        degenerate: whether the largest gradient stayed below 1e-6, (B,) bool.
        base_loss: loss before, (B,).
        overfit_loss: loss after, (B,).
        steps: gradient steps taken, (B,) int.
    """

    delta: Tensor | tuple[Tensor, Tensor]
    rho: Tensor
    degenerate: Tensor
    base_loss: Tensor
    overfit_loss: Tensor
    steps: Tensor


class Descent(Protocol):
    """The gradient steps of a batch, whatever form the weights have; every tensor has a row for each sample still in it.

    Attributes:
        replays: whether a record is in use.
        worth_leaving: the share of the batch that has to be finished before the others go on without it: a record
            must be made anew for them.
    """

    replays: bool
    worth_leaving: float

    def gradient(self, step: int) -> Tensor:
        """Find the gradient at the present weights, before step `step`; the losses of the whole samples there, (B,)."""

    def gradient_size(self) -> tuple[Tensor, Tensor]:
        """The largest entry and the norm of each sample's gradient, (B,), (B,)."""

    def advance(self, step: int) -> None:
        """Take the step, counted from 0."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the samples, (B,) bool."""

    def losses(self) -> Tensor:
        """The losses of the whole samples at the present weights, (B,)."""

    def delta(self) -> tuple[Tensor, ...]:
        """What the weights have changed by: (B, out, in), or two factors (B, out), (B, in)."""

    def norm(self) -> Tensor:
        """The Frobenius norm of that, (B,)."""


def overfit(descent: Descent, base_loss: Tensor, recipe: Recipe) -> OverfitResult:
    """Overfit the layer on each sample of a batch by itself: θ_s = argmin L(f_θs(x), y), begun at θ (Alg. 1, lines 2 to 5).

    The paper's text has gradient descent until convergence and "3 gradient steps"; the authors' code has Adam. Samples that
    have converged leave the batch.

    Args:
        descent: the batch at θ.
        base_loss: (B,), the losses at θ.
        recipe: optimizer, learning rate, steps.

    Raises:
        TaskError: the loss does not depend on the layer.
    """
    batch = _Batch(base_loss, recipe)
    for step in range(recipe.most_steps):
        values = descent.gradient(step)
        if step == 0:
            check_losses(descent, values, base_loss)
        peak, norm = descent.gradient_size()
        batch.note(peak)
        if recipe.until_converged and batch.all_leave(descent, step, values, peak, norm):
            break
        descent.advance(step)
    return batch.finished(descent)


def check_losses(descent: Descent, values: Tensor, base_loss: Tensor) -> None:
    """Before the first step the losses must be the base's own: a record that is given back to the wrong samples shows here.

    Raises:
        PrefixChanged: they are others.
    """
    if descent.replays and ((values - base_loss).abs() > 1e-3 * (1 + base_loss.abs())).any():
        raise PrefixChanged("with what was recorded before the layer the base's losses came out different")


class _Batch:
    """Which samples are still in the batch, and what is known of those that have left."""

    def __init__(self, base_loss: Tensor, recipe: Recipe) -> None:
        count, device = len(base_loss), base_loss.device
        self._base_loss, self._recipe = base_loss, recipe
        self._largest = torch.zeros(count, device=device)
        self._steps = torch.full((count,), recipe.most_steps, dtype=torch.int32, device=device)
        # The samples the descent works on, and which of them are done since it last went on with fewer.
        self._rows, self._gone = torch.arange(count, device=device), torch.zeros(count, dtype=torch.bool, device=device)
        self._first_norm = torch.zeros(0, device=device)
        self._left: list[tuple[Tensor, list[Tensor]]] = []

    def note(self, peak: Tensor) -> None:
        """The largest entry of each gradient."""
        before = self._largest[self._rows]
        self._largest[self._rows] = torch.where(self._gone, before, torch.maximum(before, peak.float()))

    def all_leave(self, descent: Descent, step: int, values: Tensor, peak: Tensor, norm: Tensor) -> bool:
        """Let samples go whose gradient has become small; whether none is left."""
        self._first_norm = norm if step == 0 else self._first_norm
        done = ((norm <= self._recipe.tolerance * self._first_norm) | (peak < DEGENERATE_GRADIENT)) & ~self._gone
        if not done.any():
            return False
        self._steps[self._rows[done]] = step
        self._left.append((self._rows[done], [part[done] for part in (*descent.delta(), descent.norm(), values)]))
        self._gone = self._gone | done
        if self._gone.all():
            return True
        if self._gone.float().mean() >= descent.worth_leaving:
            here = ~self._gone
            descent.keep(here)
            self._rows, self._first_norm, self._gone = self._rows[here], self._first_norm[here], self._gone[here]
        return False

    def finished(self, descent: Descent) -> OverfitResult:
        """What all samples came to, in the batch's order."""
        if not self._left:
            parts = [*descent.delta(), descent.norm(), descent.losses()]
        else:
            if not self._gone.all():
                last, here = (*descent.delta(), descent.norm(), descent.losses()), ~self._gone
                self._left.append((self._rows[here], [part[here] for part in last]))
            order = torch.cat([rows for rows, _ in self._left]).argsort()
            parts = [torch.cat(found)[order] for found in zip(*(values for _, values in self._left), strict=True)]
        *delta, rho, overfit_loss = parts
        whole = delta[0] if len(delta) == 1 else tuple(delta)
        return OverfitResult(whole, rho, self._largest < DEGENERATE_GRADIENT, self._base_loss, overfit_loss, self._steps)
