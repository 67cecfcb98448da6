"""Conditioning, denoisers, the scale network and their training: what must hold of each, for one sample and for a batch."""

import copy
import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stages.diffusion.conditioning import ConditioningEncoder, NormalisedFields, positional_encoding
from stages.diffusion.delta_batch import MOST_HELD_OUT, DeltaBatch, usable_split
from stages.diffusion.denoiser import unit
from stages.diffusion.denoisers import make_denoiser, resolve, resolve_width
from stages.diffusion.denoising import denoising_errors, held_out_figures, step_draws
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.scale import ScaleNetwork, scale_loss
from stages.diffusion.schedule import EPSILON, X0, make_schedule
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import ArtifactError, ComputeError
from stages.training.trainer import CLIP_NORM, EMA_DECAY, WARM_UP_STEPS, Trainer, batch_rows, ema_decay

SHAPE, WIDTHS = (3, 4), {"layer_input": 6, "activation": 3, "base_output": 2}
ROWS = 5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_fields(rows=ROWS, seed=0):
    """One field has axes of its own, as a convolution's would."""
    return {
        "layer_input": random(rows, 2, 3, seed=seed) * 3 + 1,
        "activation": random(rows, 3, seed=seed + 1),
        "base_output": random(rows, 2, seed=seed + 2),
    }


