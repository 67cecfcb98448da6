"""Overfitting the whole network on one sample: the bound that the paper sets beside overfitting one layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.foundation.trees import Tree
from stages.overfitting.dense import make_optimizer
from stages.overfitting.recipe import LossFunction, Recipe
from stages.per_sample.weights import Forward


def overfit_whole(model: nn.Module, forward: Forward, loss: LossFunction, recipe: Recipe, x: Tree, y: Tree) -> Tree:
    """The output on one sample after overfitting every weight on it; the model is as it was afterwards.

    Args:
        model: in eval mode.
        forward: the task's forward pass.
        loss: (output, y) to (B,).
        recipe: as the layer is overfitted.
        x, y: one sample, (1, …).

    Returns:
        (1, …).
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        _descend(parameters, lambda: loss(forward(model, x), y).sum(), recipe)
        with torch.no_grad():
            return forward(model, x)
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(False)
                parameter.grad = None


def _descend(parameters: list[Tensor], loss: Callable[[], Tensor], recipe: Recipe) -> None:
    optimizer = make_optimizer(recipe, parameters)
    first = 0.0
    for step in range(recipe.most_steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        if recipe.until_converged:
            norm = float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())
            first = norm if step == 0 else first
            if norm <= recipe.tolerance * first:
                return
        optimizer.step()
