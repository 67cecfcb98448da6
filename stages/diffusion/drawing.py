"""Deltas drawn while the denoiser is trained: the reverse process, with the gradient of its last pass alone."""

import torch
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.denoiser import Denoiser
from stages.diffusion.sampler import ddim_step
from stages.diffusion.schedule import MEAN, NoiseSchedule, to_x0

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
    encoded, alpha_bar, count = denoiser.encode(fields), schedule.alpha_bar, len(noise)
    if denoiser.prediction == MEAN:
        last = torch.full((count,), schedule.steps - 1, device=noise.device)
        return _unit(denoiser(torch.zeros_like(noise), last, encoded).float())
    visited, noisy = schedule.visited(sample_steps), noise
    for index, step in enumerate(visited[:passes]):
        t, is_last = torch.full((count,), step, device=noise.device), index == passes - 1
        with torch.set_grad_enabled(is_last and torch.is_grad_enabled()):
            output = denoiser(noisy, t, encoded if is_last else encoded.detach()).float()
            clean = to_x0(output, noisy, t, alpha_bar, denoiser.prediction)
            if not is_last:
                noisy = ddim_step(clean, noisy, float(alpha_bar[step]), float(alpha_bar[visited[index + 1]]))
    return _unit(clean)


def _unit(values: Tensor) -> Tensor:
    """Of unit root-mean-square, (B, out, in); a denoiser begins with zeros, where that has no gradient: what is smaller than a
    tenth is made ten times as large."""
    return values * values.flatten(1).square().mean(1).clamp_min(SMALLEST_SQUARE).rsqrt().view(-1, 1, 1)
