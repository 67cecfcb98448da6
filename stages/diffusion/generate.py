"""From conditioning to deltas: sample a unit delta for each input and member, and give it the predicted length."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.denoiser import Denoiser, unit
from stages.diffusion.sampler import Noise, sample
from stages.diffusion.scale import ScaleNetwork
from stages.diffusion.schedule import NoiseSchedule
from stages.foundation.seeds import generator


@dataclass(frozen=True)
class DeltaGenerator:
    """Draws deltas g(x, I(x)) = ρ(x, I(x)) · g_u(x, I(x)) (Eq. 2).

    Attributes:
        denoiser, scale: trained, in eval mode.
        seed: the run's; the noise of input i and member m depends on seed, i and m alone.
        sampler: "ddim" or "ddpm".
        strength: factor on the predicted ρ.
        most_rows: members that the denoiser is given at once.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    scale: ScaleNetwork
    seed: int
    sampler: str
    sample_steps: int
    strength: float
    most_rows: int = 1 << 30

    @torch.no_grad()
    def __call__(self, fields: Fields, rows: list[int], members: range) -> tuple[Tensor, Tensor]:
        """Deltas for B inputs with conditioning (B, …) and E members, all in one batch; the conditioning is encoded once.

        Returns:
            deltas (B, E, out, in), each of norm strength · ρ̂ (the sample is renormalised: Eq. 3), and ρ̂ (B,).
        """
        device = next(self.denoiser.parameters()).device
        count, shape = len(members), self.denoiser.shape
        noise = Noise([generator(self.seed, "infer", row, member) for row in rows for member in members], shape, device)
        encoded = self.denoiser.encode(fields).repeat_interleave(count, dim=0)

        def denoise(noisy: Tensor, t: Tensor) -> Tensor:
            parts = zip(*(value.split(self.most_rows) for value in (noisy, t, encoded)), strict=True)
            found = [self.denoiser(*part) for part in parts]
            return found[0] if len(found) == 1 else torch.cat(found)

        sampled = sample(
            denoise,
            self.schedule,
            noise,
            prediction=self.denoiser.prediction,
            sampler=self.sampler,
            sample_steps=self.sample_steps,
        )
        rho = self.scale(fields).exp()
        length = self.strength * rho / (shape[0] * shape[1]) ** 0.5
        deltas = unit(sampled).view(len(rows), count, *shape) * length.view(-1, 1, 1, 1)
        return deltas, rho