def shaken(network, size=0.1):
    """A network as after some training: nothing is zero any more."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(size * random(*parameter.shape, seed=100 + i))
    return network


def make_mlp(prediction=X0):
    torch.manual_seed(0)
    return shaken(MlpDenoiser(SHAPE, ConditioningEncoder(WIDTHS, 16), 16, 2, prediction))


def make_scale():
    torch.manual_seed(0)
    network = ScaleNetwork(WIDTHS, 8)
    network.fit([make_fields(50)], random(50).exp())
    return shaken(network)


# Conditioning


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_positional_encoding_equals_the_textbook(dim):
    t = [0, 1, 57, 999]
    found = positional_encoding(torch.tensor(t), dim)
    for row, step in enumerate(t):
        for k in range(dim // 2):
            angle = step / 10_000 ** (2 * k / dim)
            # An angle of 999 in float32 is good to 3e-5.
            assert float(found[row, k]) == pytest.approx(math.sin(angle), abs=1e-4)
            assert float(found[row, dim // 2 + k]) == pytest.approx(math.cos(angle), abs=1e-4)


def test_fields_are_normalised_by_their_own_statistics():
    fields = make_fields(200)
    normalise = NormalisedFields(WIDTHS)
    normalise.fit([fields])
    for name, value in normalise(fields).items():
        assert value.shape == (200, WIDTHS[name])
        torch.testing.assert_close(value.mean(0), torch.zeros(WIDTHS[name]), rtol=0, atol=1e-5)
        torch.testing.assert_close(value.std(0, correction=0), torch.ones(WIDTHS[name]), rtol=1e-4, atol=0)
    # They travel with the weights.
    assert {"mean_activation", "scale_activation"} <= normalise.state_dict().keys()


def test_a_number_that_hardly_varies_does_not_explode_on_new_inputs():
    known = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    known[:, 2] = 0
    normalise = NormalisedFields({"a": 4})
    normalise.fit([{"a": known}])
    new = torch.zeros(1, 4)
    new[0, 2] = 1
    # The others deviate by one, and a hundredth of that divides at least.
    assert normalise({"a": new})["a"].abs().max() < 200


@pytest.mark.parametrize("rows", [1, 50])
def test_a_field_that_does_not_vary_does_not_explode_on_new_inputs(rows):
    """Units that are dead on all of the training set, or a training set of one usable row."""
    normalise = NormalisedFields({"a": 4})
    normalise.fit([{"a": torch.full((rows, 4), 0.5)}])
    assert torch.equal(normalise({"a": torch.full((2, 4), 0.5)})["a"], torch.zeros(2, 4))
    assert normalise({"a": torch.full((2, 4), 0.6)})["a"].abs().max() < 1e3


def test_encoding_is_the_sum_of_one_linear_layer_a_field():
    torch.manual_seed(0)
    encoder, fields = ConditioningEncoder(WIDTHS, 8), make_fields()
    encoder.normalise.fit([make_fields(100, seed=7)])
    wanted = sum(
        F.linear(value, encoder.encoders[f"of_{name}"].weight, encoder.encoders[f"of_{name}"].bias)
        for name, value in encoder.normalise(fields).items()
    )
    torch.testing.assert_close(encoder(fields), wanted)


# Denoisers


@pytest.mark.parametrize("prediction", [X0, EPSILON])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_every_parameter_of_the_denoiser_gets_a_gradient(prediction, rows):
    denoiser = make_mlp(prediction)
    schedule = make_schedule("ddpm", 12, prediction)
    data = DeltaBatch(make_fields(rows), torch.ones(rows), unit(random(rows, *SHAPE)))
    t, noise = step_draws(rows, SHAPE, schedule.steps, 0)
    denoising_errors(denoiser, schedule, data, t, noise).mean().backward()
    for name, parameter in denoiser.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("loss", ["log", "paper"])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_every_parameter_of_the_scale_network_gets_a_gradient(loss, rows):
    network = make_scale()
    scale_loss(network(make_fields(rows)), torch.full((rows,), 0.7), loss).mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def check_leaves_zero(denoiser, shape, fields):
    """The first answer is zero; after the second step every parameter has a gradient."""
    noisy, t = random(ROWS, *shape), torch.arange(ROWS)
    assert torch.equal(denoiser(noisy, t, denoiser.encode(fields)), torch.zeros(ROWS, *shape))
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (denoiser(noisy, t, denoiser.encode(fields)) - noisy).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in denoiser.parameters())


@torch.no_grad()
def check_rows_are_alone(denoiser, shape, fields, **tolerance):
    """A row of a batch equals a batch of one."""
    noisy, t = random(ROWS, *shape), torch.tensor([0, 1, 300, 700, 999])
    whole = denoiser(noisy, t, denoiser.encode(fields))
    assert whole.shape == (ROWS, *shape)
    for i in range(ROWS):
        one = denoiser.encode({name: value[i : i + 1] for name, value in fields.items()})
        torch.testing.assert_close(denoiser(noisy[i : i + 1], t[i : i + 1], one)[0], whole[i], **tolerance)


def test_a_new_denoiser_answers_zero_and_learns_to_leave_it():
    """Zero is the mean of directions symmetric about it. The first step moves the last layer alone, the second all."""
    torch.manual_seed(0)
    check_leaves_zero(MlpDenoiser(SHAPE, ConditioningEncoder(WIDTHS, 16), 16, 2, X0), SHAPE, make_fields())


def test_a_row_of_a_batch_equals_a_batch_of_one():
    scale, fields = make_scale().eval(), make_fields()
    # Products of batches of other sizes differ in the last bits.
    check_rows_are_alone(make_mlp().eval(), SHAPE, fields, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        lengths = scale(fields)
        assert lengths.shape == (ROWS,)
        for i in range(ROWS):
            one = {name: value[i : i + 1] for name, value in fields.items()}
            torch.testing.assert_close(scale(one)[0], lengths[i], rtol=1e-5, atol=1e-6)


def test_the_denoiser_answers_to_noise_to_step_and_to_every_field():
    denoiser, fields = make_mlp().eval(), make_fields()
    noisy, t = random(ROWS, *SHAPE), torch.full((ROWS,), 500)

    def answer(noisy=noisy, t=t, **changed):
        return denoiser(noisy, t, denoiser.encode(fields | changed)).detach()

    for other in (answer(noisy=noisy + 1), answer(t=t + 100), *(answer(**{name: fields[name] + 1}) for name in fields)):
        assert (other - answer()).abs().amax((1, 2)).min() > 1e-3


def test_the_conditioning_enters_by_its_encoding_alone():
    """So that a sampler may encode once for all steps, and inputs of one encoding are one to the denoiser."""
    denoiser, fields = make_mlp().eval(), make_fields()
    noisy, t = random(ROWS, *SHAPE), torch.arange(ROWS)
    encoded = denoiser.encode(fields)
    first = denoiser(noisy, t, encoded).detach()
    for value in fields.values():
        value.zero_()
    assert torch.equal(denoiser(noisy, t, encoded), first)
    assert torch.equal(encoded, denoiser.encode(make_fields()))


DESCRIPTION = {"preset": "mlp", "shape": [3, 4], "fields": WIDTHS, "width": 16, "blocks": 2, "prediction": X0}


def test_a_denoiser_is_built_from_its_description():
    denoiser = make_denoiser(DESCRIPTION)
    assert denoiser.prediction == X0
    denoiser.load_state_dict(make_mlp().state_dict())
    output = denoiser(random(ROWS, *SHAPE), torch.arange(ROWS), denoiser.encode(make_fields()))
    assert output.shape == (ROWS, *SHAPE)


def test_descriptions_that_are_not_understood():
    with pytest.raises(ArtifactError, match="the denoiser's preset is 'unet9', expected mlp, factored, paper, authors, small"):
        make_denoiser(DESCRIPTION | {"preset": "unet9"})
    for name in DESCRIPTION:
        with pytest.raises(ArtifactError, match=f"the denoiser's description lacks '{name}'"):
            make_denoiser({key: value for key, value in DESCRIPTION.items() if key != name})


def test_what_auto_stands_for():
    table = TrainDiffusionTable().model_dump() | {"preset": "mlp"}
    found = {"preset": "mlp", "width": 384, "blocks": 3, "prediction": X0, "lr": 7e-4, "batch_size": 256}
    assert resolve(table, (84, 120)) == found
    named = {"width": 64, "blocks": 1, "prediction": EPSILON, "lr": 0.1, "batch_size": 5}
    assert resolve(table | named, (84, 120)) == {"preset": "mlp"} | named


@given(st.integers(1, 10**7))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_automatic_width(numel):
    width = resolve_width(numel)
    assert 128 <= width <= 1024
    assert width % 64 == 0
    # The nearest multiple, where the bounds leave the choice.
    assert width in (128, 1024) or abs(width - 4 * numel**0.5) <= 32


def test_unit_deltas():
    deltas = random(4, 3, 5) * torch.tensor([1e-6, 1.0, 1e4, 0.0]).view(-1, 1, 1)
    found = unit(deltas)
    torch.testing.assert_close(found[:3].square().mean((1, 2)).sqrt(), torch.ones(3))
    assert torch.equal(found[3], torch.zeros(3, 5))
    # The direction is kept.
    torch.testing.assert_close(F.cosine_similarity(found[:3].flatten(1), deltas[:3].flatten(1)), torch.ones(3))


# The scale network


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


# Rows to learn from


def test_held_out_rows():
    degenerate = torch.zeros(300, dtype=torch.bool)
    degenerate[::7] = True
    rho = torch.ones(300)
    rho[5] = 0
    train, held_out = usable_split(degenerate, rho, torch.arange(len(rho)), 0.1, seed=3)
    usable = {i for i in range(300) if i % 7 and i != 5}
    assert set(train.tolist()) | set(held_out.tolist()) == usable
    assert len(train) + len(held_out) == len(usable)
    assert len(held_out) == round(0.1 * len(usable))
    for rows in (train, held_out):
        assert rows.tolist() == sorted(rows.tolist())
    again = usable_split(degenerate, rho, torch.arange(len(rho)), 0.1, seed=3)
    assert torch.equal(again[1], held_out)
    assert not torch.equal(usable_split(degenerate, rho, torch.arange(len(rho)), 0.1, seed=4)[1], held_out)


@pytest.mark.parametrize(("count", "fraction", "held"), [(2, 0.01, 1), (2, 0.99, 1), (20_000, 0.5, MOST_HELD_OUT)])
def test_held_out_rows_at_the_bounds(count, fraction, held):
    train, held_out = usable_split(
        torch.zeros(count, dtype=torch.bool), torch.ones(count), torch.arange(count), fraction, seed=0
    )
    assert (len(train), len(held_out)) == (count - held, held)


def test_too_few_rows_are_usable():
    with pytest.raises(ComputeError, match=r"of 1,000 deltas 1 are usable; the others are degenerate"):
        usable_split(torch.arange(1000) > 0, torch.ones(1000), torch.arange(1000), 0.1, seed=0)


@pytest.mark.parametrize("repeats", [2, 5])
def test_rows_of_one_sample_are_held_out_together(repeats):
    numbers = torch.randperm(40, generator=torch.Generator().manual_seed(1)).repeat_interleave(repeats)
    degenerate = torch.zeros(len(numbers), dtype=torch.bool)
    degenerate[::3] = True
    train, held_out = usable_split(degenerate, torch.ones(len(numbers)), numbers, 0.1, seed=0)
    assert not set(numbers[train].tolist()) & set(numbers[held_out].tolist())
    assert len(numbers[held_out].unique()) == 4
    assert sorted([*train.tolist(), *held_out.tolist()]) == torch.nonzero(~degenerate).squeeze(1).tolist()


def test_one_sample_cannot_be_held_out_of_itself():
    with pytest.raises(ComputeError, match="only one sample has usable deltas, at least 2 are needed to hold one out"):
        usable_split(torch.zeros(4, dtype=torch.bool), torch.ones(4), torch.zeros(4), 0.1, seed=0)


# Training


def test_decay_of_the_average_warms_up():
    assert ema_decay(0) == pytest.approx(0.1)
    assert ema_decay(90) == pytest.approx(0.91)
    assert ema_decay(10**7) == EMA_DECAY
    values = [ema_decay(step) for step in range(0, 200_000, 1000)]
    assert values == sorted(values)


@given(count=st.integers(1, 40), batch=st.integers(1, 60), steps=st.integers(1, 30))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_epochs_are_permutations(count, batch, steps):
    rows = torch.cat([batch_rows(count, batch, step, 3, "test") for step in range(steps)])
    assert len(rows) == batch * steps
    for epoch in rows[: len(rows) // count * count].view(-1, count):
        assert sorted(epoch.tolist()) == list(range(count))
    last = rows[len(rows) // count * count :].tolist()
    assert len(set(last)) == len(last)


def test_batches_depend_on_seed_and_step_alone():
    assert torch.equal(batch_rows(100, 30, 17, 3, "a"), batch_rows(100, 30, 17, 3, "a"))
    assert not torch.equal(batch_rows(100, 100, 0, 3, "a"), batch_rows(100, 100, 0, 4, "a"))
    assert not torch.equal(batch_rows(100, 100, 0, 3, "a"), batch_rows(100, 100, 0, 3, "b"))
    assert not torch.equal(batch_rows(100, 100, 0, 3, "a"), batch_rows(100, 100, 1, 3, "a"))


def make_trainer(**options):
    """A scale network in training on a few rows, with an optimizer that keeps moments."""
    network, fields, rho = make_scale(), make_fields(20, seed=5), random(20, seed=9).exp()

    def step_loss(step):
        rows = batch_rows(20, 8, step, 0)
        yield scale_loss(network({name: value[rows] for name, value in fields.items()}), rho[rows], "log").mean()

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    return Trainer(network, optimizer, step_loss, **options)


@pytest.mark.parametrize("options", [{}, {"average": False}, {"cosine_steps": 15}, {"clip": False}], ids=str)
@pytest.mark.parametrize("stop", [0, 1, 6])
def test_training_continues_bit_for_bit(options, stop):
    unbroken = make_trainer(**options)
    losses = [unbroken.advance() for _ in range(12)]
    first = make_trainer(**options)
    assert [first.advance() for _ in range(stop)] == losses[:stop]
    saved = {name: value.clone() for name, value in first.state().items()}
    first.advance()
    second = make_trainer(**options)
    shaken(second.network)
    second.restore(saved, stop)
    assert [second.advance() for _ in range(stop, 12)] == losses[stop:]
    wanted, found = unbroken.state(), second.state()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    for one, other in zip(unbroken.averaged.state_dict().values(), second.averaged.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_average_is_the_exponential_moving_average_by_hand():
    trainer = make_trainer()
    wanted = {name: value.detach().double() for name, value in trainer.network.named_parameters()}
    for step in range(5):
        trainer.advance()
        decay = (1 + step) / (10 + step)
        for name, value in trainer.network.named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * value.detach().double()
    for name, value in trainer.averaged.named_parameters():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-7)
        assert not value.requires_grad
    for name, value in trainer.averaged.named_buffers():
        assert torch.equal(value, trainer.network.get_buffer(name))


def test_without_average_the_network_is_its_own():
    trainer = make_trainer(average=False)
    trainer.advance()
    assert trainer.averaged is trainer.network
    assert not any(name.startswith("averaged.") for name in trainer.state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_step_whose_loss_is_not_finite_is_not_taken(bad):
    network = nn.Linear(2, 1)
    trainer = Trainer(network, torch.optim.SGD(network.parameters(), lr=1.0), lambda step: iter([network.weight.sum() * bad]))
    before = copy.deepcopy(network.state_dict())
    assert not math.isfinite(trainer.advance())
    assert trainer.step == 0
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def one_weight(**options):
    """A weight whose gradient is 100 at every step: its path shows the learning rate and the clipping."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    return Trainer(
        network, torch.optim.SGD(network.parameters(), lr=1.0), lambda _: iter([100 * network.weight.sum()]), **options
    )


