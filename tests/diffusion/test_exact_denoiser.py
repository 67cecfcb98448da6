"""Sampling with the exact denoiser of a few known deltas: what a schedule and a sampler cost when the network is perfect."""

import pytest
import reference
import torch
from learning import chance, shares

from stages.diffusion.sampler import DDIM, DDPM
from stages.diffusion.schedule import X0, NoiseSchedule, linear_betas, make_schedule, rescale_terminal
from stages.foundation.seeds import generator

NUMEL, DRAWS = 10_000, 400
PRIOR = (0.55, 0.25, 0.15, 0.05)


def unit_deltas(count, numel, alike=0.0):
    """Deltas of root mean square 1; `alike` is the weight of a part they share."""
    noise = torch.randn(count + 1, numel, generator=generator("deltas", count))
    deltas = noise[1:] + alike * noise[:1]
    return deltas / deltas.square().mean(1, keepdim=True).sqrt()


def exact_shares(schedule, deltas, prior, sampler=DDIM, sample_steps=10, draws=DRAWS):
    """How often each delta is drawn, and how far the farthest draw is from all of them."""
    oracle = reference.ExactDenoiser(deltas, prior, schedule.alpha_bar)
    found, distance = shares(oracle, schedule, deltas, draws=draws, sampler=sampler, sample_steps=sample_steps)
    return found, distance.max()


def test_the_exact_denoiser_is_the_posterior_mean():
    """Against Bayes' rule with scalar densities, number by number."""
    deltas = torch.tensor([[1.0, 0.0], [-0.5, 2.0]], dtype=torch.float64)
    _, alpha_bar = reference.linear_schedule(1e-4, 2e-2, 1000)
    noisy, step = torch.tensor([[0.2, 0.4]], dtype=torch.float64), 400
    spread = (1 - alpha_bar[step]) ** 0.5
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for k in range(2):
        for i in range(2):
            centre = alpha_bar[step] ** 0.5 * deltas[k, i]
            weights[k] *= torch.distributions.Normal(centre, spread).log_prob(noisy[0, i]).exp()
    wanted = (weights / weights.sum()) @ deltas
    found = reference.ExactDenoiser(deltas, (0.3, 0.7), alpha_bar)(noisy, torch.tensor([step]))
    torch.testing.assert_close(found[0], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sampler", [DDIM, DDPM])
def test_ten_steps_draw_each_delta_as_often_as_its_prior_says(sampler):
    found, distance = exact_shares(make_schedule("ddpm", NUMEL, X0), unit_deltas(4, NUMEL), PRIOR, sampler)
    # Beside chance: ten steps instead of infinitely many, and the signal d·ᾱ_T = 0.4 that pure noise lacks, shift shares by
    # up to 0.06.
    assert ((found - torch.tensor(PRIOR)).abs() < chance(PRIOR, DRAWS) + 0.06).all(), found
    # A draw is one of the deltas, neither between two nor noisy.
    assert distance < 0.01


def test_without_signal_at_the_start_many_steps_give_the_prior():
    """What is left is chance alone: the prior is the limit, not merely near it."""
    # Our schedule for deltas above 24,000 numbers: nothing is left at step T.
    no_signal = NoiseSchedule(rescale_terminal(linear_betas(1e-4, 2e-2, 1000), 0.0))
    found, distance = exact_shares(no_signal, unit_deltas(4, 2000), PRIOR, sample_steps=50, draws=1500)
    assert ((found - torch.tensor(PRIOR)).abs() < chance(PRIOR, 1500)).all(), found
    assert distance < 0.01


def test_a_certain_delta_is_drawn_with_our_schedule_and_not_with_the_authors():
    """Ten label deltas of one sample, the likeliest of probability 0.97, as in LeNet5's fc1 (84 × 120)."""
    prior = (0.97, *[0.03 / 9] * 9)
    deltas = unit_deltas(10, 10_080, alike=1.0)
    ours, _ = exact_shares(make_schedule("ddpm", 10_080, X0), deltas, prior)
    authors, _ = exact_shares(make_schedule("authors", 10_080, X0), deltas, prior)
    assert ours[0] > 0.9, ours
    assert authors[0] < 0.5, authors


def test_the_authors_schedule_forgets_the_prior():
    """Sampling begins where d·ᾱ/(1 − ᾱ) = 175 and the noise has none of it: the nearest delta wins, not the likeliest."""
    found, _ = exact_shares(make_schedule("authors", NUMEL, X0), unit_deltas(4, NUMEL), PRIOR)
    assert found[0] < 0.4, found
    assert found[3] > 0.12, found
