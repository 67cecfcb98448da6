"""Noise schedules, and the conversions between clean, noisy and noise."""

import functools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.foundation.errors import SettingsError

EPSILON, X0, MEAN = "epsilon", "x0", "mean"
TRAILING, LEADING = "trailing", "leading"

# Up to about this many numbers, the signal left at the last step, d·ᾱ_T, stays below 1 with the ddpm schedule.
LARGEST_UNSCALED = 24_000


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A noise schedule.

    Attributes:
        betas: (T,), float64.
        spacing: which steps a shorter sampler visits, "trailing" (ends at T − 1) or "leading" (begins at 0).
    """

    betas: Tensor
    spacing: str = TRAILING

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Cumulative product of 1 − β, ᾱ_t = Π_{k≤t} (1 − β_k), (T,) float64 (Alg. 1, line 8)."""
        return torch.cumprod(1 - self.betas, dim=0)

    @property
    def steps(self) -> int:
        """T, the number of diffusion steps."""
        return len(self.betas)

    def visited(self, sample_steps: int) -> list[int]:
        """The steps a sampler of `sample_steps` visits, from noise to clean.

        trailing: round(T − i·T/n) − 1; leading: i·⌊T/n⌋ in descending order (Lin et al., 2023, Table 2).

        Raises:
            SettingsError: more steps than T.
        """
        if sample_steps > self.steps:
            raise SettingsError(
                f"infer.sample_steps = {sample_steps}: the schedule has {self.steps} steps",
                f"take at most {self.steps}",
            )
        if self.spacing == TRAILING:
            return [round(self.steps - i * self.steps / sample_steps) - 1 for i in range(sample_steps)]
        return [i * (self.steps // sample_steps) for i in reversed(range(sample_steps))]


def linear_betas(first: float, last: float, steps: int) -> Tensor:
    """β_t = (first·(T − t) + last·(t − 1)) / (T − 1) for t = 1 … T (Alg. 1, line 8): (T,) float64."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def rescale_terminal(betas: Tensor, terminal_alpha_bar: float) -> Tensor:
    """Shift and scale sqrt(ᾱ) so that its first value stays and its last is sqrt(`terminal_alpha_bar`): betas (T,) to (T,).
    After Lin et al. (2023), Algorithm 1, who have 0 at the end."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    target = terminal_alpha_bar**0.5
    root = target + (root - root[-1]) * (root[0] - target) / (root[0] - root[-1])
    alpha_bar = root.square()
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def make_schedule(name: str, numel: int, prediction: str) -> NoiseSchedule:
    """The schedule of a setting, for deltas of d numbers.

    "ddpm" (ours): β 1e-4 … 2e-2, T = 1000 (Ho et al., 2020), trailing; where d·ᾱ_T would leave a signal (d above 24,000)
    rescaled, to none for `x0` and to d·ᾱ_T ≤ 1 for `epsilon`. "authors": β 1e-6 … 1e-2, T = 1000, leading, as in their code.
    "paper": β 1e-4 … 1e-2, T = 10, as in their text; it ends at ᾱ ≈ 0.95, far from pure noise.
    """
    if name == "authors":
        return NoiseSchedule(linear_betas(1e-6, 1e-2, 1000), LEADING)
    if name == "paper":
        return NoiseSchedule(linear_betas(1e-4, 1e-2, 10))
    betas = linear_betas(1e-4, 2e-2, 1000)
    if numel > LARGEST_UNSCALED:
        betas = rescale_terminal(betas, 0.0 if prediction == X0 else 1.0 / numel)
    return NoiseSchedule(betas)


def schedule_warning(name: str, numel: int) -> str:
    """What to know of a schedule that does not begin from pure noise; "" for ours."""
    if name == "ddpm":
        return ""
    schedule = make_schedule(name, numel, EPSILON)
    first = float(schedule.alpha_bar[schedule.visited(10)[0]])
    signal = numel * first / (1 - first)
    return (
        f"schedule = {name!r} begins sampling where d·ᾱ/(1 − ᾱ) = {signal:.3g}; "
        f"it reproduces the {name}, the default 'ddpm' samples better"
    )


@functools.lru_cache(maxsize=8)
def _placed(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept: a copy to a GPU in every step would be waited for in every step.
    return values.to(dtype).to(device)


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """`values` at steps t (B,), shaped to multiply `like` (B, …)."""
    return _placed(values, like.dtype, like.device)[t].view(-1, *[1] * (like.dim() - 1))


def add_noise(clean: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """Ω_t = sqrt(ᾱ_t) Ω_0 + sqrt(1 − ᾱ_t) ε (Eq. 8, whose printed sqrt(1 − ᾱ_t²) is a slip: it would not keep unit variance);
    Ω_0 and ε are (B, …), t steps from 0, (B,) int, ᾱ (T,)."""
    signal = _at(alpha_bar, t, clean)
    return signal.sqrt() * clean + (1 - signal).sqrt() * noise


def to_x0(output: Tensor, noisy: Tensor, t: Tensor, alpha_bar: Tensor, prediction: str) -> Tensor:
    """The clean unit delta a denoiser's output (B, …) stands for: itself, or (Ω_t − sqrt(1 − ᾱ_t) ε̂) / sqrt(ᾱ_t) where that is
    "epsilon"; Ω_t is (B, …), t (B,) int, ᾱ (T,)."""
    if prediction != EPSILON:
        return output
    signal = _at(alpha_bar, t, noisy)
    return (noisy - (1 - signal).sqrt() * output) / signal.sqrt()