def path(trainer, steps):
    found = []
    for _ in range(steps):
        before = trainer.network.weight.item()
        trainer.advance()
        found.append(before - trainer.network.weight.item())
    return found


def test_warm_up_and_clipping():
    found = path(one_weight(), WARM_UP_STEPS + 5)
    wanted = [CLIP_NORM * min(1.0, (step + 1) / WARM_UP_STEPS) for step in range(WARM_UP_STEPS + 5)]
    # Differences of numbers near 50 in float32.
    assert found == pytest.approx(wanted, abs=1e-4)


def test_without_clipping_steps_are_whole_from_the_first():
    assert path(one_weight(clip=False), 3) == pytest.approx([100.0] * 3)


def test_cosine_falls_to_zero_and_stays_there():
    found = path(one_weight(clip=False, cosine_steps=10), 12)
    wanted = [100 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / 10))) for step in range(12)]
    assert found == pytest.approx(wanted, abs=1e-3)


def test_draws_of_a_step_depend_on_seed_and_step_alone():
    t, noise = step_draws(64, SHAPE, 1000, 3, "train-diffusion", 7)
    again = step_draws(64, SHAPE, 1000, 3, "train-diffusion", 7)
    assert torch.equal(t, again[0])
    assert torch.equal(noise, again[1])
    assert not torch.equal(noise, step_draws(64, SHAPE, 1000, 3, "train-diffusion", 8)[1])
    assert (t.min() >= 0) & (t.max() < 1000)
    assert noise.shape == (64, *SHAPE)


