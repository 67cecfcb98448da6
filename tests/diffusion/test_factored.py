"""The factored denoiser: the form of its answers, and that it learns what it is made for."""

import pytest
import torch
from learning import train
from networks import ROWS, make, make_fields, random

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import unit
from stages.diffusion.denoisers import FACTORED
from stages.diffusion.denoising import denoising_errors
from stages.diffusion.factored import FactoredDenoiser
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.schedule import X0, make_schedule


@pytest.mark.parametrize("rank", [1, 3])
@torch.no_grad()
def test_answers_have_the_rank_that_was_asked_for(rank):
    denoiser = make(FACTORED, (9, 12), blocks=2, rank=rank).eval()
    answers = denoiser(random(ROWS, 9, 12), torch.arange(ROWS), denoiser.encode(make_fields())).double()
    values = torch.linalg.svdvals(answers)
    assert (values[:, rank - 1] > 1e-3 * values[:, 0]).all()
    # float32 leaves about 1e-7 of the largest.
    assert (values[:, rank] < 1e-5 * values[:, 0]).all()


@torch.no_grad()
def test_what_it_looks_along_has_unit_numbers():
    """u_k and v_k of root-mean-square 1, whatever the fields: so that noise of unit variance seen along them keeps its size."""
    denoiser = make(FACTORED, (9, 12), blocks=2, rank=2)
    for scale in (1e-3, 1.0, 1e3):
        encoded = denoiser.encode({name: scale * value for name, value in make_fields().items()})
        for side, length in zip(encoded[:, 16:].split([2 * 9, 2 * 12], dim=1), (9, 12), strict=True):
            torch.testing.assert_close(side.view(ROWS, 2, length).square().mean(2), torch.ones(ROWS, 2))


def outer_products(count, seed):
    """Deltas u vᵀ of (20, 24) whose factors are linear in the conditioning, as one sample's gradient is."""
    back, seen = random(count, 6, seed=seed), random(count, 8, seed=seed + 1)
    u, v = back @ random(6, 20, seed=100), seen @ random(8, 24, seed=101)
    return DeltaBatch({"back": back, "seen": seen}, torch.ones(count), unit(u[:, :, None] * v[:, None, :]))


def test_outer_products_of_what_it_is_conditioned_on_are_learned_quickly():
    """On rows it has not seen, in so few steps that an MLP of the same width and blocks is still far away."""
    rows, fresh, found = outer_products(2000, 1), outer_products(512, 5), {}
    schedule = make_schedule("ddpm", 480, X0)
    # The noisiest steps, where all there is to go by is the conditioning.
    t, noise = torch.full((512,), 999), random(512, 20, 24, seed=9)
    for name, make_one in (
        ("factored", lambda encoder: FactoredDenoiser((20, 24), encoder, 64, 2, 4, X0)),
        ("mlp", lambda encoder: MlpDenoiser((20, 24), encoder, 64, 2, X0)),
    ):
        torch.manual_seed(0)
        denoiser = train(make_one(ConditioningEncoder({"back": 6, "seen": 8}, 64)), rows, 300, 64, 3e-3)
        with torch.no_grad():
            found[name] = float(denoising_errors(denoiser, schedule, fresh, t, noise).mean())
    # Predicting zero gives 1. Seen: 0.02 and 0.63.
    assert found["factored"] < 0.06, found
    assert found["mlp"] > 0.3, found
