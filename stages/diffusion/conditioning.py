"""The conditioning I(x) as a network sees it: normalised fields, and e = PE(t) + E_i(i_L) + E_a(a_L) + E_o(f_θ(x))."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Fields = dict[str, Tensor]


def positional_encoding(t: Tensor, dim: int) -> Tensor:
    """PE(t): sines, then cosines, of t at dim/2 wavelengths from 2π to 10,000·2π (Vaswani et al., 2017), (B,) to (B, dim)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t.float().unsqueeze(1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class NormalisedFields(nn.Module):
    """Each field flattened, then shifted and scaled by statistics of the store, which travel with the weights.

    Args:
        widths: numbers of each field.
        channels: of fields that are pictures or sounds, whose numbers share statistics within a channel.
    """

    def __init__(self, widths: dict[str, int], channels: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.widths, self._channels = dict(widths), dict(channels or {})
        for name, width in widths.items():
            self.register_buffer(f"mean_{name}", torch.zeros(width))
            self.register_buffer(f"scale_{name}", torch.ones(width))

    def fit(self, parts: Iterable[Fields]) -> None:
        """Take means and standard deviations over samples, in parts of (n, …) each. What hardly varies must not explode on new
        inputs: a number is divided by a hundredth of its field's typical deviation at least, and by a hundredth of its typical
        size where the whole field is constant."""
        sums = {name: _Moments(width, self._channels.get(name)) for name, width in self.widths.items()}
        for fields in parts:
            for name, found in sums.items():
                found.add(fields[name])
        for name, found in sums.items():
            mean, deviation, size = found.result()
            typical = deviation.square().mean().sqrt()
            # Constant up to rounding counts as constant.
            floor = 1e-2 * (typical if typical > 1e-6 * size else size if size > 0 else torch.ones_like(size))
            getattr(self, f"mean_{name}").copy_(mean)
            getattr(self, f"scale_{name}").copy_(deviation.clamp_min(floor))

    def forward(self, fields: Fields) -> Fields:
        """Normalised fields, each (B, width)."""
        return {
            name: (fields[name].flatten(1) - getattr(self, f"mean_{name}")) / getattr(self, f"scale_{name}")
            for name in self.widths
        }


class _Moments:
    """Mean and standard deviation of each number of a field, gathered part by part in float64."""

    def __init__(self, width: int, channels: int | None) -> None:
        # What varies little about a large mean would drown in the squares of that mean.
        self._shift: Tensor | None = None
        self._sum, self._squares = torch.zeros(2, width, dtype=torch.float64)
        self._count, self._channels = 0, channels

    def add(self, values: Tensor) -> None:
        """Some samples, (n, …)."""
        values = values.flatten(1).cpu().double()
        if self._shift is None:
            self._shift = values.mean(0)
        values = values - self._shift
        self._sum += values.sum(0)
        self._squares += values.square().sum(0)
        self._count += len(values)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means and standard deviations, (width,) each, and the root mean square of the whole field."""
        mean = self._sum / self._count
        variance = (self._squares / self._count - mean.square()).clamp_min(0)
        mean = mean + self._shift
        size = (variance + mean.square()).mean().sqrt()
        if self._channels:
            per = mean.view(self._channels, -1)
            shared = variance.view(self._channels, -1) + (per - per.mean(1, keepdim=True)).square()
            variance = shared.mean(1, keepdim=True).expand_as(per).flatten()
            mean = per.mean(1, keepdim=True).expand_as(per).flatten()
        return mean, variance.sqrt(), size


class ConditioningEncoder(nn.Module):
    """The part of e that does not change during sampling, E_i(i_L) + E_a(a_L) + E_o(f_θ(x)).

    Args:
        widths: numbers of each field.
        dim: width of e.
        given: encoders of fields that have one of their own, normalised field (B, width) to (B, dim); the others get one fully
            connected layer. One with `channels` has its field normalised by channel.
    """

    def __init__(self, widths: dict[str, int], dim: int, given: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        given = given or {}
        shared = {name: encoder.channels for name, encoder in given.items() if hasattr(encoder, "channels")}
        self.dim, self.normalise = dim, NormalisedFields(widths, shared)
        # Of the Gaussian that is added to every normalised number while training.
        self.noise = 0.0
        self.encoders = nn.ModuleDict(
            {f"of_{name}": given[name] if name in given else nn.Linear(width, dim) for name, width in widths.items()}
        )

    def forward(self, fields: Fields) -> Tensor:
        """Fields (B, …) to (B, dim)."""
        normalised = self.normalise(fields)
        if self.training and self.noise:
            normalised = {name: value + self.noise * torch.randn_like(value) for name, value in normalised.items()}
        return torch.stack([self.encoders[f"of_{name}"](value) for name, value in normalised.items()]).sum(0)
