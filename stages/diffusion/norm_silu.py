"""GroupNorm in the precision of its input, and silu(GroupNorm(h)) with its passes over h fused by a compiler."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """In the precision of its input, with statistics in float32; autocast would put everything between two convolutions into
    float32, which takes twice the bytes.

    Attributes:
        fused: `silu` by kernels that a compiler makes; without, a GPU takes as long for norms as for convolutions.
    """

    fused = False

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.dtype == torch.float32:
            return super().forward(hidden)
        # Shapes alone have no autocast.
        with contextlib.nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False):
            weight, bias = self.weight.to(hidden.dtype), self.bias.to(hidden.dtype)
            return F.group_norm(hidden, self.num_groups, weight, bias, self.eps)

    def silu(self, hidden: Tensor, more: Tensor | None = None) -> Tensor:
        """silu(norm(h + m)), h (B, C, H, W) and m, if any, (B, C)."""
        if self.fused:
            more = hidden.new_zeros(hidden.shape[:2]) if more is None else more
            return NormSilu.apply(hidden, more, self.weight, self.bias, self.num_groups, self.eps)
        return F.silu(self(hidden if more is None else hidden + more[:, :, None, None]))


class NormSilu(torch.autograd.Function):
    """silu(GroupNorm(h + m)), two passes over h forward and two backward, in float32 between reading and writing.

    h (B, C, H, W) in channels_last, where a pixel's channels lie side by side, m (B, C), weight and bias (C,). Whatever a group
    and m do to a channel is a factor and a summand: silu(scale·h + shift), (B, C) each.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, more: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        pixels = _pixels(hidden)
        variance, mean = _compiled(_moments)(pixels)
        scale, shift = _affine(mean, variance, more.float(), weight, bias, groups, eps)
        ctx.save_for_backward(hidden, mean, variance, more, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return _as_pictures(_compiled(_silu)(pixels, scale, shift), hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *small = ctx.saved_tensors
        pixels, grad = _pixels(hidden), _pixels(grad)
        with torch.enable_grad():
            leaves = [value.detach().float().requires_grad_() for value in small]
            scale, shift = _affine(*leaves, ctx.groups, ctx.eps)
        of_scale, of_shift = _compiled(_sums)(pixels, grad, scale.detach(), shift.detach())
        of_mean, of_variance, *others = torch.autograd.grad([scale, shift], leaves, [of_scale, of_shift])
        # d mean / d h = 1 / P and d variance / d h = 2 (h − mean) / P, of P pixels.
        slope = 2 * of_variance / pixels.shape[1]
        rest = of_mean / pixels.shape[1] - slope * small[0]
        found = _compiled(_gradient)(pixels, grad, scale.detach(), shift.detach(), slope, rest)
        others = [value.to(given.dtype) for value, given in zip(others, small[2:], strict=True)]
        return _as_pictures(found, hidden), *others, None, None


def _affine(
    mean: Tensor, variance: Tensor, more: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """scale and shift, (B, C) each, from each channel's mean and variance, (B, C): a group's mean is that of its channels'
    means, its variance the mean of their variances plus the variance of their means."""
    means, variances = (value.unflatten(1, (groups, -1)) for value in (mean + more, variance))
    centre = means.mean(2, keepdim=True)
    spread = variances.mean(2, keepdim=True) + (means - centre).square().mean(2, keepdim=True)
    scale = (spread + eps).rsqrt().expand_as(means).flatten(1) * weight
    return scale, bias + (more - centre.expand_as(means).flatten(1)) * scale


def _pixels(pictures: Tensor) -> Tensor:
    """(B, C, H, W) as (B, H·W, C), without a copy where they are in channels_last."""
    return pictures.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _as_pictures(pixels: Tensor, like: Tensor) -> Tensor:
    return pixels.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


# The passes over pixels (B, P, C), with what belongs to a channel (B, C).


def _moments(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(pixels.float(), dim=1, correction=0)


def _silu(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.silu(pixels.float() * scale[:, None] + shift[:, None]).to(pixels.dtype)


def _of_silu(values: Tensor, grad: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The gradient in scale·h + shift."""
    inner = values * scale[:, None] + shift[:, None]
    gate = inner.sigmoid()
    return grad.float() * gate * (1 + inner * (1 - gate))


def _sums(pixels: Tensor, grad: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients in scale and shift."""
    values = pixels.float()
    found = _of_silu(values, grad, scale, shift)
    return (found * values).sum(1), found.sum(1)


def _gradient(pixels: Tensor, grad: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, rest: Tensor) -> Tensor:
    """The gradient in h: by scale·h + shift, and by the moments, slope·h + rest."""
    values = pixels.float()
    found = _of_silu(values, grad, scale, shift) * scale[:, None] + values * slope[:, None] + rest[:, None]
    return found.to(pixels.dtype)


@functools.cache
def _compiled(work: Callable[..., Any]) -> Callable[..., Any]:
    # For all shapes at once: a U-Net has a dozen, each of which would take seconds.
    return torch.compile(work, dynamic=True)
