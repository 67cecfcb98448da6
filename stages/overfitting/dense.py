"""The gradient steps of any layer: a weight for each sample, by torch's own optimizers."""

import torch
from torch import Tensor

from stages.foundation.trees import batch_size, take
from stages.overfitting.descent import Descent, LabelledBatch, own_gradients
from stages.overfitting.recipe import Recipe
from stages.per_sample.weights import PerSampleWeights


class DenseDescent(Descent):
    """A weight for each sample, stepped by torch.optim, all of them at once.

    Args:
        run: the model with a weight per sample.
        weight: the base's weight θ of the layer, in its own shape.
        batch: the samples.
        recipe: optimizer and learning rate.
    """

    def __init__(self, run: PerSampleWeights, weight: Tensor, batch: LabelledBatch, recipe: Recipe) -> None:
        super().__init__(batch, recipe)
        self._run, self._weight, self._views = run, weight, batch.views
        count = batch_size(batch.x)
        self._kept = torch.arange(count, device=weight.device)
        self._theta = weight.expand(count, *weight.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
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
        return values.detach() if self._views is None or not self._recipe.until_converged else self.losses()

    def gradient_size(self) -> tuple[Tensor, Tensor]:
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
        self._kept = self._kept[rows]
        super().keep(rows)

    @property
    def replays(self) -> bool:
        return super().replays and self._views is None

    def losses(self) -> Tensor:
        with torch.no_grad():
            return self._loss(self._run(self._x, self._theta, self._prefix.record), self._y)

    def delta(self) -> tuple[Tensor, ...]:
        """θ_s − θ, (B, out, in)."""
        return ((self._theta.detach() - self._weight).view(len(self._theta), len(self._weight), -1),)

    def norm(self) -> Tensor:
        return self.delta()[0].flatten(1).norm(dim=1)


def make_optimizer(recipe: Recipe, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """torch's Adam (β 0.9, 0.999, ε 1e-8) or SGD. Not their fused forms: those take a gradient's memory for contiguous."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr)
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
