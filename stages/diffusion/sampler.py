"""The reverse process: from pure noise to a unit delta (Alg. 2)."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from stages.diffusion.schedule import EPSILON, MEAN, NoiseSchedule, to_x0

DDIM, DDPM = "ddim", "ddpm"

# (noisy (B, …), t (B,)) -> the denoiser's output (B, …)
Denoise = Callable[[Tensor, Tensor], Tensor]


def ddim_step(clean: Tensor, noisy: Tensor, alpha_bar_t: float, alpha_bar_next: float) -> Tensor:
    """Ω_s = sqrt(ᾱ_s) Ω̂_0 + sqrt(1 − ᾱ_s) ε̂ with ε̂ = (Ω_t − sqrt(ᾱ_t) Ω̂_0) / sqrt(1 − ᾱ_t), as multiples of Ω̂_0 and Ω_t,
    (B, …) each, for the next step s < t (Song et al., 2020, Eq. 12 with η = 0)."""
    of_noisy = ((1 - alpha_bar_next) / (1 - alpha_bar_t)) ** 0.5
    of_clean = alpha_bar_next**0.5 - of_noisy * alpha_bar_t**0.5
    return (of_noisy * noisy).add_(clean, alpha=of_clean)


def ddpm_step(clean: Tensor, noisy: Tensor, alpha_bar_t: float, alpha_bar_next: float, noise: Tensor) -> Tensor:
    """One ancestral step, mean of q(Ω_s | Ω_t, Ω̂_0) plus sqrt(β̃) times noise (Ho et al., 2020, Eq. 6 and 7; Alg. 2, line 5).

    With α = ᾱ_t/ᾱ_s: mean = sqrt(ᾱ_s)(1 − α)/(1 − ᾱ_t) Ω̂_0 + sqrt(α)(1 − ᾱ_s)/(1 − ᾱ_t) Ω_t, β̃ = (1 − ᾱ_s)/(1 − ᾱ_t)(1 − α).
    The paper prints 1 − α_{t−1} in β̃ and no noise beside its root; both are slips. Ω̂_0, Ω_t and the standard normal noise are
    (B, …); ᾱ_s is that of the next step s < t.
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

    def __len__(self) -> int:
        """Rows."""
        return len(self._generators)

    def draw(self) -> Tensor:
        """The next draw of every row: (B, *shape)."""
        return self._next().to(self._device, non_blocking=self._device.type == "cuda")

    def drawn(self, count: int) -> "DrawnNoise":
        """The next draws, made now, as by a thread that has nothing else to do."""
        return DrawnNoise([self._next() for _ in range(count)], self._device)

    def _next(self) -> Tensor:
        """In host memory, page-locked for a GPU; in single precision, whatever the user's code has made torch's default."""
        pinned = self._device.type == "cuda"
        made = torch.empty(len(self._generators), *self._shape, dtype=torch.float32, device="cpu", pin_memory=pinned)
        for row, source in zip(made, self._generators, strict=True):
            row.normal_(generator=source)
        return made


class DrawnNoise(Noise):
    """Draws that are made already, (B, …) each, in host memory; page-locked they are copied while a GPU computes."""

    def __init__(self, draws: Sequence[Tensor], device: torch.device) -> None:
        self._draws, self._device, self._drawn = draws, device, 0

    def __len__(self) -> int:
        return len(self._draws[0])

    def take(self, rows: slice) -> "DrawnNoise":
        """Those of some rows, from the first draw on."""
        return DrawnNoise([draw[rows] for draw in self._draws], self._device)

    def _next(self) -> Tensor:
        self._drawn += 1
        return self._draws[self._drawn - 1]


def in_the_ball(clean: Tensor) -> Tensor:
    """Ω̂_0 of a root mean square of at most 1, (B, …): a mean of unit deltas is no longer than they are.

    A longer one is an error of the denoiser, which the next pass would be shown and make larger; tuned by the direction alone,
    nothing else holds its length.
    """
    squares = clean.flatten(1).square().mean(1)
    return clean * squares.clamp_min(1).rsqrt().view(-1, *[1] * (clean.dim() - 1))


def estimates(
    denoise: Denoise,
    schedule: NoiseSchedule,
    first: Tensor,
    *,
    prediction: str,
    sample_steps: int,
    sampler: str = DDIM,
    noise: Noise | None = None,
) -> Iterator[Tensor]:
    """The reverse process, pass by pass (Alg. 2). Each pass is computed when it is asked for, with a gradient or without as
    torch is set then.

    Args:
        first: the noise to begin from, (B, …).
        prediction: what the denoiser outputs, "x0" or "epsilon"; or "mean": one pass, no noise.
        sampler: "ddim" (deterministic after the first noise) or "ddpm" (ancestral).
        noise: of each ancestral step.

    Yields:
        Ω̂_0 as each pass predicts it, (B, …); the last one is the sample.
    """
    if prediction == MEAN:
        last = torch.full((len(first),), schedule.steps - 1, device=first.device)
        yield denoise(torch.zeros_like(first), last)
        return
    alpha_bar, visited, noisy = schedule.alpha_bar, schedule.visited(sample_steps), first
    for step, following in itertools.zip_longest(visited, visited[1:]):
        t = torch.full((len(noisy),), step, dtype=torch.long, device=noisy.device)
        clean = to_x0(denoise(noisy, t), noisy, t, alpha_bar, prediction)
        # A noise predicted badly at the noisiest steps stands for any x0, as the textbook has it.
        clean = clean if prediction == EPSILON else in_the_ball(clean)
        yield clean
        if following is not None:
            now, then = float(alpha_bar[step]), float(alpha_bar[following])
            ancestral = sampler == DDPM
            noisy = ddpm_step(clean, noisy, now, then, noise.draw()) if ancestral else ddim_step(clean, noisy, now, then)


def sample(
    denoise: Denoise, schedule: NoiseSchedule, noise: Noise, *, prediction: str, sampler: str, sample_steps: int
) -> Tensor:
    """Draw clean unit deltas (B, …), the last of `estimates`; `noise` is the source of all noise."""
    options = {"prediction": prediction, "sample_steps": sample_steps, "sampler": sampler, "noise": noise}
    (clean,) = deque(estimates(denoise, schedule, noise.draw(), **options), maxlen=1)
    return clean
