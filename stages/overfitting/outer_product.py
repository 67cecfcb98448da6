"""Closed forms for a Linear layer that sees one vector i per sample: every gradient is an outer product d ⊗ i.

Gradient descent then changes the weight by one outer product, and Adam's moments stay outer products, M ⊗ i and V ⊗ i². So
(B, out) numbers take the place of (B, out, in) until the delta itself is written, and the layer's output at the
present weights follows from its output at the base's.
"""

import math
from typing import Any

import torch
from torch import Tensor

from stages.overfitting.descent import Descent, LabelledBatch, own_gradients
from stages.overfitting.recipe import Recipe
from stages.per_sample.capture import ACTIVATION, LAYER_INPUT
from stages.per_sample.runner import FirstPass
from stages.per_sample.weights import Substitution

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# Samples whose deltas are made at once: what is worked on stays in the cache.
CHUNK_BYTES = 1 << 19


class OuterProductDescent(Descent):
    """What both optimizers share: the gradient d in the layer's output z.

    Args:
        run: the model, which the layer's output can be put into.
        weight: the layer's weight θ (out, in).
        first: the base's own pass: the layer's input i (B, in), and its output at θ, (B, out), in the shape the model gives it.
        batch: the samples.
        recipe: optimizer and learning rate.
    """

    def __init__(self, run: Substitution, weight: Tensor, first: FirstPass, batch: LabelledBatch, recipe: Recipe) -> None:
        super().__init__(batch, recipe)
        output = first.captured[ACTIVATION]
        self._run, self._weight, self._shape = run, weight, output.shape[1:]
        self._vectors, self._start = first.captured[LAYER_INPUT].flatten(1), output.flatten(1)
        self._output = self._start
        self._signal = torch.empty(0)

    def _losses_at(self, z: Tensor) -> Tensor:
        # A copy: what comes after the layer may work in place.
        output = self._run.replaced(self._x, lambda _: z.reshape(-1, *self._shape).clone(), self._prefix.record)
        return self._loss(output, self._y)

    def gradient(self, step: int) -> Tensor:
        """d = ∂L/∂z; the weight's gradient is d ⊗ i."""
        leaf = self._output.detach().requires_grad_()
        with torch.enable_grad():
            values = self._losses_at(leaf)
            self._signal = own_gradients(values, leaf, check=step == 0 and self._check)
        return values.detach()

    def gradient_size(self) -> tuple[Tensor, Tensor]:
        """max|d| · max|i| and ‖d‖ · ‖i‖."""
        peak = self._signal.abs().amax(1) * self._vectors.abs().amax(1)
        return peak, self._signal.norm(dim=1) * self._vectors.norm(dim=1)

    def keep(self, rows: Tensor) -> None:
        """Those samples' rows of everything."""
        for name in ("_vectors", "_start", "_output", "_signal"):
            setattr(self, name, getattr(self, name)[rows])
        super().keep(rows)

    def losses(self) -> Tensor:
        with torch.no_grad():
            return self._losses_at(self._output)


class SgdDescent(OuterProductDescent):
    """θ_t = θ + U_t ⊗ i + c_t θ (c_t = 0 without weight decay), as torch.optim.SGD has it:
    g = d ⊗ i + λ θ_t, b ← μ b + g, θ_t+1 = θ_t − lr · b."""

    def __init__(self, *args: Any, bias: Tensor | None = None, factored: bool = False) -> None:
        super().__init__(*args)
        self._factored = factored and not self._recipe.weight_decay
        self._change = torch.zeros_like(self._start)
        self._momentum = torch.zeros_like(self._start)
        self._share = self._share_momentum = 0.0
        self._unbiased = self._start if bias is None else self._start - bias

    def advance(self, step: int) -> None:
        """As the class says; U and its momentum are (B, out), c and its own are numbers."""
        recipe = self._recipe
        decay, mu = recipe.weight_decay, recipe.momentum
        self._momentum = mu * self._momentum + self._signal + decay * self._change
        self._share_momentum = mu * self._share_momentum + decay * (1 + self._share)
        self._change = self._change - recipe.lr * self._momentum
        self._share -= recipe.lr * self._share_momentum
        length = self._vectors.square().sum(1, keepdim=True)
        self._output = self._start + length * self._change
        if self._share:
            self._output = self._output + self._share * self._unbiased

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        for name in ("_change", "_momentum", "_unbiased"):
            setattr(self, name, getattr(self, name)[rows])

    def delta(self) -> tuple[Tensor, ...]:
        """The factors U and i where they were asked for and are all there is, or U ⊗ i + c θ."""
        if self._factored:
            return self._change, self._vectors
        delta = self._change.unsqueeze(2) * self._vectors.unsqueeze(1)
        return (delta + self._share * self._weight if self._share else delta,)

    def norm(self) -> Tensor:
        """‖U‖ · ‖i‖, or that of the whole."""
        if self._share:
            return self.delta()[0].flatten(1).norm(dim=1)
        return self._change.norm(dim=1) * self._vectors.norm(dim=1)


