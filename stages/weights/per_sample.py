"""One interface for weights of one's own for each sample, and the two ways behind it.

`PerSampleWeights` runs the model with the selected layer's weight replaced: G weights serve a batch of G·S samples, weight
g the samples g·S … (g+1)·S − 1. S = 1 is a weight per sample; G = 1 an ordinary forward pass with another weight.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from stages.errors import OcdError
from stages.trees import Tree, batch_size, concatenate, leaves, take
from stages.weights.layer import Layer

Forward = Callable[[nn.Module, Tree], Tree]


class PerSampleWeights(Protocol):
    """A way to run one model with several weights for one layer."""

    name: str

    def __call__(self, x: Tree, weights: Tensor) -> Tree:
        """The outputs (G·S, …) for inputs x (G·S, …) under weights (G, *layer.shape); differentiable in the weights."""


class NotSubstitutable(OcdError):
    """The layer cannot be replaced by one with per-sample weights; the message says why.

    An error of the library's own kind, so that it passes through the user's code as it is.
    """


class Loop:
    """The plain way: one forward pass for each weight. Works for every parameter of every model."""

    name = "loop"

    def __init__(self, model: nn.Module, layer: Layer, forward: Forward) -> None:
        self._bound = _Bound(model, forward)
        self._parameter = f"model.{layer.name}"

    def __call__(self, x: Tree, weights: Tensor) -> Tree:
        """As the interface says."""
        size = _group_size(x, weights)
        return concatenate(
            [
                functional_call(self._bound, {self._parameter: weight}, (take(x, slice(i * size, (i + 1) * size)),))
                for i, weight in enumerate(weights)
            ]
        )


class _Bound(nn.Module):
    """A model and the task's own forward pass as one module, so that `functional_call` can replace a parameter under it."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model, self._forward = model, forward

    def forward(self, x: Tree) -> Tree:
        return self._forward(self.model, x)


class Substitution:
    """The fast way for Linear and Conv2d: only the layer itself computes with per-sample weights, through one batched product
    (for a convolution, a grouped one); the rest of the model runs unchanged on the whole batch.

    Valid because in eval mode the samples of a batch do not interact, so that the gradient of the sum of the losses is each
    sample's own.

    Raises:
        NotSubstitutable: the layer is of another kind, tied or parametrised.
    """

    name = "substitution"

    def __init__(self, model: nn.Module, layer: Layer, forward: Forward) -> None:
        self._model, self._forward = model, forward
        self._module = layer.module(model)
        self._compute = _computation(model, layer, self._module)

    def __call__(self, x: Tree, weights: Tensor) -> Tree:
        """As the interface says.

        Raises:
            NotSubstitutable: the layer is called other than once, or does not see the batch as its first axis.
        """
        calls = 0
        count = _group_size(x, weights) * len(weights)

        def replaced(input: Tensor) -> Tensor:  # the name that nn.Linear and nn.Conv2d give it, for calls by keyword
            nonlocal calls
            calls += 1
            if calls > 1:
                raise NotSubstitutable("it is called several times in one forward pass")
            if input.shape[0] != count:
                raise NotSubstitutable(f"its input has {input.shape[0]} rows for a batch of {count}")
            return self._compute(input, weights)

        self._module.forward = replaced
        try:
            output = self._forward(self._model, x)
        finally:
            del self._module.forward
        if calls == 0:
            raise NotSubstitutable("its module is not called; the weight is used from elsewhere")
        return output


def _group_size(x: Tree, weights: Tensor) -> int:
    count = batch_size(x)
    if count % len(weights):
        raise ValueError(f"{len(weights)} weights cannot share {count} samples equally")
    return count // len(weights)


