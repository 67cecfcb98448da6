"""How one layer of one model is overfitted: the fastest method that a self-check finds right, and which parts of a pass are
reused."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.foundation.errors import TaskError
from stages.foundation.trees import Tree, leaves
from stages.overfitting.dense import DenseDescent
from stages.overfitting.descent import Descent, LabelledBatch, Recorded
from stages.overfitting.outer_product import AdamDescent, SgdDescent
from stages.overfitting.overfit import OverfitResult, overfit
from stages.overfitting.recipe import LossFunction, Recipe, Views
from stages.per_sample.capture import LAYER_INPUT
from stages.per_sample.layer import Layer
from stages.per_sample.prefix import PrefixChanged
from stages.per_sample.runner import FirstPass, Runner
from stages.per_sample.self_check import SELF_CHECK_TOLERANCE, equal
from stages.per_sample.weights import Forward, Loop, NotSubstitutable, Substitution

# Adam makes much of small differences between gradients: this is far above them, and far below a wrong delta.
CONFIRM_TOLERANCE = 0.05
# So many batches that cannot be replayed are not worth the trying.
MOST_CHANGED = 5
TELLING_LOSS = 1e-3


class Overfitter(Runner):
    """Overfits one layer of one model.

    Args:
        model: the base, in eval mode, frozen.
        layer: the selected layer.
        forward: the task's forward pass.
        loss: (output, y) to (B,).
        recipe: how a sample is overfitted.
        x: a probe batch, a few samples.
        views: the task shows another part of a sample at each step: nothing is reused then.
        factored: give the deltas' factors, where they are outer products.
        watched: as `capture`.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: Layer,
        forward: Forward,
        loss: LossFunction,
        recipe: Recipe,
        x: Tree,
        *,
        views: bool = False,
        factored: bool = False,
        watched: Sequence[str] = (),
    ) -> None:
        super().__init__(model, layer, forward, x, reuse=not views, watched=watched)
        self._loss, self.recipe, self._factored, self._changed = loss, recipe, factored, 0
        self.why_dense = self._why_dense(x, views)

    def gives_factors(self, factored: bool) -> None:
        """Give factors, where deltas are outer products, or whole deltas."""
        self._factored = factored

    @property
    def one_product(self) -> bool:
        """Whether a delta is one outer product with what the layer sees, as sgd's is without weight decay."""
        return not self.why_dense and self.recipe.is_one_product

    @property
    def factored(self) -> bool:
        """Whether factors are given."""
        return self._factored and self.one_product

    @property
    def name(self) -> str:
        """What the store records."""
        return self.method.name if self.why_dense else "outer product"

    def _why_dense(self, x: Tree, views: bool) -> str:
        """Why the closed forms do not apply; "" where they do."""
        if not isinstance(self.method, Substitution):
            return f"the layer is overfitted by {self.method.name}: {self.reason}"
        if type(self.method.module).forward is not nn.Linear.forward:
            return f"the layer is a {type(self.method.module).__name__}, not a Linear"
        if views:
            return "the task shows another view of a sample at each step"
        first = self.first_pass(x)
        vectors = first.captured[LAYER_INPUT]
        if vectors[0].numel() != vectors.shape[-1]:
            return f"the layer sees {vectors[0].numel() // vectors.shape[-1]} vectors per sample, not one"
        try:
            closed, dense = (self._trial(form, first, x) for form in (True, False))
        except Exception as error:
            # A model that asks for gradients itself, say, and finds the layer's output cut off from its input.
            return f"the closed form cannot run the model ({(str(error) or type(error).__name__).splitlines()[0][:160]})"
        if not equal(closed, dense, SELF_CHECK_TOLERANCE):
            return "a self-check on a few samples found the closed form to give other results"
        return ""

    def _trial(self, closed: bool, first: FirstPass, x: Tree) -> tuple[Tensor, ...]:
        """Three steps by one form, without labels, on the outputs themselves."""
        recipe = Recipe(self.recipe.optimizer, 1e-3, 3, self.recipe.momentum, self.recipe.weight_decay)
        batch = LabelledBatch(x, None, _sum_of_squares, self._prefix_of(first))
        descent = self._descent(closed, first, batch, recipe)
        for step in range(recipe.steps):
            descent.gradient(step)
            descent.advance(step)
        return descent.delta()

    def confirm(self, x: Tree, y: Tree, views: Views | None = None) -> None:
        """Compare with the plain loop on labelled samples (B, …), each a batch of its own, by the task's own loss; the loop is
        taken where they differ.

        Samples whose loss is so small that their gradient is rounding noise are left out.
        """
        trial = dataclasses.replace(self.recipe, steps=min(3, self.recipe.steps), until_converged=False)
        loop = Loop(self.model, self.layer, self.forward)
        with torch.no_grad():
            try:
                found = self._tried(x, y, trial, views)
            except PrefixChanged:
                self.prefix = None
                found = self._tried(x, y, trial, views)
            base_loss, weight = found.base_loss, self.layer.weight(self.model)
            batch = LabelledBatch(x, y, self._loss, views=views)
            alone = [
                overfit(DenseDescent(loop, weight, batch.alone(row), trial), base_loss[row : row + 1], trial)
                for row in range(len(base_loss))
            ]
        rho, degenerate, delta = (torch.cat([getattr(one, name) for one in alone]) for name in ("rho", "degenerate", "delta"))
        telling = (base_loss.abs() > TELLING_LOSS) & ~degenerate & torch.isfinite(rho)
        right = (found.delta - delta).flatten(1).norm(dim=1) <= CONFIRM_TOLERANCE * rho
        if bool((telling & ~right).any()):
            if self.forward.channels_last:
                # Gradients may be less exact in that format.
                self._run_by(self._usual, x)
                self.why_dense = self._why_dense(x, views is not None)
                return self.confirm(x, y, views)
            self.reason = f"a self-check by the task's loss found {self.name} to give other deltas"
            self.method, self.prefix = loop, None
            self.why_dense = f"the layer is overfitted by loop: {self.reason}"

    def _tried(self, x: Tree, y: Tree, recipe: Recipe, views: Views | None) -> OverfitResult:
        first = self.first_pass(x)
        batch = LabelledBatch(x, y, self._loss, self._prefix_of(first), views)
        return overfit(self._descent(not self.why_dense, first, batch, recipe), self._loss(first.output, y), recipe)

    def _prefix_of(self, first: FirstPass) -> Recorded:
        return Recorded(first.record, lambda inputs: self.first_pass(inputs).record)

    def overfit(
        self, first: FirstPass, x: Tree, y: Tree, views: Views | None = None, out: Tensor | None = None, check: bool = True
    ) -> OverfitResult:
        """Overfit each sample of a batch, (B, …) inputs and labels, by itself.

        Args:
            first: the base's own pass over x.
            x: inputs; y: labels.
            views: as `LabelledBatch`.
            out: memory that the deltas (B, out, in) may be left in.
            check: find out whether samples get into each other's rows, which takes a backward pass more.

        Raises:
            TaskError: the loss does not depend on the layer.
        """
        try:
            with torch.no_grad():
                batch = LabelledBatch(x, y, self._loss, self._prefix_of(first), views, check)
                descent = self._descent(not self.why_dense, first, batch, self.recipe, self.factored, out)
                return overfit(descent, self._loss(first.output, y), self.recipe)
        except PrefixChanged:
            # This batch went another way than the probe: what comes before the layer is computed in every pass.
            self._changed += 1
            if self._changed >= MOST_CHANGED:
                self.prefix = None
            return self.overfit(dataclasses.replace(first, record=None), x, y, views, out, check)
        except NotSubstitutable as reason:
            raise TaskError(
                f"{self.layer.name}: {reason.message}; on the samples that were tried first it was otherwise",
                "choose another layer with --set select-layer.layer=NAME, or in ocd.toml",
            ) from reason

    def _descent(
        self,
        closed: bool,
        first: FirstPass,
        batch: LabelledBatch,
        recipe: Recipe,
        factored: bool = False,
        out: Tensor | None = None,
    ) -> Descent:
        weight, run = self.layer.weight(self.model), self.method
        one_vector = first.captured[LAYER_INPUT][0].numel() == self.layer.matrix_shape[1]
        if factored and not one_vector:
            raise TaskError(
                "the layer sees several vectors of some samples, whose deltas are no outer products",
                "use --set collect.store=dense",
            )
        if not (closed and one_vector):
            return DenseDescent(run, weight, batch, recipe)
        if recipe.optimizer == "adam":
            return AdamDescent(run, weight, first, batch, recipe, out=out)
        return SgdDescent(run, weight, first, batch, recipe, bias=run.module.bias, factored=factored)


def _sum_of_squares(output: Tree, _: Tree) -> Tensor:
    parts = [leaf.reshape(len(leaf), -1).square().sum(1) for leaf in leaves(output).values() if leaf.is_floating_point()]
    return torch.stack(parts).sum(0)
