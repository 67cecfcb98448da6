"""The conditioning I(x) as a network sees it: normalised fields, and e = PE(t) + E_i(i_L) + E_a(a_L) + E_o(f_θ(x))."""

import math

import torch
from torch import Tensor, nn

Fields = dict[str, Tensor]


def positional_encoding(t: Tensor, dim: int) -> Tensor:
    """PE(t): sines, then cosines, of t at dim/2 wavelengths from 2π to 10,000·2π (Vaswani et al., 2017).

    Args:
        t: steps, (B,) int.
        dim: even.

    Returns:
        (B, dim).
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class NormalisedFields(nn.Module):
    """Each field flattened, then shifted and scaled by statistics of the store, which travel with the weights.

    Args:
        widths: numbers of each field.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self.widths = dict(widths)
        for name, width in widths.items():
            self.register_buffer(f"mean_{name}", torch.zeros(width))
            self.register_buffer(f"scale_{name}", torch.ones(width))

    def fit(self, fields: Fields) -> None:
        """Take means and standard deviations over samples, (N, …). What hardly varies must not explode on new inputs: a number
        is divided by a hundredth of its field's typical deviation at least, and by a hundredth of its typical size where the
        whole field is constant."""
        for name in self.widths:
            values = fields[name].flatten(1).double()
            deviation = values.std(0, correction=0)
            typical = deviation.square().mean().sqrt()
            # Constant up to rounding counts as constant.
            size = values.square().mean().sqrt()
            floor = 1e-2 * (typical if typical > 1e-6 * size else size if size > 0 else torch.ones_like(size))
            getattr(self, f"mean_{name}").copy_(values.mean(0))
            getattr(self, f"scale_{name}").copy_(deviation.clamp_min(floor))

    def forward(self, fields: Fields) -> Fields:
        """Normalised fields, each (B, width)."""
        return {
            name: (fields[name].flatten(1) - getattr(self, f"mean_{name}")) / getattr(self, f"scale_{name}")
            for name in self.widths
        }


class ConditioningEncoder(nn.Module):
    """The part of e that does not change during sampling, E_i(i_L) + E_a(a_L) + E_o(f_θ(x)); each E one linear layer.

    Args:
        widths: numbers of each field.
        dim: width of e.
    """

    def __init__(self, widths: dict[str, int], dim: int) -> None:
        super().__init__()
        self.normalise = NormalisedFields(widths)
        self.encoders = nn.ModuleDict({f"of_{name}": nn.Linear(width, dim) for name, width in widths.items()})

    def forward(self, fields: Fields) -> Tensor:
        """Fields (B, …) to (B, dim)."""
        normalised = self.normalise(fields)
        return torch.stack([self.encoders[f"of_{name}"](value) for name, value in normalised.items()]).sum(0)
