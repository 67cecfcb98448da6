"""Deltas drawn while the denoiser is trained: the reverse process, with the gradient of its last pass alone."""

import torch
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.sampler import estimates
from stages.diffusion.schedule import MEAN, NoiseSchedule

SMALLEST_SQUARE = 1e-2


def drawn_with_gradient(
    denoiser: Denoiser, schedule: NoiseSchedule, fields: Fields, noise: Tensor, passes: int, sample_steps: int
) -> Tensor:
    """Unit deltas Ω̂_0 as the denoiser sees them after some steps of DDIM (Alg. 2), on the way that it takes itself.

    The gradient is that of the last pass: what led there counts as given (Clark et al., 2023, "Directly fine-tuning diffusion
    models on differentiable rewards", K = 1).

    Args:
        denoiser: predicts x0, epsilon or the mean, which takes one pass.
        schedule: the noise schedule.
        fields: conditioning, each (B, …).
        noise: the first noise, (B, out, in).
        passes: of the denoiser, 1 … `sample_steps`.
        sample_steps: the sampler's length.

    Returns:
        (B, out, in), of unit root-mean-square.
    """
    encoded = denoiser.encode(fields)
    found = estimates(
        lambda noisy, t: denoiser(noisy, t, encoded).float(),
        schedule,
        noise,
        prediction=denoiser.prediction,
        sample_steps=sample_steps,
    )
    with torch.no_grad():
        for _ in range(0 if denoiser.prediction == MEAN else passes - 1):
            next(found)
    return _unit(next(found))


def _unit(values: Tensor) -> Tensor:
    """Of unit root-mean-square, (B, out, in); a denoiser begins with zeros, where that has no gradient: what is smaller than a
    tenth is made ten times as large."""
    return values * values.flatten(1).square().mean(1).clamp_min(SMALLEST_SQUARE).rsqrt().view(-1, 1, 1)
