"""The scale network, its two losses, and what it answers before it is trained."""

import math

import pytest
import torch
from networks import ROWS, WIDTHS, make_fields, make_scale, random

from stages.diffusion.scale import ScaleNetwork, scale_loss


@pytest.mark.parametrize("loss", ["log", "paper"])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_every_parameter_of_the_scale_network_gets_a_gradient(loss, rows):
    network = make_scale()
    scale_loss(network(make_fields(rows)), torch.full((rows,), 0.7), loss).mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_a_row_of_a_batch_equals_a_batch_of_one():
    scale, fields = make_scale().eval(), make_fields()
    lengths = scale(fields)
    assert lengths.shape == (ROWS,)
    for i in range(ROWS):
        one = {name: value[i : i + 1] for name, value in fields.items()}
        # Products of batches of other sizes differ in the last bits.
        torch.testing.assert_close(scale(one)[0], lengths[i], rtol=1e-5, atol=1e-6)


def test_log_loss():
    log_rho, rho = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 0.5, 3.0])
    wanted = [(a - math.log(b)) ** 2 for a, b in zip(log_rho.tolist(), rho.tolist(), strict=True)]
    assert scale_loss(log_rho, rho, "log").tolist() == pytest.approx(wanted, rel=1e-5)


def test_paper_loss_equals_equation_10():
    predicted, rho = [0.5, 2.0, 0.01], [0.4, 0.5, 0.02]
    wanted = [10 * math.log10((p - r) ** 2 / r + 1e-8) for p, r in zip(predicted, rho, strict=True)]
    found = scale_loss(torch.tensor(predicted, dtype=torch.float64).log(), torch.tensor(rho, dtype=torch.float64), "paper")
    assert found.tolist() == pytest.approx(wanted, rel=1e-9)


def test_paper_loss_has_a_floor():
    rho = torch.tensor([0.3, 1.0], dtype=torch.float64, requires_grad=False)
    log_rho = rho.log().requires_grad_()
    found = scale_loss(log_rho, rho, "paper")
    assert found.tolist() == pytest.approx([-80.0, -80.0])
    (gradient,) = torch.autograd.grad(found.sum(), log_rho)
    assert torch.isfinite(gradient).all()


def test_a_new_scale_network_answers_the_mean_of_log_rho():
    torch.manual_seed(0)
    network, rho = ScaleNetwork(WIDTHS, 8), random(50).exp() * 1e-3
    network.fit([make_fields(50)], rho)
    torch.testing.assert_close(network(make_fields()), rho.log().mean().expand(ROWS))
    torch.testing.assert_close(network.scale_log_rho, rho.log().std(correction=0))
    for name, width in WIDTHS.items():
        wanted = make_fields(50)[name].flatten(1).mean(0)
        torch.testing.assert_close(getattr(network.normalise, f"mean_{name}"), wanted, rtol=1e-5, atol=1e-6)
        assert wanted.shape == (width,)
