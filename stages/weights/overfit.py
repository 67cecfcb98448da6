"""Overfitting: a few gradient steps on one sample, on the layer only, starting from the base, many samples at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stages.errors import TaskError
from stages.trees import Tree, batch_size, take
from stages.weights.per_sample import PerSampleWeights, Substitution
from stages.weights.record import Record

DEGENERATE_GRADIENT = 1e-6
# Multiples of it, without their whole part, lie far from one another.
GOLDEN_RATIO = 0.6180339887

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
class Overfit:
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
    """The gradient steps of a batch, whatever form the weights have; every tensor has a row for each sample still in it."""

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


def overfit(descent: Descent, base_loss: Tensor, recipe: Recipe) -> Overfit:
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
    count, device = len(base_loss), base_loss.device
    largest = torch.zeros(count, device=device)
    steps = torch.full((count,), recipe.most_steps, dtype=torch.int32, device=device)
    active = torch.arange(count, device=device)
    first, left = torch.zeros(0), _Left(count)
    for step in range(recipe.most_steps):
        values = descent.gradient(step)
        peak, norm = descent.gradient_size()
        largest[active] = torch.maximum(largest[active], peak.float())
        if recipe.until_converged:
            first = norm if step == 0 else first
            done = (norm <= recipe.tolerance * first) | (peak < DEGENERATE_GRADIENT)
            if done.any():
                steps[active[done]] = step
                left.take(active[done], [part[done] for part in (*descent.delta(), descent.norm(), values)])
                active, first = active[~done], first[~done]
                if len(active) == 0:
                    break
                descent.keep(~done)
        descent.advance(step)
    if len(active):
        left.take(active, [*descent.delta(), descent.norm(), descent.losses()])
    *delta, rho, overfit_loss = left.whole()
    found = delta[0] if len(delta) == 1 else tuple(delta)
    return Overfit(found, rho, largest < DEGENERATE_GRADIENT, base_loss, overfit_loss, steps)


class _Left:
    """What is known of samples that have left the batch, put together again in the batch's order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[tuple[Tensor, list[Tensor]]] = []

    def take(self, rows: Tensor, values: list[Tensor]) -> None:
        """Values (b, …) of the rows (b,)."""
        self._parts.append((rows, values))

    def whole(self) -> list[Tensor]:
        """The values of all rows, each (B, …)."""
        if len(self._parts) == 1 and len(self._parts[0][0]) == self._count:
            return self._parts[0][1]
        order = torch.cat([rows for rows, _ in self._parts]).argsort()
        return [torch.cat(parts)[order] for parts in zip(*(values for _, values in self._parts), strict=True)]


class DenseDescent:
    """Gradient steps on a weight for each sample, by torch.optim on all of them at once.

    Args:
        run: the model with a weight per sample.
        weight: the base's weight θ of the layer, in its own shape.
        x: inputs (B, …).
        y: labels (B, …).
        loss: (output, y) to (B,).
        recipe: optimizer and learning rate.
        record: what comes before the layer, for x.
        views: step to the (x, y) used at it, each (B, …); None: the whole samples.
    """

    def __init__(
        self,
        run: PerSampleWeights,
        weight: Tensor,
        x: Tree,
        y: Tree,
        loss: LossFunction,
        recipe: Recipe,
        record: Record | None = None,
        views: Views | None = None,
    ) -> None:
        self._run, self._weight, self._x, self._y, self._loss = run, weight, x, y, loss
        self._record, self._views, self._until_converged = record, views, recipe.until_converged
        self._kept = torch.arange(batch_size(x), device=weight.device)
        self._theta = weight.expand(batch_size(x), *weight.shape).clone(memory_format=torch.contiguous_format)
        self._theta.requires_grad_()
        self._optimizer = make_optimizer(recipe, [self._theta])

    def gradient(self, step: int) -> Tensor:
        """The gradient of the sum of the losses: each sample's own, since samples do not interact."""
        x, y, record = self._x, self._y, self._record
        if self._views is not None:
            (x, y), record = self._views(step), None
            x, y = take(x, self._kept), take(y, self._kept)
        with torch.enable_grad():
            values = self._loss(self._run(x, self._theta, record), y)
            self._theta.grad = own_gradients(values, self._theta, check=step == 0 and isinstance(self._run, Substitution))
        # A sample that leaves here does so with the loss of the whole of it.
        return values.detach() if self._views is None or not self._until_converged else self.losses()

    def gradient_size(self) -> tuple[Tensor, Tensor]:
        """As the interface says."""
        flat = self._theta.grad.flatten(1)
        return flat.abs().amax(1), flat.norm(dim=1)

    def advance(self, step: int) -> None:
        """One step of torch's optimizer: it works elementwise, so each sample takes its own."""
        self._optimizer.step()

    def keep(self, rows: Tensor) -> None:
        """Weights, gradients and the optimizer's state of those samples."""
        old, gradient = self._theta, self._theta.grad
        self._theta = old.detach()[rows].requires_grad_()
        self._theta.grad = gradient[rows]
        state = self._optimizer.state.pop(old, {})
        self._optimizer.param_groups[0]["params"] = [self._theta]
        self._optimizer.state[self._theta] = {
            name: value[rows] if isinstance(value, Tensor) and value.dim() else value for name, value in state.items()
        }
        self._x, self._y, self._kept = take(self._x, rows), take(self._y, rows), self._kept[rows]
        self._record = self._record.take(rows) if self._record is not None else None

    def losses(self) -> Tensor:
        """As the interface says."""
        with torch.no_grad():
            return self._loss(self._run(self._x, self._theta, self._record), self._y)

    def delta(self) -> tuple[Tensor, ...]:
        """θ_s − θ, (B, out, in)."""
        return ((self._theta.detach() - self._weight).view(len(self._theta), len(self._weight), -1),)

    def norm(self) -> Tensor:
        """As the interface says."""
        return self.delta()[0].flatten(1).norm(dim=1)


def make_optimizer(recipe: Recipe, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """torch's Adam (β 0.9, 0.999, ε 1e-8) or SGD. Not their fused forms: those take a gradient's memory for contiguous."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr)
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def own_gradients(values: Tensor, leaf: Tensor, *, check: bool) -> Tensor:
    """Each sample's gradient of its own loss, from the gradient of the losses' sum.

    Args:
        values: losses (B,).
        leaf: a row for each sample, (B, …).
        check: find out whether a sample's loss depends on another one's row: with the losses multiplied by different factors
            each gradient must come out multiplied by its own.

    Returns:
        (B, …).

    Raises:
        TaskError: the losses do not depend on `leaf`, or samples get into each other's rows.
    """
    total = values.sum()
    check = check and len(values) > 1
    gradient = torch.autograd.grad(total, leaf, allow_unused=True, retain_graph=check)[0] if total.requires_grad else None
    if gradient is None:
        raise TaskError("the loss does not depend on the layer", "choose another layer, or let the loss keep its gradient")
    if check:
        factors = 1 + torch.arange(len(values), device=values.device, dtype=values.dtype) * GOLDEN_RATIO % 1
        (scaled,) = torch.autograd.grad((factors * values).sum(), leaf)
        factors = factors.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
        norms = gradient.flatten(1).norm(dim=1)
        # Rounding is far below the first term, except where a gradient is itself next to nothing.
        wrong = (scaled - factors * gradient).flatten(1).norm(dim=1) > 1e-2 * norms + 1e-6 * norms.max()
        if wrong.any():
            raise TaskError(
                "samples get into each other's rows on their way to the layer: the model sorts, routes or mixes them",
                "choose another layer with: ocd select-layer --layer NAME",
            )
    return gradient
