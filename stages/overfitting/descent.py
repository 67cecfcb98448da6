"""Gradient steps on a batch of weights, each sample its own; and what makes them each sample's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.foundation.errors import TaskError
from stages.foundation.trees import Tree, batch_size, take
from stages.overfitting.overfit import LossFunction, Recipe, Views
from stages.per_sample.prefix import Record
from stages.per_sample.weights import PerSampleWeights, Substitution

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


class DenseDescent:
    """Gradient steps on a weight for each sample, by torch.optim on all of them at once.

    Args:
        run: the model with a weight per sample.
        weight: the base's weight θ of the layer, in its own shape.
        x: inputs (B, …).
        y: labels (B, …).
        loss: (output, y) to (B,).
        recipe: optimizer and learning rate.
        prefix: what comes before the layer.
        views: step to the (x, y) used at it, each (B, …); None: the whole samples.
        check: find out whether samples get into each other's rows.
    """

    def __init__(
        self,
        run: PerSampleWeights,
        weight: Tensor,
        x: Tree,
        y: Tree,
        loss: LossFunction,
        recipe: Recipe,
        prefix: Recorded | None = None,
        views: Views | None = None,
        check: bool = True,
    ) -> None:
        self._run, self._weight, self._x, self._y, self._loss = run, weight, x, y, loss
        self._prefix, self._views, self._until_converged = prefix or Recorded(), views, recipe.until_converged
        self._check = check and isinstance(run, Substitution)
        self._kept = torch.arange(batch_size(x), device=weight.device)
        self._theta = weight.expand(batch_size(x), *weight.shape).clone(memory_format=torch.contiguous_format)
        self._theta.requires_grad_()
        self._optimizer = make_optimizer(recipe, [self._theta])

    def gradient(self, step: int) -> Tensor:
        """The gradient of the sum of the losses: each sample's own, since samples do not interact."""
        x, y, record = self._x, self._y, self._prefix.record
        if self._views is not None:
            (x, y), record = self._views(step), None
            x, y = take(x, self._kept), take(y, self._kept)
        with torch.enable_grad():
            values = self._loss(self._run(x, self._theta, record), y)
            self._theta.grad = own_gradients(values, self._theta, check=step == 0 and self._check)
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
        self._prefix = self._prefix.of(self._x)

    @property
    def replays(self) -> bool:
        """As the interface says."""
        return self._prefix.record is not None and self._views is None

    @property
    def worth_leaving(self) -> float:
        """As the interface says."""
        return self._prefix.worth_leaving

    def losses(self) -> Tensor:
        """As the interface says."""
        with torch.no_grad():
            return self._loss(self._run(self._x, self._theta, self._prefix.record), self._y)

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
