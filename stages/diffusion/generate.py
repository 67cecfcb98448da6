"""From conditioning to deltas: sample a unit delta for each input and member, and give it the predicted length."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.denoiser import Denoiser, unit
from stages.diffusion.sampler import DDPM, Noise, sample
from stages.diffusion.scale import ScaleNetwork
from stages.diffusion.schedule import MEAN, NoiseSchedule
from stages.foundation.deltas import Deltas
from stages.foundation.memory import AtOnce
from stages.foundation.seeds import generator


@dataclass(frozen=True)
class DeltaGenerator:
    """Draws deltas g(x, I(x)) = ρ(x, I(x)) · g_u(x, I(x)) (Eq. 2).

    Attributes:
        denoiser, scale: trained, in eval mode.
        seed: the run's; the noise of input i and member m depends on seed, i and m alone.
        sampler: "ddim" or "ddpm".
        strength: factor on the predicted ρ.
        at_once: members that the denoiser is given at once.
        half: the denoiser computes in bfloat16 autocast.
        vectors: the denoiser draws output vectors, (out, 1).
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    scale: ScaleNetwork
    seed: int
    sampler: str
    sample_steps: int
    strength: float
    at_once: AtOnce = field(default_factory=lambda: AtOnce(1 << 30))
    half: bool = False
    vectors: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def draws(self) -> int:
        """How often a sample draws noise."""
        if self.sampler != DDPM or self.denoiser.prediction == MEAN:
            return 1
        return len(self.schedule.visited(self.sample_steps))

    def noise(self, rows: Sequence[int], members: range) -> Noise:
        """Of inputs and members, (B·E, out, in), or (B·E, out, 1)."""
        generators = [generator(self.seed, "infer", row, member) for row in rows for member in members]
        return Noise(generators, self.denoiser.shape, self.device)

    @torch.no_grad()
    def __call__(
        self, fields: Fields, rows: Sequence[int], members: range, noise: Noise | None = None, seen: Tensor | None = None
    ) -> tuple[Deltas, Tensor]:
        """Deltas for B inputs with conditioning (B, …) and E members, all in one batch; the conditioning is encoded once. Their
        noise may have been drawn before. `seen` is what the layer sees of the inputs, (B, …), where output vectors are drawn.

        Returns:
            deltas (B, E), each of norm strength · ρ̂ (the sample is renormalised: Eq. 3), and ρ̂ (B,).
        """
        count, shape = len(members), self.denoiser.shape
        encoded = self.denoiser.encode(fields)
        rho = self.denoiser.length(encoded, self.scale(fields).exp())
        encoded = encoded.repeat_interleave(count, dim=0)

        def denoise(noisy: Tensor, t: Tensor) -> Tensor:
            def some(part: range) -> Tensor:
                given = (value[part.start : part.stop] for value in (noisy, t, encoded))
                with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.half):
                    return self.denoiser(*given).float()

            found = list(self.at_once.each(range(len(noisy)), some))
            return found[0] if len(found) == 1 else torch.cat(found)

        sampled = sample(
            denoise,
            self.schedule,
            self.noise(rows, members) if noise is None else noise,
            prediction=self.denoiser.prediction,
            sampler=self.sampler,
            sample_steps=self.sample_steps,
        )
        length = self.strength * rho / (shape[0] * shape[1]) ** 0.5
        deltas = unit(sampled).view(len(rows), count, *shape) * length.view(-1, 1, 1, 1)
        if not self.vectors:
            return Deltas(deltas), rho
        # u hᵀ has the norm ‖u‖ ‖h‖: of a vector h of length 1 that of u. Where h is zero, so is the delta.
        return Deltas(deltas.squeeze(3), F.normalize(seen.flatten(1).float(), dim=1)), rho
