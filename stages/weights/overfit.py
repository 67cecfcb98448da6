"""Overfitting: a few gradient steps on one sample, on the layer only, starting from the base, many samples at once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.errors import ComputeError, TaskError
from stages.trees import Tree, batch_size
from stages.weights.per_sample import PerSampleWeights

DEGENERATE_GRADIENT = 1e-6

LossFunction = Callable[[Tree, Tree], Tensor]
Views = Callable[[int], tuple[Tree, Tree]]


@dataclass(frozen=True)
class Overfit:
    """What overfitting a batch of B samples gives.

    Attributes:
        delta: θ_s − θ, (B, out, in).
        rho: its Frobenius norm, (B,).
        degenerate: whether the largest gradient stayed below 1e-6, (B,) bool.
        base_loss: loss before, (B,).
        overfit_loss: loss after, (B,).
        steps: gradient steps taken, (B,) int.
    """

    delta: Tensor
    rho: Tensor
    degenerate: Tensor
    base_loss: Tensor
    overfit_loss: Tensor
    steps: Tensor


def make_optimizer(name: str, parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Adam (β 0.9, 0.999, ε 1e-8) or plain gradient descent. Both work elementwise, so that a batch of weights (B, …) in one
    parameter takes each sample's own steps."""
    return torch.optim.Adam(parameters, lr=lr) if name == "adam" else torch.optim.SGD(parameters, lr=lr)


def overfit(
    run: PerSampleWeights,
    weight: Tensor,
    views: Views,
    x: Tree,
    y: Tree,
    loss: LossFunction,
    *,
    optimizer: str,
    lr: float,
    steps: int,
) -> Overfit:
    """Overfit the layer on each sample of a batch by itself: θ_s = argmin L(f_θs(x), y), begun at θ (Alg. 1, lines 2 to 5).

    The paper's text has gradient descent until convergence and "3 gradient steps"; the authors' code has Adam.

    Args:
        run: the model with a weight per sample; weight: the base's weight θ of the layer, in its own shape.
        views: step to the (x, y) used at it, each (B, …).
        x: inputs (B, …), for the losses before and after.
        y: labels (B, …).
        loss: (output, y) to (B,).
        optimizer: "adam" or "sgd".
        lr: learning rate.
        steps: gradient steps.

    Raises:
        TaskError: the loss does not depend on the layer.
    """
    count = batch_size(x)
    theta = weight.expand(count, *weight.shape).clone().requires_grad_()
    with torch.no_grad():
        base_loss = loss(run(x, theta), y)
    largest = _descend(run, theta, views, loss, make_optimizer(optimizer, [theta], lr), steps)
    with torch.no_grad():
        overfit_loss = loss(run(x, theta), y)
        delta = (theta - weight).view(count, len(weight), -1)
        rho = delta.flatten(1).norm(dim=1)
    taken = torch.full((count,), steps, dtype=torch.int32)
    return Overfit(delta, rho, largest < DEGENERATE_GRADIENT, base_loss, overfit_loss, taken)


def _descend(
    run: PerSampleWeights, theta: Tensor, views: Views, loss: LossFunction, optimizer: torch.optim.Optimizer, steps: int
) -> Tensor:
    """Take the steps on θ (B, …) in place; the largest gradient of each sample on the way, (B,)."""
    largest = torch.zeros(len(theta), device=theta.device)
    for step in range(steps):
        theta.grad = _gradient(run, theta, *views(step), loss)
        largest = torch.maximum(largest, theta.grad.flatten(1).abs().amax(1).float())
        optimizer.step()
    return largest


def _gradient(run: PerSampleWeights, theta: Tensor, x: Tree, y: Tree, loss: LossFunction) -> Tensor:
    """The gradient of the sum of the losses: each sample's own, since samples do not interact."""
    with torch.enable_grad():
        total = loss(run(x, theta), y).sum()
        if not total.requires_grad:
            raise TaskError("the loss does not depend on the layer", "choose another layer, or let the loss keep its gradient")
        (gradient,) = torch.autograd.grad(total, theta, allow_unused=True)
    if gradient is None:
        raise TaskError("the loss does not depend on the layer", "choose another layer, or let the loss keep its gradient")
    return gradient


def check_finite(found: Overfit, rows: Tensor) -> None:
    """Refuse deltas that are not finite.

    Raises:
        ComputeError: the first such sample, by its row in the training set.
    """
    bad = ~(torch.isfinite(found.rho) & torch.isfinite(found.base_loss) & torch.isfinite(found.overfit_loss))
    if bad.any():
        row = int(rows[int(bad.nonzero()[0])])
        raise ComputeError(
            f"overfitting sample {row} gave numbers that are not finite",
            "try a smaller collect.lr, or remove that sample",
        )