class AdamDescent(OuterProductDescent):
    """Adam's step −lr · M̂ i / (sqrt(V̂) |i| + ε) is −lr · M̂ / (sqrt(V̂) + ε/|i|) times the sign of i: the sum over steps is kept
    without the sign, which is put on at the end. ε is treated exactly; where i = 0, ε/|i| is infinite and the step zero."""

    def __init__(self, *args: Any, out: Tensor | None = None) -> None:
        super().__init__(*args)
        self._size, self._sign = self._vectors.abs(), self._vectors.sign()
        self._reach = EPSILON / self._size
        self._mean, self._square = torch.zeros_like(self._start), torch.zeros_like(self._start)
        shape = (*self._start.shape, self._vectors.shape[1])
        usable = out is not None and not self._recipe.until_converged and out.dtype == self._start.dtype
        self._sum = out if usable else self._start.new_zeros(shape)
        self._signed = False
        self._norm = torch.zeros_like(self._start[:, 0])

    def advance(self, step: int) -> None:
        """One step for chunks of samples that fit the cache."""
        self._mean.lerp_(self._signal, 1 - BETA1)
        self._square.mul_(BETA2).addcmul_(self._signal, self._signal, value=1 - BETA2)
        rate = self._mean * (-self._recipe.lr / (1 - BETA1 ** (step + 1)))
        root = self._square.sqrt() / math.sqrt(1 - BETA2 ** (step + 1))
        self._signed = step + 1 == self._recipe.most_steps
        shift = torch.empty_like(self._start)
        on_cpu = self._start.device.type == "cpu"
        chunk = max(1, CHUNK_BYTES // (self._sum[0].numel() * self._sum.element_size())) if on_cpu else len(root)
        for start in range(0, len(root), chunk):
            self._advance_chunk(slice(start, start + chunk), step, rate, root, shift)
        self._output = self._start + shift

    def _advance_chunk(self, rows: slice, step: int, rate: Tensor, root: Tensor, shift: Tensor) -> None:
        """Some samples' sums, and what they change the layer's output by; at the last step with the sign."""
        total, below = self._sum[rows], root[rows].unsqueeze(2) + self._reach[rows].unsqueeze(1)
        if step == 0:
            torch.div(rate[rows].unsqueeze(2), below, out=total)
        else:
            total.addcdiv_(rate[rows].unsqueeze(2), below)
        vectors = self._size
        if self._signed:
            total.mul_(self._sign[rows].unsqueeze(1))
            vectors = self._vectors
        if self._signed or self._recipe.until_converged:
            self._norm[rows] = torch.linalg.vector_norm(total, dim=(1, 2))
        torch.bmm(total, vectors[rows].unsqueeze(2), out=shift[rows].unsqueeze(2))

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        for name in ("_size", "_sign", "_reach", "_mean", "_square", "_sum", "_norm"):
            setattr(self, name, getattr(self, name)[rows])

    def delta(self) -> tuple[Tensor, ...]:
        """(B, out, in)."""
        return (self._sum if self._signed else self._sum * self._sign.unsqueeze(1),)

    def norm(self) -> Tensor:
        return self._norm
