"""What every denoiser is: a network that sees a noisy unit delta, t and the conditioning."""

import math

import torch
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, Fields

LARGEST_LOG_FACTOR = math.log(8)


class Denoiser(nn.Module):
    """The interface: `encode` once per sample, then `forward` at every step.

    Attributes:
        shape: of what it is shown: (out, in) of a delta, or (out, 1) of an output vector.
        encoder: the conditioning's encoder, whose statistics are fitted before training.
        prediction: what `forward` returns, "x0", "epsilon", or "mean" (a clean unit delta from the conditioning alone).
        length: what changes predicted lengths, of a denoiser that is tuned.
    """

    shape: tuple[int, int]
    encoder: ConditioningEncoder
    prediction: str

    def __init__(self) -> None:
        super().__init__()
        self.length: LengthFactor | None = None

    def length_factor(self, encoded: Tensor) -> Tensor | float:
        """What predicted lengths are multiplied by: the encoded conditioning (B, E) to (B,); 1 for a denoiser that is not
        tuned."""
        return 1.0 if self.length is None else self.length(encoded)

    def encode(self, fields: Fields) -> Tensor:
        """What is constant during sampling: fields (B, …) to (B, E)."""
        return self.encoder(fields)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        """Ω_t (B, out, in), t (B,) and the encoded conditioning (B, E) to Ω̂_0 or ε̂ (B, out, in)."""
        raise NotImplementedError


class LengthFactor(nn.Module):
    """exp of an MLP of the encoded conditioning, (B, E) to (B,), between 1/8 and 8; it begins at 1.

    Of E numbers the first `dim` are the encoder's.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.body = dim, nn.Sequential(nn.SiLU(), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, encoded: Tensor) -> Tensor:
        found = self.body(encoded[:, : self.dim]).squeeze(1).float()
        return (LARGEST_LOG_FACTOR * torch.tanh(found / LARGEST_LOG_FACTOR)).exp()


def unit(deltas: Tensor) -> Tensor:
    """Unit deltas, δ / ‖δ‖ · sqrt(out·in), (B, out, in): direction alone, root-mean-square 1 (Eq. 3 up to the constant, so that
    the noise of unit variance meets data of unit variance); a zero delta stays zero."""
    rho = deltas.flatten(1).norm(dim=1).view(-1, 1, 1)
    return deltas / rho.clamp_min(torch.finfo(deltas.dtype).tiny) * (deltas[0].numel() ** 0.5)