def test_loss_is_the_error_of_what_is_predicted():
    schedule, data = make_schedule("ddpm", 12, X0), DeltaBatch(make_fields(), torch.ones(ROWS), unit(random(ROWS, *SHAPE)))
    t, noise = step_draws(ROWS, SHAPE, schedule.steps, 0)
    signal = schedule.alpha_bar[t].float().view(-1, 1, 1)
    noisy = signal.sqrt() * data.deltas + (1 - signal).sqrt() * noise
    for prediction, target in ((X0, data.deltas), (EPSILON, noise)):
        denoiser = make_mlp(prediction)
        wanted = (denoiser(noisy, t, denoiser.encode(data.fields)) - target).square().mean()
        torch.testing.assert_close(denoising_errors(denoiser, schedule, data, t, noise).mean(), wanted)


# Learning: four directions, of which the conditioning makes some likelier than others.

PRIORS = torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.05, 0.85]], dtype=torch.float64)


def toy_rows(count, seed):
    """Samples of two kinds; the kind is the conditioning, and decides how likely each of four unit deltas is."""
    draw = torch.Generator().manual_seed(seed)
    kind = torch.randint(2, (count,), generator=draw)
    picked = torch.multinomial(PRIORS[kind], 1, generator=draw).squeeze(1)
    return DeltaBatch({"kind": F.one_hot(kind, 2).float()}, torch.ones(count), toy_deltas()[picked]), kind


