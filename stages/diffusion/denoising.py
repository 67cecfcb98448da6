"""Training a denoiser (Alg. 1), judging it on held-out deltas, and drawing with it while it is trained."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stages.diffusion.conditioning import Fields
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import Denoiser, unit
from stages.diffusion.sampler import DDIM, Noise, estimates, sample
from stages.diffusion.schedule import EPSILON, MEAN, NoiseSchedule, add_noise, to_x0
from stages.foundation.seeds import generator

SAMPLED_ROWS, SAMPLED_STEPS = 64, 10
SMALLEST_SQUARE = 1e-2
# Fewer samples tell nothing of the conditioning's use; and a gain in cosine that, for all that they tell, may be larger than
# this is not ruled out. Cosines of deltas that are one vector up or down, as a regression's, have a standard error of 0.13 over
# 64 samples.
FEWEST_COMPARED, WORTH_HAVING = 10, 0.3


def denoising_errors(denoiser: Denoiser, schedule: NoiseSchedule, rows: DeltaBatch, t: Tensor, noise: Tensor) -> Tensor:
    """‖ε − ε̂‖² or ‖Ω_0 − Ω̂_0‖², mean over numbers, for each sample, (B,) (Eq. 9, Alg. 1 lines 7 to 10).

    Args:
        rows: B samples with their deltas, of any length: the direction counts.
        t: steps from 0, (B,) int.
        noise: ε, (B, out, in).
    """
    clean = unit(rows.deltas)
    noisy, t = noised(denoiser, schedule, clean, t, noise)
    output = denoiser(noisy, t, denoiser.encode(rows.fields)).float()
    return F.mse_loss(output, noise if denoiser.prediction == EPSILON else clean, reduction="none").flatten(1).mean(1)


def noised(denoiser: Denoiser, schedule: NoiseSchedule, clean: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What a denoiser is shown of clean unit deltas (B, out, in): Ω_t and t. One that predicts the mean is shown zeros, always
    at step T − 1: all it has to go by is the conditioning, g_u(x, I(x)) of Eq. 1."""
    if denoiser.prediction == MEAN:
        return torch.zeros_like(clean), torch.full_like(t, schedule.steps - 1)
    return add_noise(clean, noise, t, schedule.alpha_bar), t


def step_draws(count: int, shape: tuple[int, ...], steps: int, *seed: str | int) -> tuple[Tensor, Tensor]:
    """t ~ Uniform(0 … T − 1), (count,), and ε ~ N(0, 1), (count, *shape), of one training step (Alg. 1, line 7)."""
    draw = generator(*seed)
    return torch.randint(steps, (count,), generator=draw), torch.randn(count, *shape, generator=draw)


@torch.no_grad()
def held_out_figures(
    denoiser: Denoiser, schedule: NoiseSchedule, held_out: DeltaBatch, seed: int, size: int = 128
) -> dict[str, float]:
    """Figures of a denoiser on held-out samples, `size` at once, the same draws every time.

    Returns:
        score: mean squared error of Ω̂_0, at most 1 a sample, over steps spread evenly from 0 to T − 1; predicting zero gives 1;
        cosine: of a generated delta with the true one, mean over up to 64 samples;
        cosine_shuffled: the same when each sample is given another one's conditioning;
        cosine_error: standard error of the mean difference between the two, nan of a single sample.
    """
    denoiser.eval()
    count, shape = len(held_out), tuple(held_out.deltas.shape[1:])
    device = held_out.deltas.device
    t = (torch.arange(count) * schedule.steps // count).to(device)
    total = 0.0
    for part in torch.arange(count, device=device).split(size):
        rows = held_out.take(part)
        clean = unit(rows.deltas)
        noise = Noise([generator(seed, "train-diffusion", "held-out", i) for i in part.tolist()], shape, device).draw()
        noisy, steps = noised(denoiser, schedule, clean, t[part], noise)
        output = denoiser(noisy, steps, denoiser.encode(rows.fields))
        error = to_x0(output, noisy, steps, schedule.alpha_bar, denoiser.prediction) - clean
        # A noise predicted badly at the noisiest steps stands for any x0; no error counts for more than predicting zero.
        total += float(error.flatten(1).square().mean(1).clamp_max(1.0).double().sum())
    few = held_out.take(torch.arange(min(count, SAMPLED_ROWS), device=device))
    # By half: rows of one sample follow one another, and its own conditioning would be no other's.
    shuffled = {name: value.roll(len(few) // 2, 0) for name, value in few.fields.items()}
    own, other = (_cosines(denoiser, schedule, fields, unit(few.deltas), seed, size) for fields in (few.fields, shuffled))
    return {
        "score": total / count,
        "cosine": float(own.mean()),
        "cosine_shuffled": float(other.mean()),
        "cosine_error": float((own - other).std()) / len(few) ** 0.5 if len(few) > 1 else math.nan,
    }


def uses_conditioning(gain: float, error: float, samples: int) -> bool | None:
    """Whether generated deltas come nearer to the true ones by a sample's own conditioning than by another's.

    Args:
        gain: the difference of the two mean cosines.
        error: its standard error.
        samples: that it is the mean of.

    Returns:
        True where the gain is above zero by more than two standard errors; False where, with as much added, it is still below
        `WORTH_HAVING`; None where the samples do not tell.
    """
    if samples < FEWEST_COMPARED:
        return None
    if gain > 2 * error:
        return True
    return False if gain + 2 * error < WORTH_HAVING else None


def _cosines(denoiser: Denoiser, schedule: NoiseSchedule, fields: Fields, deltas: Tensor, seed: int, size: int) -> Tensor:
    """Of each sample's generated delta with the true one, (B,)."""
    found = []
    for rows in torch.arange(len(deltas)).split(size):
        generators = [generator(seed, "train-diffusion", "judge", i) for i in rows.tolist()]
        rows = rows.to(deltas.device)
        encoded = denoiser.encode({name: value[rows] for name, value in fields.items()})
        made = sample(
            lambda noisy, t, encoded=encoded: denoiser(noisy, t, encoded),
            schedule,
            Noise(generators, tuple(deltas.shape[1:]), deltas.device),
            prediction=denoiser.prediction,
            sampler=DDIM,
            sample_steps=min(SAMPLED_STEPS, schedule.steps),
        )
        found.append(F.cosine_similarity(made.flatten(1), deltas[rows].flatten(1)))
    return torch.cat(found).double()


def drawn_with_gradient(
    denoiser: Denoiser, schedule: NoiseSchedule, encoded: Tensor, noise: Tensor, passes: int, sample_steps: int
) -> Tensor:
    """Unit deltas Ω̂_0 as the denoiser sees them after some steps of DDIM (Alg. 2), on the way that it takes itself.

    The gradient is that of the last pass: what led there counts as given (Clark et al., 2023, "Directly fine-tuning diffusion
    models on differentiable rewards", K = 1).

    Args:
        encoded: conditioning, (B, E).
        noise: the first noise, (B, out, in).
        passes: of the denoiser, 1 … `sample_steps`; one that predicts the mean takes one.

    Returns:
        (B, out, in), of unit root-mean-square.
    """
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
