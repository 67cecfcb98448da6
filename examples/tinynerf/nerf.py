"""TinyNeRF (Murthy, 2020): ten encoding functions, three fully connected layers, and volume rendering of 32 samples a ray."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEAR, FAR, SAMPLES = 2.0, 6.0, 32
FREQUENCIES, HIDDEN = 10, 128


def encode(points: Tensor) -> Tensor:
    """γ(p) = (p, sin 2⁰p, cos 2⁰p, …, sin 2⁹p, cos 2⁹p), (…, 3) to (…, 63) (Mildenhall et al., 2021, Eq. 4, without its π)."""
    angles = points.unsqueeze(-2) * 2.0 ** torch.arange(FREQUENCIES, device=points.device).unsqueeze(1)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-2)
    return torch.cat([points, waves.flatten(-3)], dim=-1)


def depths_along(rays: Tensor, *, jitter: bool) -> Tensor:
    """A depth in each of 32 equal parts of [near, far]: its middle, or if `jitter` drawn anew: (…, 6) to (…, 32)."""
    shape = (*rays.shape[:-1], SAMPLES)
    place = torch.rand(shape, device=rays.device) if jitter else torch.full(shape, 0.5, device=rays.device)
    return NEAR + (torch.arange(SAMPLES, device=rays.device) + place) * ((FAR - NEAR) / SAMPLES)


class Compositing(nn.Module):
    """What each sample of a ray contributes to its colour, w_i = T_i (1 − exp(−σ_i δ_i)), T_i = exp(−Σ_{j<i} σ_j δ_j)
    (Mildenhall et al., 2021, Eq. 3); what no sample has stopped is black."""

    def forward(self, density: Tensor, depths: Tensor) -> Tensor:
        """Densities σ (…, S) at ascending depths (…, S), whose differences are δ, to weights (…, S)."""
        last = torch.full_like(depths[..., :1], (FAR - NEAR) / SAMPLES)
        thickness = density * torch.cat([depths.diff(dim=-1), last], dim=-1)
        return torch.exp(thickness - thickness.cumsum(-1)) * -torch.expm1(-thickness)


class TinyNeRF(nn.Module):
    """Position to colour and density, 63 → 128 → 128 → 4, rendered along rays; depths are jittered while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(3 + 3 * 2 * FREQUENCIES, HIDDEN)
        self.layer2, self.layer3 = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 4)
        self.compositing = Compositing()

    def forward(self, rays: Tensor) -> Tensor:
        """Rays (B, R, 6), origin and direction of each, to colours (B, R, 3) in [0, 1]."""
        depths = depths_along(rays, jitter=self.training)
        origin, direction = rays[..., None, :3], rays[..., None, 3:]
        hidden = F.relu(self.layer1(encode(origin + direction * depths.unsqueeze(-1))))
        out = self.layer3(F.relu(self.layer2(hidden)))
        weights = self.compositing(F.relu(out[..., 3]), depths)
        return (weights.unsqueeze(-1) * out[..., :3].sigmoid()).sum(-2)
