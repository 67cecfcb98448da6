"""How the U-Nets are built: their sizes against the published ones, attention, padding, where step and conditioning enter."""

import pytest
import torch
import torch.nn.functional as F
from networks import ROWS, WIDTHS, make, make_fields, numbers_of, random, sketch

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.denoisers import AUTHORS, PAPER, SMALL, UNETS
from stages.diffusion.schedule import EPSILON
from stages.diffusion.unet import UNetDenoiser, UNetPlan


def attentions(network):
    """How many layers of attention it has."""
    return sum(hasattr(module, "qkv") for module in network.modules())


def test_the_authors_networks_have_the_published_sizes():
    """Of LeNet5's fc1 110.1 million, of TinyNeRF's layer 18.5 million; 1 % is for the conditioning's encoders."""
    lenet = sketch(AUTHORS, (84, 120), {"layer_input": 120, "activation": 84, "base_output": 10})
    assert numbers_of(lenet) == pytest.approx(110.1e6, rel=0.01)
    fields = {"layer_input": 63, "activation": 128, "base_output": 1000}
    nerf = sketch(AUTHORS, (128, 63), fields, width=64, multipliers=[1, 2, 2, 4])
    assert numbers_of(nerf) == pytest.approx(18.5e6, rel=0.01)


def test_the_paper_as_it_reads():
    """128 channels, five downsamplings, attention wherever it is affordable, two attention layers in the bottleneck."""
    denoiser = sketch(PAPER, (84, 120))
    assert denoiser.enter.out_channels == 128
    assert sum(level.resample is not None for level in denoiser.down) == 5
    assert sum(level.resample is not None for level in denoiser.up) == 5
    assert attentions(denoiser.bottleneck) == 2
    # 96 × 128 and its halves.
    tokens = [96 * 128 // 4**level for level in range(6)]
    wanted = [count <= 1024 for count in tokens]
    assert wanted == [False, False, True, True, True, True]
    for levels in (denoiser.down, reversed(denoiser.up)):
        found = [[attentions(module) > 0 for module in level.attentions] for level in levels]
        assert [all(one) for one in found] == wanted
        assert [any(one) for one in found] == wanted
    assert [len(level.blocks) for level in denoiser.down] == [2] * 6
    assert [len(level.blocks) for level in denoiser.up] == [3] * 6
    assert [level.blocks[0].conv1.out_channels for level in denoiser.down] == [128, 128, 256, 256, 512, 512]


@pytest.mark.parametrize(("limit", "attends"), [(12288, True), (12287, False)])
def test_attention_ends_exactly_at_its_limit(limit, attends):
    assert sketch(PAPER, (84, 120), attention_max_tokens=limit).plan.attends((84, 120)) == [attends] + [True] * 5


def test_the_authors_attend_at_16_by_16_alone():
    assert sketch(AUTHORS, (84, 120)).plan.attends((84, 120)) == [False, False, False, True, False, False]
    denoiser = sketch(AUTHORS, (84, 120))
    assert attentions(denoiser.bottleneck) == 1
    assert {module.p for module in denoiser.modules() if isinstance(module, torch.nn.Dropout)} == {0.4}


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (10, 84), (33, 17), (84, 120), (128, 128), (129, 1)])
def test_padding_is_as_little_as_the_halvings_need(shape):
    for preset, step in ((PAPER, 32), (SMALL, 8), (AUTHORS, 128)):
        found = sketch(preset, shape).plan.padded(shape)
        for side, padded in zip(shape, found, strict=True):
            assert padded % step == 0
            assert padded - step < side <= padded


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_step_and_conditioning_reach_every_level(width):
    """They are added to channels; a norm that takes the mean of each channel would take them out again."""
    denoiser = make(SMALL, (16, 16), 0.02, width=width).double()
    noisy, t, fields = random(2, 16, 16).double(), torch.tensor([3, 700]), make_fields(2)
    encoded = denoiser.encode({name: value.double() for name, value in fields.items()})
    denoiser(noisy, t, encoded).square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        if "of_e.weight" in name:
            # What a norm took out would leave 1e-16 of float64; 1e-3 and more has been seen.
            assert parameter.grad.norm() > 1e-6 * parameter.detach().norm(), name


@torch.no_grad()
def test_conditioning_enters_before_the_two_layers_and_in_the_authors_code_after():
    for preset, late in ((PAPER, False), (SMALL, False), (AUTHORS, True)):
        denoiser = make(preset)
        assert denoiser.plan.late == late
        assert denoiser.encode(make_fields()).shape == (ROWS, 64 if late else 16)


@torch.no_grad()
def test_dropout_is_the_trainings_alone():
    denoiser, fields, noisy, t = make(AUTHORS), make_fields(), random(ROWS, 5, 7), torch.arange(ROWS)
    encoded = denoiser.encode(fields)
    assert not torch.equal(denoiser.train()(noisy, t, encoded), denoiser(noisy, t, encoded))
    assert torch.equal(denoiser.eval()(noisy, t, encoded), denoiser(noisy, t, encoded))


# Large layers


@pytest.mark.parametrize("preset", UNETS)
def test_layers_of_768_by_768_pass(preset):
    """On torch's meta device, which checks every shape and takes no memory."""
    denoiser = sketch(preset, (768, 768))
    with torch.device("meta"):
        fields = {name: torch.empty(2, width) for name, width in WIDTHS.items()}
        found = denoiser(torch.empty(2, 768, 768), torch.zeros(2, dtype=torch.long), denoiser.encode(fields))
    assert found.shape == (2, 768, 768)
    tokens = [768 * 768 // 4**level for level in range(len(denoiser.plan.multipliers))]
    assert denoiser.plan.attends((768, 768)) == [
        count == 256 if preset == AUTHORS else count <= denoiser.plan.attention_max_tokens for count in tokens
    ]


@pytest.mark.slow
def test_a_layer_of_768_by_768_trains():
    """A narrow `small`; its bottleneck attends over 96 × 96 positions. Slow for that."""
    denoiser, noise = make(SMALL, (768, 768), width=8), random(1, 768, 768)

    def loss():
        return F.mse_loss(denoiser(noise, torch.tensor([500]), denoiser.encode(make_fields(1))), noise)

    before = loss()
    before.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in denoiser.parameters())
    torch.optim.SGD(denoiser.parameters(), lr=0.05).step()
    with torch.no_grad():
        assert loss() < before


def test_a_plan_by_hand():
    """A U-Net of one resolution and one attention, of the smallest delta."""
    plan = UNetPlan(8, (1,), 1, 0, 0, 1, 1, 0.0)
    denoiser = UNetDenoiser((1, 1), ConditioningEncoder(WIDTHS, plan.encoded), plan, EPSILON)
    assert plan.padded((1, 1)) == (1, 1)
    assert denoiser(random(2, 1, 1), torch.arange(2), denoiser.encode(make_fields(2))).shape == (2, 1, 1)
