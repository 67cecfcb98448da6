"""The scale network ρ(x, I(x)): how long the delta is (Eq. 2 and 10)."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from stages.diffusion.conditioning import Fields, NormalisedFields

LOG, PAPER = "log", "paper"


class ScaleNetwork(nn.Module):
    """An MLP from the normalised fields, side by side, to log ρ; it begins at the training set's mean of log ρ.

    Args:
        widths: numbers of each field.
        given: encoders of fields that have one of their own, normalised field (B, numbers) to (B, width).
    """

    def __init__(self, widths: dict[str, int], width: int, given: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        given = given or {}
        shared = {name: encoder.channels for name, encoder in given.items() if hasattr(encoder, "channels")}
        self.normalise, self.encoders = NormalisedFields(widths, shared), nn.ModuleDict(given)
        seen = sum(width if name in given else numbers for name, numbers in widths.items())
        self.body = nn.Sequential(nn.Linear(seen, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)
        self.register_buffer("mean_log_rho", torch.zeros(()))
        self.register_buffer("scale_log_rho", torch.ones(()))

    def fit(self, parts: Iterable[Fields], rho: Tensor) -> None:
        """Take the statistics of training samples: fields in parts, (n, …) each, and ρ (N,)."""
        self.normalise.fit(parts)
        log_rho = rho.double().log()
        self.mean_log_rho.copy_(log_rho.mean())
        self.scale_log_rho.copy_(log_rho.std(correction=0).clamp_min(1e-6))

    def forward(self, fields: Fields) -> Tensor:
        """log ρ̂ of samples: fields (B, …) to (B,)."""
        normalised = self.normalise(fields).items()
        values = torch.cat([self.encoders[name](one) if name in self.encoders else one for name, one in normalised], dim=1)
        return self.mean_log_rho + self.scale_log_rho * self.body(values).squeeze(1)


def scale_loss(log_rho: Tensor, rho: Tensor, loss: str) -> Tensor:
    """The scale network's loss for each sample, of log ρ̂ and ρ (positive), (B,) each, to (B,).

    "log" (ours): (log ρ̂ − log ρ)². "paper": 10·log10(|ρ̂ − ρ|²/ρ + 1e-8) (Eq. 10); without the 1e-8 of the authors' code it has
    no lower bound.
    """
    if loss == LOG:
        return (log_rho - rho.log()).square()
    return 10 / math.log(10) * ((log_rho.exp() - rho).square() / rho + 1e-8).log()
