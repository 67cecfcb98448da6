"""Overfitting: a few gradient steps on one sample, on the layer only, starting from the base, many samples at once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.overfitting.descent import Descent
from stages.overfitting.recipe import Recipe
from stages.per_sample.prefix import PrefixChanged

DEGENERATE_GRADIENT = 1e-6


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