def _computation(model: nn.Module, layer: Layer, module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of module's kind with weights (G, *layer.shape) for inputs (G·S, …)."""
    holders = [name for name, p in model.named_parameters(remove_duplicate=False) if p is module._parameters.get("weight")]
    if layer.name.rpartition(".")[2] != "weight" or "weight" not in module._parameters:
        raise NotSubstitutable("it is parametrised, or not the weight parameter of a module such as Linear or Conv2d")
    if len(holders) > 1:
        raise NotSubstitutable(f"it is tied: {', '.join(holders)} are one")
    if "forward" in vars(module):
        raise NotSubstitutable("its module's forward pass is replaced already")
    if type(module).forward is nn.Linear.forward:
        return lambda value, weights: linear(value, weights, module.bias)
    if type(module).forward is nn.Conv2d.forward and (module.padding_mode == "zeros" or not isinstance(module.padding, str)):
        return lambda value, weights: conv2d(value, weights, module)
    raise NotSubstitutable(f"{type(module).__name__} is neither Linear nor Conv2d")


def linear(value: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """y = W_g x + b.

    Args:
        value: (G·S, …, in).
        weights: (G, out, in).
        bias: (out,) or None.

    Returns:
        (G·S, …, out).
    """
    groups, out, _ = weights.shape
    product = torch.bmm(value.reshape(groups, -1, value.shape[-1]), weights.transpose(1, 2))
    product = product.reshape(*value.shape[:-1], out)
    return product if bias is None else product + bias


def conv2d(value: Tensor, weights: Tensor, module: nn.Conv2d) -> Tensor:
    """`module`'s convolution with weight g for the samples of group g, as one grouped convolution.

    Args:
        value: (G·S, C, H, W).
        weights: (G, out, C / module.groups, h, w).
        module: gives bias, stride, padding, dilation and groups.

    Returns:
        (G·S, out, H', W').
    """
    groups, out = weights.shape[:2]
    padding = module.padding
    if module.padding_mode != "zeros":
        vertical, horizontal = padding
        value = F.pad(value, (horizontal, horizontal, vertical, vertical), mode=module.padding_mode)
        padding = 0
    size, channels = value.shape[0] // groups, value.shape[1]
    stacked = (
        value.reshape(groups, size, channels, *value.shape[2:])
        .transpose(0, 1)
        .reshape(size, groups * channels, *value.shape[2:])
    )
    result = F.conv2d(stacked, weights.flatten(0, 1), None, module.stride, padding, module.dilation, groups * module.groups)
    result = result.reshape(size, groups, out, *result.shape[2:]).transpose(0, 1).reshape(groups * size, out, *result.shape[2:])
    return result if module.bias is None else result + module.bias.view(-1, 1, 1)


# Single and batched products differ by rounding; a wrong path differs by the size of the result itself.
SELF_CHECK_TOLERANCE = 1e-3


def choose(model: nn.Module, layer: Layer, forward: Forward, x: Tree) -> tuple[PerSampleWeights, str]:
    """Substitution if it equals the loop on the probe batch x (B ≥ 1 samples, two are enough), else the loop.

    Compares outputs and gradients of the outputs' sum of squares, under weights that differ between the samples.

    Returns:
        the way to run the model, and the reason if it is the loop ("" otherwise).
    """
    loop = Loop(model, layer, forward)
    weight = layer.weight(model)
    scale = 1 + 0.01 * torch.arange(batch_size(x), device=weight.device, dtype=weight.dtype)
    weights = weight * scale.view(-1, *[1] * weight.dim())
    try:
        substitution = Substitution(model, layer, forward)
        found, wanted = (_outputs_and_gradient(way, x, weights) for way in (substitution, loop))
    except NotSubstitutable as reason:
        return loop, reason.message
    for got, want in zip(found, wanted, strict=True):
        if not (got - want).norm() <= SELF_CHECK_TOLERANCE * (want.norm() + 1e-6):
            return loop, "a self-check on two samples found substitution to give other results"
    return substitution, ""


def _outputs_and_gradient(way: PerSampleWeights, x: Tree, weights: Tensor) -> tuple[Tensor, Tensor]:
    leaf = weights.clone().requires_grad_()
    with torch.enable_grad():
        parts = [part.flatten() for part in leaves(way(x, leaf)).values() if part.is_floating_point()]
        output = torch.cat(parts)
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf, allow_unused=True) if output.requires_grad else (None,)
    return output.detach(), torch.zeros_like(weights) if gradient is None else gradient
