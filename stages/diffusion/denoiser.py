"""What every denoiser is: a network that sees a noisy unit delta, t and the conditioning."""

import torch
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, Fields


class Denoiser(nn.Module):
    """The interface: `encode` once per sample, then `forward` at every step.

    Attributes:
        shape: (out, in) of a delta.
        encoder: the conditioning's encoder, whose statistics are fitted before training.
        prediction: what `forward` returns, "x0", "epsilon", or "mean" (a clean unit delta from the conditioning alone).
    """

    shape: tuple[int, int]
    encoder: ConditioningEncoder
    prediction: str

    def encode(self, fields: Fields) -> Tensor:
        """What is constant during sampling: fields (B, …) to (B, E)."""
        return self.encoder(fields)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        """Ω_t (B, out, in), t (B,) and the encoded conditioning (B, E) to Ω̂_0 or ε̂ (B, out, in)."""
        raise NotImplementedError


def unit(deltas: Tensor) -> Tensor:
    """Unit deltas, δ / ‖δ‖ · sqrt(out·in), (B, out, in): direction alone, root-mean-square 1 (Eq. 3 up to the constant, so that
    the noise of unit variance meets data of unit variance); a zero delta stays zero."""
    rho = deltas.flatten(1).norm(dim=1).view(-1, 1, 1)
    return deltas / rho.clamp_min(torch.finfo(deltas.dtype).tiny) * (deltas[0].numel() ** 0.5)
