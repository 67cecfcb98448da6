"""Tuning by several members: the loss of their combination, and the fair energy score."""

import dataclasses
import math

import pytest
import torch
from folders import put_all
from networks import describe
from planted import HELPING
from test_tuning_care import COUNT, FIELDS, PRESETS, SHAPE, Scored, rows_of, tuning_of

from stages.diffusion.denoisers import make_denoiser
from stages.tasks.losses import CLASSIFICATION, REGRESSION, cross_entropy
from stages.training.members_loss import energy_score, members_loss


def test_it_is_the_textbooks_score():
    members, y = torch.randn(3, 2, 5), torch.randn(2, 5)

    def size(v):
        return v.square().mean().sqrt()

    for row in range(2):
        near = sum(size(members[i, row] - y[row]) for i in range(3)) / 3
        apart = sum(size(members[i, row] - members[j, row]) for i in range(3) for j in range(3)) / (2 * 3 * 2)
        torch.testing.assert_close(energy_score(members, y)[row], near - apart)


@pytest.mark.parametrize("count", [2, 5])
def test_it_is_fair_and_proper(count):
    """Whatever the number of members, its mean is the same, and the least where they are drawn as the labels are."""
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(200_000, 1, generator=draw)

    def score(spread, shift=0.0):
        return energy_score(shift + spread * torch.randn(count, len(y), 1, generator=draw), y).mean()

    # E|X − Y| − ½ E|X − X'| of standard normal numbers: 2/√π − 1/√π; the mean of so many is right to a few thousandths.
    assert score(1.0) == pytest.approx(math.pi**-0.5, abs=6e-3)
    assert score(1.0) < min(score(0.5), score(0.0), score(1.6), score(1.0, shift=0.4)) - 0.01


def test_one_number_a_sample_may_have_no_axis():
    members, y = torch.randn(3, 4), torch.randn(4)
    torch.testing.assert_close(energy_score(members, y), energy_score(members.unsqueeze(2), y.unsqueeze(1)))


def test_members_that_coincide_have_a_gradient():
    members = torch.zeros(3, 2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy_score(members, torch.zeros(2, 4)).sum(), members)
    assert torch.isfinite(gradient).all()


def test_of_classes_it_is_the_loss_of_the_mean_probability():
    task = Scored("cross_entropy")
    task.kind = CLASSIFICATION
    members, y = torch.randn(4, 6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    wanted = cross_entropy(members.softmax(2).mean(0).log(), y)
    torch.testing.assert_close(members_loss(task, members, y), wanted)


@pytest.mark.parametrize("preset", ["mlp", "factored", "vector"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_losses_and_gradients_are_finite(preset, loss):
    """Of a denoiser that begins with zeros, whose members coincide, and rows of which one is zero."""
    x = torch.randn(COUNT, 4)
    x[0] = 0
    tuning = dataclasses.replace(tuning_of(loss, preset, x), members=3)
    tuning.task.kind = REGRESSION if loss == "mse" else CLASSIFICATION
    denoiser = make_denoiser({**describe(preset, SHAPE, FIELDS, **PRESETS[preset]), "lengthens": True})
    for step in range(3):
        losses = tuning(denoiser, rows_of(x), step)
        assert losses.shape == (COUNT,)
        gradients = torch.autograd.grad(losses.sum(), list(denoiser.parameters()), allow_unused=True)
        assert torch.isfinite(losses).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


def test_members_are_tuned_together(ocd, project):
    """The unit is the base's own score, also on validation samples; the deltas that are drawn help."""
    folder = project(HELPING, "collect", code="planted")
    tuned = {"tune_after": 50, "max_steps": 150, "evaluate_steps": 50, "tune_members": 3, "conditioning_noise": 0.05}
    words = put_all("train-diffusion", tuned)
    told = ocd(folder, "run", "--until", "train-diffusion", *words).stderr
    assert "members are tuned by the energy score of their outputs, in place of the task's loss\n" in told
    found = ocd.json(folder, "train-diffusion", *words)
    assert 0 < found["held_out_task_loss"] < 0.8
    ocd(folder, "infer", *words)
    metrics = ocd.json(folder, "infer", *words)["metrics"]
    assert metrics["ocd ensemble"]["mse"] < 0.5 * metrics["base"]["mse"]
