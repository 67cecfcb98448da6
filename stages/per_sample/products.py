"""Linear, Conv1d and Conv2d applied with G weights to a batch of G equal parts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor, Tensor], Tensor]


def product_of(module: nn.Module, *, bias: bool = True) -> Product | None:
    """The product (value (G·R, …), weights (G, *weight.shape)) -> (G·R, …) that does what `module` does (unless `bias`, without
    adding it), or None where its kind is not known."""
    added = module.bias if bias and hasattr(module, "bias") else None
    if type(module).forward is nn.Linear.forward:
        return lambda value, weights: linear(value, weights, added)
    if type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward):
        return lambda value, weights: convolution(value, weights, module, added)
    return None


def linear(value: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """y = W_g x + b.

    Args:
        value: (G·R, …, in), R rows for each weight.
        weights: (G, out, in).
        bias: (out,) or None.

    Returns:
        (G·R, …, out).
    """
    groups, out, _ = weights.shape
    product = torch.bmm(value.reshape(groups, -1, value.shape[-1]), weights.transpose(1, 2))
    product = product.reshape(*value.shape[:-1], out)
    return product if bias is None else product + bias


def convolution(value: Tensor, weights: Tensor, module: nn.Conv1d | nn.Conv2d, bias: Tensor | None) -> Tensor:
    """`module`'s convolution with weight g for the rows of group g, as one grouped convolution.

    Args:
        value: (G·R, C, *space), one or two axes of space.
        weights: (G, out, C / module.groups, *kernel).
        module: gives stride, padding, dilation and groups.
        bias: (out,) or None.

    Returns:
        (G·R, out, *space').
    """
    groups, out = weights.shape[:2]
    padding = module.padding
    if module.padding_mode != "zeros":
        value = F.pad(value, _border(module), mode=module.padding_mode)
        padding = 0
    size, channels = value.shape[0] // groups, value.shape[1]
    stacked = value.reshape(groups, size, *value.shape[1:]).transpose(0, 1).reshape(size, groups * channels, *value.shape[2:])
    convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    result = convolve(stacked, weights.flatten(0, 1), None, module.stride, padding, module.dilation, groups * module.groups)
    result = result.reshape(size, groups, out, *result.shape[2:]).transpose(0, 1).reshape(groups * size, out, *result.shape[2:])
    return result if bias is None else result + bias.view(-1, *[1] * (result.dim() - 2))


def _border(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """What F.pad takes, last axis first: as many places before and after as the module's padding says; for "same" the rest of
    an odd number comes after."""
    if module.padding == "valid":
        return [0, 0] * len(module.kernel_size)
    if module.padding == "same":
        spans = [dilation * (kernel - 1) for dilation, kernel in zip(module.dilation, module.kernel_size, strict=True)]
        return [places for span in reversed(spans) for places in (span // 2, span - span // 2)]
    return [places for places in reversed(module.padding) for _ in range(2)]
