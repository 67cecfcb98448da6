"""What a denoiser has learned of a few known deltas, against the exact denoiser of these."""

import reference
import torch
from networks import PRIORS, toy_deltas, toy_rows

from stages.diffusion.denoising import denoising_errors, step_draws
from stages.diffusion.sampler import DDIM, Noise, sample
from stages.diffusion.schedule import X0, add_noise, make_schedule, to_x0
from stages.foundation.seeds import generator
from stages.training.trainer import Trainer, batch_rows

FIELDS, SHAPE, ROWS = {"kind": 2}, (4, 4), 4096
DRAWS = 600


def train(denoiser, rows, steps, batch, lr):
    """The averaged network after so many steps, the learning rate falling to zero."""
    schedule = make_schedule("ddpm", rows.deltas[0].numel(), denoiser.prediction)
    denoiser.encoder.normalise.fit([rows.fields])

    def step_loss(step):
        t, noise = step_draws(batch, tuple(rows.deltas.shape[1:]), schedule.steps, 0, step)
        chosen = rows.take(batch_rows(len(rows), batch, step, 0))
        yield denoising_errors(denoiser, schedule, chosen, t, noise).mean()

    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=lr, weight_decay=0.0)
    trainer = Trainer(denoiser, optimizer, step_loss, cosine_steps=steps)
    for _ in range(steps):
        trainer.advance()
    return trainer.averaged.eval()


def trained_on_four(denoiser, steps, batch, lr):
    """Trained on four deltas whose likelihood the conditioning decides, see `toy_rows`."""
    return train(denoiser, toy_rows(ROWS, seed=1)[0], steps, batch, lr)


def blind_and_best(schedule, rows, kind, t, noise):
    """The mean squared error of the exact denoiser that does not see the conditioning, and of the one that does."""
    noisy = add_noise(rows.deltas, noise, t, schedule.alpha_bar)
    oracles = (reference.ExactDenoiser(toy_deltas(), prior, schedule.alpha_bar) for prior in (PRIORS.mean(0), PRIORS[kind]))
    return [float((oracle(noisy, t) - rows.deltas).square().mean()) for oracle in oracles]


@torch.no_grad()
def distances(denoiser):
    """Mean squared distance of Ω̂_0 from the exact denoiser's, beside that of the exact denoiser which does not see the
    conditioning: on fresh rows, at steps where neither the noise nor the prior alone decides (t = 300 … 499)."""
    schedule = make_schedule("ddpm", 16, denoiser.prediction)
    rows, kind = toy_rows(ROWS, seed=2)
    t, noise = step_draws(ROWS, SHAPE, 200, 1)
    t = t + 300
    noisy = add_noise(rows.deltas, noise, t, schedule.alpha_bar)
    exact, blind = (
        reference.ExactDenoiser(toy_deltas(), prior, schedule.alpha_bar)(noisy, t) for prior in (PRIORS[kind], PRIORS.mean(0))
    )
    output = denoiser(noisy, t, denoiser.encode(rows.fields))
    found = to_x0(output, noisy, t, schedule.alpha_bar, denoiser.prediction)
    return float((found - exact).square().mean()), float((blind - exact).square().mean())


@torch.no_grad()
def shares(denoise, schedule, deltas, *, draws=DRAWS, prediction=X0, sampler=DDIM, sample_steps=25):
    """How often each delta is drawn, (K,), and how far each draw is from the nearest one, in deltas' own lengths, (draws,)."""
    noise = Noise([generator("draw", i) for i in range(draws)], tuple(deltas.shape[1:]), torch.device("cpu"))
    drawn = sample(denoise, schedule, noise, prediction=prediction, sampler=sampler, sample_steps=sample_steps)
    distance, nearest = torch.cdist(drawn.double().flatten(1), deltas.double().flatten(1)).min(1)
    # A unit delta of d numbers has length √d.
    return torch.bincount(nearest, minlength=len(deltas)) / draws, distance / deltas[0].numel() ** 0.5


def chance(prior, draws=DRAWS):
    """Three standard deviations of a binomial share: one test in a hundred would fail by chance; seeds are fixed besides."""
    prior = torch.as_tensor(prior)
    return 3 * (prior * (1 - prior) / draws).sqrt()


@torch.no_grad()
def check_shares(denoiser, kind, far_allowed=0.05):
    """Draws are members of the set, as often as one kind's prior says; so are the exact denoiser's.

    Args:
        denoiser: trained on the four.
        kind: of the conditioning.
        far_allowed: share of draws that may lie farther than a quarter of a delta's length from all of the set.
    """
    schedule = make_schedule("ddpm", 16, denoiser.prediction)
    encoded = denoiser.encode({"kind": torch.eye(2)[kind].expand(DRAWS, 2)})
    oracle = reference.ExactDenoiser(toy_deltas(), PRIORS[kind], schedule.alpha_bar)
    exact, distance = shares(oracle, schedule, toy_deltas())
    assert ((exact - PRIORS[kind]).abs() < chance(PRIORS[kind]) + 0.01).all(), exact
    assert (distance <= 0.25).all()
    prediction = denoiser.prediction
    found, distance = shares(lambda noisy, t: denoiser(noisy, t, encoded), schedule, toy_deltas(), prediction=prediction)
    # And what has not been learned yet; who does not see the conditioning is 0.4 away.
    assert ((found - PRIORS[kind]).abs() < chance(PRIORS[kind]) + 0.05).all(), (found, exact)
    far = float((distance > 0.25).double().mean())
    assert far <= far_allowed, far