def toy_deltas():
    return unit(random(4, 4, 4, seed=77))


@pytest.fixture(scope="module")
def trained():
    """An MLP after some seconds of training on fresh samples."""
    torch.manual_seed(0)
    schedule, denoiser = make_schedule("ddpm", 16, X0), MlpDenoiser((4, 4), ConditioningEncoder({"kind": 2}, 64), 64, 2, X0)
    data, _ = toy_rows(4096, seed=1)
    denoiser.encoder.normalise.fit([data.fields])

    def step_loss(step):
        t, noise = step_draws(256, (4, 4), schedule.steps, 0, step)
        yield denoising_errors(denoiser, schedule, data.take(batch_rows(4096, 256, step, 0)), t, noise).mean()

    trainer = Trainer(denoiser, torch.optim.AdamW(denoiser.parameters(), lr=2e-3, weight_decay=0.0), step_loss)
    for _ in range(1500):
        trainer.advance()
    return schedule, trainer.averaged.eval()


@torch.no_grad()
def test_training_comes_near_the_exact_denoiser(trained):
    schedule, denoiser = trained
    data, kind = toy_rows(4096, seed=2)
    t, noise = step_draws(4096, (4, 4), schedule.steps, 1)

    def exact(prior):
        oracle = reference.ExactDenoiser(toy_deltas(), prior, schedule.alpha_bar)
        signal = schedule.alpha_bar[t].float().view(-1, 1, 1)
        noisy = signal.sqrt() * data.deltas + (1 - signal).sqrt() * noise
        return float((oracle(noisy, t) - data.deltas).square().mean())

    found, best, blind = (
        float(denoising_errors(denoiser, schedule, data, t, noise).mean()),
        exact(PRIORS[kind]),
        exact(PRIORS.mean(0)),
    )
    # None is better than the exact one but by the chance of 4,096 samples; one that ignores the conditioning is far worse.
    assert best - 0.005 < found < best + 0.02, (found, best, blind)
    assert found < blind - 0.05, (found, best, blind)


def test_judging_tells_true_conditioning_from_shuffled(trained):
    schedule, denoiser = trained
    data, kind = toy_rows(64, seed=3)
    # One half of each kind: shuffling, which is by half, then always misleads.
    order = torch.cat([torch.nonzero(kind == k).squeeze(1)[:20] for k in (0, 1)])
    found = held_out_figures(denoiser, schedule, data.take(order), seed=0)
    assert found == held_out_figures(denoiser, schedule, data.take(order), seed=0)
    assert 0 < found["score"] < 0.8
    # Σ p² = 0.73 of the draws are the true delta, against Σ p·q = 0.09; 40 samples leave 0.1 of chance.
    assert found["cosine"] > found["cosine_shuffled"] + 0.3


def test_rows_of_one_sample_are_not_shuffled_among_each_other(trained):
    schedule, denoiser = trained
    data, kind = toy_rows(64, seed=3)
    rows = torch.stack([torch.nonzero(kind == k).squeeze(1)[0] for k in (0, 1)]).repeat_interleave(3)
    found = held_out_figures(denoiser, schedule, data.take(rows), seed=0)
    assert found["cosine"] != found["cosine_shuffled"]
