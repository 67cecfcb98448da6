"""Denoisers of every preset: what must hold of each, for one sample and for a batch; how one is described and built."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ROWS, describe, make, make_fields, random
from refusals import refusal

from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import unit
from stages.diffusion.denoisers import AUTHORS, FACTORED, MLP, PAPER, SMALL, UNETS, make_denoiser, resolve, resolve_width
from stages.diffusion.denoising import denoising_errors, step_draws
from stages.diffusion.schedule import EPSILON, MEAN, X0, make_schedule
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import SettingsError

# Narrow ones with the presets' own multipliers, and a bottleneck of more than one position: with one alone, attention's
# queries and keys would count for nothing. 40 is padded to 64 = 2⁵·2.
SMALL_ONES = {
    MLP: ((3, 4), {"blocks": 2}),
    FACTORED: ((3, 4), {"blocks": 2, "rank": 2}),
    PAPER: ((5, 40), {}),
    AUTHORS: ((5, 40), {"pad_to": 32}),
    SMALL: ((5, 10), {}),
}


def small_one(preset, **changed):
    """A denoiser as after some training, and its deltas' shape."""
    shape, own = SMALL_ONES[preset]
    return make(preset, shape, 0.02 if preset in UNETS else 0.1, **own | changed), shape


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("preset", SMALL_ONES)
def test_every_parameter_gets_a_gradient(preset, rows):
    """Also each of attention's three parts."""
    denoiser, shape = small_one(preset)
    denoiser.double().train()
    noise, fields = random(rows, *shape).double(), {name: value.double() for name, value in make_fields(rows).items()}
    torch.manual_seed(0)
    answer = denoiser(noise, torch.arange(rows) * 200, denoiser.encode(fields))
    (answer - noise).square().mean().backward()
    for name, parameter in denoiser.named_parameters():
        parts = 3 if "qkv.weight" in name else 1
        for gradient, value in zip(parameter.grad.chunk(parts), parameter.detach().chunk(parts), strict=True):
            # What cancels out leaves 1e-16 of float64; the smallest real ones seen are of 1e-6.
            assert gradient.norm() > 1e-9 * value.norm(), name


@pytest.mark.parametrize("preset", SMALL_ONES)
def test_a_new_denoiser_answers_zero_and_learns_to_leave_it(preset):
    """Zero is the mean of directions symmetric about it. The first step moves the last layers alone, the second all."""
    shape, own = SMALL_ONES[preset]
    torch.manual_seed(0)
    denoiser = make_denoiser(describe(preset, shape, **{"width": 16, "dropout": 0.0, **own}))
    noisy, t, fields = random(ROWS, *shape), torch.arange(ROWS), make_fields()
    assert torch.equal(denoiser(noisy, t, denoiser.encode(fields)), torch.zeros(ROWS, *shape))
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (denoiser(noisy, t, denoiser.encode(fields)) - noisy).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().max() > 0 for p in denoiser.parameters())


@pytest.mark.parametrize(
    ("preset", "shape"),
    [*((preset, shape) for preset, (shape, _) in SMALL_ONES.items()), (FACTORED, (1, 9)), (FACTORED, (33, 17))],
)
@torch.no_grad()
def test_a_row_of_a_batch_equals_a_batch_of_one(preset, shape):
    denoiser = make(preset, shape, 0.02 if preset in UNETS else 0.1, **SMALL_ONES[preset][1]).eval()
    fields, noisy, t = make_fields(), random(ROWS, *shape), torch.tensor([0, 1, 300, 700, 999])
    whole = denoiser(noisy, t, denoiser.encode(fields))
    assert whole.shape == (ROWS, *shape)
    # Products, and more so convolutions, of batches of other sizes differ in the last bits; 2e-6 has been seen.
    close = {"rtol": 1e-4, "atol": 2e-5 if preset in UNETS else 1e-6}
    for i in range(ROWS):
        one = denoiser.encode({name: value[i : i + 1] for name, value in fields.items()})
        torch.testing.assert_close(denoiser(noisy[i : i + 1], t[i : i + 1], one)[0], whole[i], **close)


# A hundred times what rounding does, at least.
@pytest.mark.parametrize(("preset", "least"), {MLP: 1e-3, FACTORED: 1e-4, PAPER: 2e-3, AUTHORS: 2e-3, SMALL: 2e-3}.items())
@torch.no_grad()
def test_the_answer_depends_on_noise_step_and_every_field(preset, least):
    denoiser, shape = small_one(preset)
    fields, noisy, t = make_fields(), random(ROWS, *shape), torch.full((ROWS,), 500)
    denoiser.eval()

    def answer(noisy=noisy, t=t, **changed):
        return denoiser(noisy, t, denoiser.encode(fields | changed))

    further = random(ROWS, *shape, seed=9)
    for other in (answer(noisy + further), answer(t=t + 100), *(answer(**{name: fields[name] + 1}) for name in fields)):
        assert (other - answer()).abs().amax((1, 2)).min() > least


@pytest.mark.parametrize("preset", SMALL_ONES)
@torch.no_grad()
def test_the_conditioning_enters_by_its_encoding_alone(preset):
    """So that a sampler may encode once for all steps, and inputs of one encoding are one to the denoiser."""
    denoiser, shape = small_one(preset)
    fields, noisy, t = make_fields(), random(ROWS, *shape), torch.arange(ROWS)
    encoded = denoiser.eval().encode(fields)
    first = denoiser(noisy, t, encoded)
    for value in fields.values():
        value.zero_()
    assert torch.equal(denoiser(noisy, t, encoded), first)
    assert torch.equal(encoded, denoiser.encode(make_fields()))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (10, 84), (33, 17)])
