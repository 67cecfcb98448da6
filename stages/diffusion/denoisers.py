"""Denoisers: networks that see a noisy unit delta, t and the conditioning. One interface, a preset for each."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.diffusion.conditioning import ConditioningEncoder, Fields, positional_encoding
from stages.errors import ArtifactError


class Denoiser(nn.Module):
    """The interface: `encode` once per sample, then `forward` at every step.

    Attributes:
        encoder: the conditioning's encoder, whose statistics are fitted before training.
        prediction: what `forward` returns, "x0", "epsilon", or "mean" (a clean unit delta from the conditioning alone).
    """

    encoder: ConditioningEncoder
    prediction: str

    def encode(self, fields: Fields) -> Tensor:
        """The part of e that is constant during sampling: fields (B, …) to (B, E)."""
        return self.encoder(fields)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        """Ω_t (B, out, in), t (B,) and the encoded conditioning (B, E) to Ω̂_0 or ε̂ (B, out, in)."""
        raise NotImplementedError


class MlpDenoiser(Denoiser):
    """A residual MLP on the flattened unit delta.

    It is narrower than the delta, so it cannot reproduce the noise: it is meant to predict x0.

    Args:
        shape: (out, in) of a delta.
        widths: numbers of each conditioning field.
        width: hidden width.
        blocks: residual blocks.
        prediction: "x0" or "epsilon".
    """

    def __init__(self, shape: tuple[int, int], widths: dict[str, int], width: int, blocks: int, prediction: str) -> None:
        super().__init__()
        self.shape, self.prediction, self.width = tuple(shape), prediction, width
        numel = shape[0] * shape[1]
        self.encoder = ConditioningEncoder(widths, width)
        self.embed = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.enter = nn.Linear(numel, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, numel))
        # A network that begins at zero begins at the best constant answer of a distribution that is symmetric about it.
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, noisy: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        """As the interface says."""
        e = self.embed(encoded + positional_encoding(t, self.width))
        hidden = self.enter(noisy.flatten(1)) + e
        for block in self.blocks:
            hidden = block(hidden, e)
        return self.leave(hidden).view(-1, *self.shape)


class _Block(nn.Module):
    """h + W2 silu(W1 (norm(h)·(1 + scale(e)) + shift(e)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulate = nn.Linear(width, 2 * width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.modulate(e).chunk(2, dim=1)
        return hidden + self.outer(F.silu(self.inner(self.norm(hidden) * (1 + scale) + shift)))


def resolve_preset(preset: str) -> str:
    """The preset `auto` stands for: `mlp`, the one that trains in minutes on a CPU."""
    return "mlp" if preset == "auto" else preset


def resolve_prediction(prediction: str, preset: str) -> str:
    """The prediction type `auto` stands for: x0 for the MLP."""
    return {"mlp": "x0"}[preset] if prediction == "auto" else prediction


def resolve_width(numel: int) -> int:
    """The hidden width `auto` stands for: the power of two above 4·sqrt(numel), between 128 and 1,024."""
    return min(1024, max(128, 2 ** math.ceil(math.log2(4 * math.sqrt(numel)))))


def make_denoiser(description: dict[str, Any]) -> Denoiser:
    """Build the denoiser a description (kept beside its weights) stands for.

    Args:
        description: preset, shape, fields (name to width), width, blocks, prediction.

    Raises:
        ArtifactError: it lacks an entry, or names an unknown preset.
    """
    try:
        if description["preset"] == "mlp":
            return MlpDenoiser(
                tuple(description["shape"]),
                description["fields"],
                description["width"],
                description["blocks"],
                description["prediction"],
            )
    except KeyError as error:
        raise ArtifactError(f"the denoiser's description lacks {error}", "redo it with: ocd train-diffusion --force") from error
    raise ArtifactError(
        f"the denoiser's preset is {description['preset']!r}, expected mlp", "redo it with: ocd train-diffusion --force"
    )


def unit(deltas: Tensor) -> Tensor:
    """Unit deltas, δ / ‖δ‖ · sqrt(out·in): direction alone, root-mean-square 1 (Eq. 3 up to the constant, so that the noise of
    unit variance meets data of unit variance).

    Args:
        deltas: (B, out, in); a zero delta stays zero.
    """
    rho = deltas.flatten(1).norm(dim=1).view(-1, 1, 1)
    return deltas / rho.clamp_min(torch.finfo(deltas.dtype).tiny) * (deltas[0].numel() ** 0.5)
