"""The denoiser that trains on a CPU whatever the deltas are like: a residual MLP on the flattened delta."""

import torch.nn.functional as F
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, positional_encoding
from stages.diffusion.denoiser import Denoiser


class MlpDenoiser(Denoiser):
    """A residual MLP on the flattened unit delta, `shape` (out, in); the encoder gives `width` numbers.

    It is narrower than the delta, so it cannot reproduce the noise: it is meant to predict x0.
    """

    def __init__(self, shape: tuple[int, int], encoder: ConditioningEncoder, width: int, blocks: int, prediction: str) -> None:
        super().__init__()
        self.shape, self.prediction, self.width = tuple(shape), prediction, width
        numel = shape[0] * shape[1]
        self.encoder = encoder
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.enter = nn.Linear(numel, width)
        self.blocks = nn.ModuleList(ModulatedBlock(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, numel))
        # A network that begins at zero begins at the best constant answer of a distribution that is symmetric about it.
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        e = self.embed(encoded + positional_encoding(t, self.width))
        hidden = self.enter(noisy.flatten(1)) + e
        for block in self.blocks:
            hidden = block(hidden, e)
        return self.leave(hidden).view(-1, *self.shape)


class ModulatedBlock(nn.Module):
    """h + W2 silu(W1 (norm(h)·(1 + scale(e)) + shift(e)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulate = nn.Linear(width, 2 * width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, e: Tensor) -> Tensor:
        """h (B, width) and e (B, width) to (B, width)."""
        scale, shift = self.modulate(e).chunk(2, dim=1)
        return hidden + self.outer(F.silu(self.inner(self.norm(hidden) * (1 + scale) + shift)))