@pytest.mark.parametrize("preset", SMALL_ONES)
@torch.no_grad()
def test_the_answer_has_the_deltas_shape(preset, shape):
    """Whatever it is padded to, and answers everywhere."""
    denoiser = make(preset, shape, 0.02, width=8).eval()
    found = denoiser(random(2, *shape), torch.tensor([5, 900]), denoiser.encode(make_fields(2)))
    assert found.shape == (2, *shape)
    assert (found != 0).all()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("preset", "prediction"),
    [(preset, kind) for preset in SMALL_ONES for kind in (X0, EPSILON) if preset != FACTORED or kind == X0],
)
def test_loss_is_the_error_of_what_is_predicted(preset, prediction):
    denoiser, shape = small_one(preset, prediction=prediction)
    assert denoiser.eval().prediction == prediction
    schedule, data = make_schedule("ddpm", 12, X0), DeltaBatch(make_fields(), torch.ones(ROWS), unit(random(ROWS, *shape)))
    t, noise = step_draws(ROWS, shape, schedule.steps, 0)
    signal = schedule.alpha_bar[t].float().view(-1, 1, 1)
    noisy = signal.sqrt() * data.deltas + (1 - signal).sqrt() * noise
    target = data.deltas if prediction == X0 else noise
    wanted = (denoiser(noisy, t, denoiser.encode(data.fields)) - target).square().mean()
    torch.testing.assert_close(denoising_errors(denoiser, schedule, data, t, noise).mean(), wanted)


# Descriptions


@pytest.mark.parametrize("preset", SMALL_ONES)
@torch.no_grad()
def test_a_denoiser_is_built_from_its_description(preset):
    wanted, shape = small_one(preset)
    built = make_denoiser(describe(preset, shape, **{"width": 16, **SMALL_ONES[preset][1]})).eval()
    built.load_state_dict(wanted.eval().state_dict())
    noisy, t, fields = random(ROWS, *shape), torch.arange(ROWS), make_fields()
    assert torch.equal(built(noisy, t, built.encode(fields)), wanted(noisy, t, wanted.encode(fields)))


OF_THE_PAPER = {"width": 128, "multipliers": [1, 1, 2, 2, 4, 4], "blocks": 2, "attention_max_tokens": 1024, "dropout": 0.0}
OF_UNETS = {"prediction": EPSILON, "lr": 1e-4, "batch_size": 128}
# What `auto` stands for, for deltas of 84 × 120.
AUTO = {
    MLP: {"width": 384, "blocks": 3, "prediction": X0, "lr": 7e-4, "batch_size": 256},
    FACTORED: {"width": 384, "blocks": 3, "rank": 8, "prediction": X0, "lr": 1.4e-3, "batch_size": 256},
    PAPER: OF_THE_PAPER | OF_UNETS | {"pad_to": 32},
    AUTHORS: OF_THE_PAPER | OF_UNETS | {"pad_to": 128, "attention_max_tokens": 256, "dropout": 0.4},
    SMALL: OF_THE_PAPER
    | OF_UNETS
    | {"pad_to": 8, "width": 32, "multipliers": [1, 2, 2, 4], "blocks": 1, "attention_max_tokens": 256},
}


@pytest.mark.parametrize("preset", AUTO)
def test_what_auto_stands_for(preset):
    table = TrainDiffusionTable(preset=preset).model_dump()
    assert resolve(table, (84, 120)) == {"preset": preset} | AUTO[preset]
    named = {"width": 64, "blocks": 1, "prediction": X0, "lr": 0.1, "batch_size": 5}
    assert resolve(table | named, (84, 120)) == resolve(table, (84, 120)) | named


@pytest.mark.parametrize(
    ("preset", "changed", "message", "hint"),
    [
        (
            FACTORED,
            {"prediction": EPSILON},
            "train-diffusion.prediction = 'epsilon': preset factored answers with matrices of low rank, which noise is not",
            "use x0, or the preset mlp, or a U-Net",
        ),
        (SMALL, {"pad_to": 12}, "train-diffusion.pad_to = 12: this U-Net halves 3 times", "take a multiple of 8, or auto"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(preset, changed, message, hint):
    table = TrainDiffusionTable(preset=preset).model_dump()
    assert refusal(SettingsError, resolve, table | changed, (5, 7)) == (message, hint)
    assert resolve(table | {"prediction": MEAN}, (5, 7))["prediction"] == MEAN


@given(st.integers(1, 10**7))
@settings(max_examples=50)
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


def test_draws_of_a_step_depend_on_seed_and_step_alone():
    t, noise = step_draws(64, (3, 4), 1000, 3, "train-diffusion", 7)
    again = step_draws(64, (3, 4), 1000, 3, "train-diffusion", 7)
    assert torch.equal(t, again[0])
    assert torch.equal(noise, again[1])
    assert not torch.equal(noise, step_draws(64, (3, 4), 1000, 3, "train-diffusion", 8)[1])
    assert (t.min() >= 0) & (t.max() < 1000)
    assert noise.shape == (64, 3, 4)
