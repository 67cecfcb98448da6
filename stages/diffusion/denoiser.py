"""What every denoiser is: a network that sees a noisy unit delta, t and the conditioning."""

import torch
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, Fields

# A tuned length is at least this part of ρ̂.
SMALLEST_PART = 1 / 8


class Denoiser(nn.Module):
    """The interface: `encode` once per sample, then `forward` at every step.

    Attributes:
        shape: of what it is shown: (out, in) of a delta, or (out, 1) of an output vector.
        encoder: the conditioning's encoder, whose statistics are fitted before training.
        prediction: what `forward` returns, "x0", "epsilon", or "mean" (a clean unit delta from the conditioning alone).
        lengths: what changes predicted lengths, of a denoiser that is tuned.
    """

    shape: tuple[int, int]
    encoder: ConditioningEncoder
    prediction: str

    def __init__(self) -> None:
        super().__init__()
        self.lengths: Lengths | None = None

    def length(self, encoded: Tensor, rho: Tensor) -> Tensor:
        """How long a delta is made, by the encoded conditioning (B, E) and the scale network's ρ̂, (B,), to (B,): as that has
        it, unless the denoiser is tuned."""
        return rho if self.lengths is None else self.lengths(encoded, rho)

    def encode(self, fields: Fields) -> Tensor:
        """What is constant during sampling: fields (B, …) to (B, E)."""
        return self.encoder(fields)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        """Ω_t (B, out, in), t (B,) and the encoded conditioning (B, E) to Ω̂_0 or ε̂ (B, out, in)."""
        raise NotImplementedError


class Lengths(nn.Module):
    """max(ρ̂ + ρ̄ g(e), ρ̂/8) with an MLP g of the encoded conditioning, (B, E) to (B,), which begins at 0.

    A sum: where ρ̂ is small, as of a sample that the base takes for an easy one, no factor of it would learn.
    Of E numbers the first `dim` are the encoder's; ρ̄ is the mean ρ of the rows that train.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.dim, self.body = dim, nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, encoded: Tensor, rho: Tensor) -> Tensor:
        found = self.body(encoded[:, : self.dim]).squeeze(1).float()
        return torch.maximum(rho + self.mean * found, SMALLEST_PART * rho)


def unit(deltas: Tensor) -> Tensor:
    """Unit deltas, δ / ‖δ‖ · sqrt(out·in), (B, out, in): direction alone, root-mean-square 1 (Eq. 3 up to the constant, so that
    the noise of unit variance meets data of unit variance); a zero delta stays zero."""
    rho = deltas.flatten(1).norm(dim=1).view(-1, 1, 1)
    return deltas / rho.clamp_min(torch.finfo(deltas.dtype).tiny) * (deltas[0].numel() ** 0.5)
