"""The reverse process: from pure noise to a unit delta (Alg. 2)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stages.diffusion.schedule import MEAN, NoiseSchedule, to_x0

DDIM, DDPM = "ddim", "ddpm"

# (noisy (B, …), t (B,)) -> the denoiser's output (B, …)
Denoise = Callable[[Tensor, Tensor], Tensor]


def ddim_step(clean: Tensor, noisy: Tensor, alpha_bar_t: float, alpha_bar_next: float) -> Tensor:
    """Ω_s = sqrt(ᾱ_s) Ω̂_0 + sqrt(1 − ᾱ_s) ε̂ with ε̂ = (Ω_t − sqrt(ᾱ_t) Ω̂_0) / sqrt(1 − ᾱ_t), as multiples of Ω̂_0 and Ω_t
    (Song et al., 2020, Eq. 12 with η = 0).

    Args:
        clean: predicted Ω̂_0, (B, …).
        noisy: Ω_t, (B, …).
        alpha_bar_t: ᾱ_t.
        alpha_bar_next: ᾱ_s of the next step s < t; 1 at the end.
    """
    if alpha_bar_next == 1.0:
        return clean
    of_noisy = ((1 - alpha_bar_next) / (1 - alpha_bar_t)) ** 0.5
    of_clean = alpha_bar_next**0.5 - of_noisy * alpha_bar_t**0.5
    return (of_noisy * noisy).add_(clean, alpha=of_clean)


def ddpm_step(clean: Tensor, noisy: Tensor, alpha_bar_t: float, alpha_bar_next: float, noise: Tensor) -> Tensor:
    """One ancestral step, mean of q(Ω_s | Ω_t, Ω̂_0) plus sqrt(β̃) times noise (Ho et al., 2020, Eq. 6 and 7; Alg. 2, line 5).

    With α = ᾱ_t/ᾱ_s: mean = sqrt(ᾱ_s)(1 − α)/(1 − ᾱ_t) Ω̂_0 + sqrt(α)(1 − ᾱ_s)/(1 − ᾱ_t) Ω_t, β̃ = (1 − ᾱ_s)/(1 − ᾱ_t)(1 − α).
    The paper prints 1 − α_{t−1} in β̃ and no noise beside its root; both are slips.

    Args:
        clean: Ω̂_0, (B, …).
        noisy: Ω_t, (B, …).
        alpha_bar_t: ᾱ_t.
        alpha_bar_next: ᾱ_s; at the end 1, where no noise is added.
        noise: standard normal, (B, …).
    """
    alpha = alpha_bar_t / alpha_bar_next
    of_clean = alpha_bar_next**0.5 * (1 - alpha) / (1 - alpha_bar_t)
    of_noisy = alpha**0.5 * (1 - alpha_bar_next) / (1 - alpha_bar_t)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar_t) * (1 - alpha)
    return of_clean * clean + of_noisy * noisy + variance**0.5 * noise


class Noise:
    """Standard normal draws (B, …) in which every row has a generator of its own, so that no row depends on its batch."""

    def __init__(self, generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> None:
        self._generators, self._shape, self._device = generators, shape, device

    def draw(self) -> Tensor:
        """The next draw of every row: (B, *shape)."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators]).to(self._device)


def sample(
    denoise: Denoise, schedule: NoiseSchedule, noise: Noise, *, prediction: str, sampler: str, sample_steps: int
) -> Tensor:
    """Draw clean unit deltas (Alg. 2).

    Args:
        denoise: the denoiser with its conditioning.
        schedule: the noise schedule it was trained with.
        noise: the source of the first noise, and of that of each ancestral step.
        prediction: what the denoiser outputs, "x0" or "epsilon"; or "mean": one pass, no noise.
        sampler: "ddim" (deterministic after the first noise) or "ddpm" (ancestral).
        sample_steps: steps to take.

    Returns:
        (B, …).
    """
    alpha_bar = schedule.alpha_bar
    if prediction == MEAN:
        nothing = torch.zeros_like(noise.draw())
        return denoise(nothing, torch.full((len(nothing),), schedule.steps - 1, device=nothing.device))
    visited = schedule.visited(sample_steps)
    noisy = noise.draw()
    for index, step in enumerate(visited):
        t = torch.full((len(noisy),), step, dtype=torch.long, device=noisy.device)
        following = float(alpha_bar[visited[index + 1]]) if index + 1 < len(visited) else 1.0
        clean = to_x0(denoise(noisy, t), noisy, t, alpha_bar, prediction)
        if sampler == DDIM:
            noisy = ddim_step(clean, noisy, float(alpha_bar[step]), following)
        elif following == 1.0:
            noisy = clean
        else:
            noisy = ddpm_step(clean, noisy, float(alpha_bar[step]), following, noise.draw())
    return noisy
