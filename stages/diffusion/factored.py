"""A denoiser that works on a delta's factors: fast on a CPU, for deltas nearly of low rank, as those of one sample are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, Fields, positional_encoding
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.mlp import ModulatedBlock


class FactoredDenoiser(Denoiser):
    """Looks at a noisy delta along a few directions that the conditioning gives, and answers with a sum of outer products.

    The gradient of one sample at a Linear is the outer product of what comes back and what the layer saw, so directions u_k of
    the outputs and v_k of the inputs that are linear in the conditioning lie near the delta's own. Noise of d = out·in numbers
    seen along v_k is noise of `out` numbers. With Ω v_k / in and Ωᵀ u_k / out, k = 1 … K, beside the directions themselves, a
    residual MLP answers Ω̂_0 = Σ_k a_k b_kᵀ / sqrt(K), where a and b are mixtures of all of these and a correction.

    Args:
        shape: (out, in) of a delta.
        encoder: of the conditioning, to `width` numbers.
        rank: directions K on each side, and outer products of the answer.
        prediction: "x0"; noise is of full rank and out of reach.
    """

    def __init__(
        self, shape: tuple[int, int], encoder: ConditioningEncoder, width: int, blocks: int, rank: int, prediction: str
    ) -> None:
        super().__init__()
        self.shape, self.prediction, self.width, self.rank = tuple(shape), prediction, width, rank
        self.encoder, self._both = encoder, rank * (shape[0] + shape[1])
        self.directions = nn.ModuleDict(
            {f"of_{name}": nn.Linear(numbers, self._both, bias=False) for name, numbers in encoder.normalise.widths.items()}
        )
        self.bend = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, self._both))
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.enter = nn.Linear(2 * self._both, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU())
        self.mixture, self.correction = nn.Linear(width, 4 * rank * rank), nn.Linear(width, self._both)
        # Begins by predicting zero, as the others do: one of two factors is zero.
        for layer in (self.mixture, self.correction):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, fields: Fields) -> Tensor:
        """e, then u_k, then v_k, each of unit root-mean-square: fields (B, …) to (B, width + K·(out + in))."""
        e, normalised = self.encoder(fields), self.encoder.normalise(fields)
        both = torch.stack([self.directions[f"of_{name}"](value) for name, value in normalised.items()]).sum(0) + self.bend(e)
        u, v = self._apart(both)
        return torch.cat([e, *((F.normalize(side, dim=2) * side.shape[2] ** 0.5).flatten(1) for side in (u, v))], dim=1)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        e, both = encoded.split([self.width, self._both], dim=1)
        u, v = self._apart(both)
        left = torch.bmm(v, noisy.to(v).transpose(1, 2)) / self.shape[1]
        right = torch.bmm(u, noisy.to(u)) / self.shape[0]
        e = self.embed(e + positional_encoding(t, self.width))
        hidden = self.enter(torch.cat([both, left.flatten(1), right.flatten(1)], dim=1)) + e
        for block in self.blocks:
            hidden = block(hidden, e)
        hidden = self.leave(hidden)
        of_u, of_left, of_v, of_right = self.mixture(hidden).view(-1, 4, self.rank, self.rank).unbind(1)
        more_u, more_v = self._apart(self.correction(hidden))
        a = more_u + torch.bmm(of_u, u) + torch.bmm(of_left, left)
        # v itself is where b begins, so that the answer moves away from zero as soon as a does.
        b = more_v + v + torch.bmm(of_v, v) + torch.bmm(of_right, right)
        return torch.bmm(a.transpose(1, 2), b) / self.rank**0.5

    def _apart(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K·(out + in)) as (B, K, out) and (B, K, in)."""
        u, v = both.split([self.rank * side for side in self.shape], dim=1)
        return u.unflatten(1, (self.rank, -1)), v.unflatten(1, (self.rank, -1))
