"""`prediction = "mean"`: the same network without diffusion, one pass from the conditioning to the unit delta (Eq. 1)."""

import numpy as np
import torch

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import unit
from stages.diffusion.denoising import denoising_errors, held_out_figures
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.sampler import Noise, sample
from stages.diffusion.schedule import make_schedule
from stages.foundation.seeds import generator

SCHEDULE = make_schedule("ddpm", 6, "mean")


def test_its_sample_is_one_pass_on_nothing():
    seen = []

    def denoise(noisy, t):
        seen.append((noisy, t))
        return torch.full_like(noisy, 7.0)

    noise = Noise([generator("mean", i) for i in range(2)], (2, 3), torch.device("cpu"))
    made = sample(denoise, SCHEDULE, noise, prediction="mean", sampler="ddim", sample_steps=10)
    assert torch.equal(made, torch.full((2, 2, 3), 7.0))
    ((noisy, t),) = seen
    assert not noisy.any()
    assert t.tolist() == [999, 999]


def test_its_loss_is_regression():
    """Whatever t and noise are drawn, the loss is that of the output on nothing against the unit delta."""
    torch.manual_seed(0)
    denoiser = MlpDenoiser((2, 3), ConditioningEncoder({"layer_input": 3}, 16), 16, 1, "mean")
    torch.nn.init.normal_(denoiser.leave[-1].weight)
    rows = DeltaBatch({"layer_input": torch.randn(5, 3)}, torch.ones(5), unit(torch.randn(5, 2, 3)))
    last = torch.full((5,), 999)
    wanted = (denoiser(torch.zeros(5, 2, 3), last, denoiser.encode(rows.fields)) - rows.deltas).square().mean()
    for t, noise in ((torch.arange(5), torch.randn(5, 2, 3)), (last, torch.zeros(5, 2, 3))):
        # The mean of the samples' means is rounded otherwise than the mean of all numbers.
        torch.testing.assert_close(denoising_errors(denoiser, SCHEDULE, rows, t, noise).mean(), wanted, rtol=1e-6, atol=0)


def test_it_learns_a_function_of_the_conditioning():
    torch.manual_seed(1)
    denoiser = MlpDenoiser((2, 3), ConditioningEncoder({"layer_input": 2}, 32), 32, 1, "mean")
    fields = torch.randn(256, 2)
    rows = DeltaBatch({"layer_input": fields}, torch.ones(256), unit(torch.einsum("bo,i->boi", fields.tanh(), torch.ones(3))))
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        denoising_errors(denoiser, SCHEDULE, rows, torch.zeros(256, dtype=torch.long), torch.zeros(256, 2, 3)).mean().backward()
        optimizer.step()
    found = held_out_figures(denoiser, SCHEDULE, rows, seed=0)
    assert found["score"] < 0.1
    assert found["cosine"] > 0.95
    assert found["cosine_shuffled"] < 0.5


def test_its_members_are_one(ocd, finished):
    mean = ("--set", "train-diffusion.prediction=mean")
    ocd(finished, "train-diffusion", "--force", "--quiet", *mean)
    summary = finished.summary("train-diffusion")
    assert summary["prediction"] == "mean"
    ocd(finished, "infer", "--quiet", *mean)
    members = finished.predictions()["member_output"]
    assert np.array_equal(members[:, 0], members[:, 1])
