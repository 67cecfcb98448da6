"""Tuning at the edges: whatever the denoiser has come to, and whatever the rows hold, losses and gradients are finite."""

import math

import pytest
import torch
from networks import describe, random, shaken
from torch import nn

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoisers import VECTOR, denoised_shape, make_denoiser
from stages.diffusion.sampler import in_the_ball
from stages.diffusion.schedule import make_schedule
from stages.per_sample.layer import find_layer
from stages.per_sample.runner import Runner
from stages.per_sample.weights import Vmap
from stages.tasks.data import ArrayDataset, Split
from stages.tasks.losses import LOSSES
from stages.tasks.protocol import Task
from stages.training.tuning import SAMPLE_STEPS, Tuning

COUNT, SHAPE = 6, (3, 4)
FIELDS = {"layer_input": 4, "activation": 3, "base_output": 3}
PRESETS = {
    "mlp": {"width": 16},
    "factored": {"width": 16, "rank": 2},
    "vector": {"width": 16},
    "small": {"width": 8, "multipliers": [1, 2]},
}
LABELS = {"cross_entropy": torch.tensor([0, 1, 2, 0, 1, 2])}


class Scored(Task):
    def __init__(self, loss: str):
        self.name = loss

    def loss(self, output, y):
        return LOSSES[self.name][0](output, y)


def tuning_of(loss, preset, x):
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).eval().requires_grad_(False)
    layer = find_layer(model, "0.weight")
    runner = Runner(model, layer, lambda net, given: net(given), x[:2] + 1)
    y = LABELS.get(loss, (random(COUNT, 3) > 0).float())
    schedule = make_schedule("ddpm", math.prod(denoised_shape(preset, SHAPE)), "epsilon" if preset == "small" else "x0")
    options = {"samples": COUNT, "between": 10 * COUNT, "vectors": preset == VECTOR}
    rows = torch.arange(COUNT)
    return Tuning(Scored(loss), lambda fields: 0 * fields["activation"][:, 0], runner, Split(ArrayDataset(x, y)), rows, 1.0,
                  schedule, 0, **options)  # fmt: skip


def rows_of(x):
    """Rows of which one is all zeros, and one is huge."""
    fields = {"layer_input": x, "activation": x[:, :3], "base_output": x[:, :3]}
    return DeltaBatch(fields, torch.ones(COUNT), random(COUNT, *SHAPE), torch.arange(COUNT))


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e3])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_and_gradients_are_finite(preset, loss, size):
    """The last layers as large as if nothing had held them, as small as they can be, and as they begin: with zeros."""
    x = random(COUNT, 4)
    x[0], x[1] = 0, 1e3
    torch.manual_seed(0)
    denoiser = make_denoiser({**describe(preset, SHAPE, FIELDS, **PRESETS[preset]), "lengthens": True})
    if size:
        denoiser = shaken(denoiser)
        for parameter in list(denoiser.parameters())[-8:]:
            parameter.data *= size
    tuning, rows = tuning_of(loss, preset, x), rows_of(x)
    for step in range(SAMPLE_STEPS):
        losses = tuning(denoiser, rows, step)
        gradients = torch.autograd.grad(losses.sum(), list(denoiser.parameters()), allow_unused=True)
        assert torch.isfinite(losses).all(), step
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None), step
    assert torch.isfinite(torch.tensor(tuning.held_out_loss(denoiser, rows, COUNT)))


def test_output_vectors_where_the_layer_is_not_substituted():
    x = random(COUNT, 4)
    torch.manual_seed(0)
    denoiser = shaken(make_denoiser({**describe(VECTOR, SHAPE, FIELDS, width=16), "lengthens": True}))
    tuning, rows = tuning_of("mse", VECTOR, x), rows_of(x)
    wanted = tuning(denoiser, rows, 3)
    runner = tuning.overfitter
    runner.method = Vmap(runner.model, runner.layer, runner.forward)
    torch.testing.assert_close(tuning(denoiser, rows, 3), wanted, rtol=1e-5, atol=1e-6)


def test_the_ball_leaves_what_is_in_it():
    values = random(4, 3, 2)
    inside = (
        values / values.flatten(1).square().mean(1).sqrt().view(-1, 1, 1) * torch.tensor([0.0, 0.5, 1 - 1e-6, 3]).view(-1, 1, 1)
    )
    found = in_the_ball(inside)
    assert torch.equal(found[:3], inside[:3])
    torch.testing.assert_close(found[3], inside[3] / 3)
    # One long step of a denoiser that has grown is no longer the next one's input.
    assert float(in_the_ball(1e18 * values).flatten(1).square().mean(1).max()) == pytest.approx(1)
