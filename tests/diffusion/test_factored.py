"""The factored denoiser: what must hold of every denoiser, and that it learns what it is made for."""

import pytest
import torch
from learning import FIELDS, SHAPE, check_shares, distances, train, trained_on_four
from test_networks import WIDTHS as FIELD_WIDTHS
from test_networks import check_leaves_zero, check_rows_are_alone, make_fields, random, shaken

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import unit
from stages.diffusion.denoisers import FACTORED, make_denoiser, resolve
from stages.diffusion.denoising import denoising_errors, step_draws
from stages.diffusion.factored import FactoredDenoiser
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.schedule import EPSILON, MEAN, X0, make_schedule
from stages.foundation.config import TrainDiffusionTable
from stages.foundation.errors import SettingsError

ROWS = 5


def make(shape=(3, 4), rank=2, new=False, fields=FIELD_WIDTHS):
    torch.manual_seed(0)
    denoiser = FactoredDenoiser(shape, ConditioningEncoder(fields, 16), 16, 2, rank, X0)
    return denoiser if new else shaken(denoiser)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_every_parameter_gets_a_gradient(rows):
    denoiser, schedule = make(), make_schedule("ddpm", 12, X0)
    data = DeltaBatch(make_fields(rows), torch.ones(rows), unit(random(rows, 3, 4)))
    t, noise = step_draws(rows, (3, 4), schedule.steps, 0)
    denoising_errors(denoiser, schedule, data, t, noise).mean().backward()
    for name, parameter in denoiser.named_parameters():
        # Rounding alone would leave 1e-7 of the parameter's own size.
        assert parameter.grad.norm() > 1e-5 * parameter.detach().norm(), name


def test_a_new_denoiser_answers_zero_and_learns_to_leave_it():
    """The first step moves the last layers alone, the second all but what reaches the answer through these."""
    check_leaves_zero(make(new=True), (3, 4), make_fields())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (33, 17)])
def test_a_row_of_a_batch_equals_a_batch_of_one(shape):
    # Products of batches of other sizes differ in the last bits.
    check_rows_are_alone(make(shape).eval(), shape, make_fields(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_answer_depends_on_noise_step_and_every_field():
    denoiser, fields = make().eval(), make_fields()
    noisy, t = random(ROWS, 3, 4), torch.full((ROWS,), 500)

    def answer(noisy=noisy, t=t, **changed):
        return denoiser(noisy, t, denoiser.encode(fields | changed))

    for other in (answer(noisy=noisy + 1), answer(t=t + 100), *(answer(**{name: fields[name] + 1}) for name in fields)):
        # A hundred times what rounding does.
        assert (other - answer()).abs().amax((1, 2)).min() > 1e-4


@torch.no_grad()
def test_the_conditioning_enters_by_its_encoding_alone():
    denoiser, fields = make().eval(), make_fields()
    noisy, t = random(ROWS, 3, 4), torch.arange(ROWS)
    encoded = denoiser.encode(fields)
    first = denoiser(noisy, t, encoded)
    for value in fields.values():
        value.zero_()
    assert torch.equal(denoiser(noisy, t, encoded), first)
    assert torch.equal(encoded, denoiser.encode(make_fields()))


@pytest.mark.parametrize("rank", [1, 3])
@torch.no_grad()
def test_answers_have_the_rank_that_was_asked_for(rank):
    denoiser = make((9, 12), rank).eval()
    answers = denoiser(random(ROWS, 9, 12), torch.arange(ROWS), denoiser.encode(make_fields())).double()
    values = torch.linalg.svdvals(answers)
    assert (values[:, rank - 1] > 1e-3 * values[:, 0]).all()
    # float32 leaves about 1e-7 of the largest.
    assert (values[:, rank] < 1e-5 * values[:, 0]).all()


@torch.no_grad()
def test_what_it_looks_along_has_unit_numbers():
    """u_k and v_k of root-mean-square 1, whatever the fields: so that noise of unit variance seen along them keeps its size."""
    denoiser = make((9, 12))
    for scale in (1e-3, 1.0, 1e3):
        encoded = denoiser.encode({name: scale * value for name, value in make_fields().items()})
        u, v = denoiser._apart(encoded[:, 16:])
        for side in (u, v):
            torch.testing.assert_close(side.square().mean(2), torch.ones(ROWS, 2))


def test_noise_is_refused():
    table = TrainDiffusionTable(preset=FACTORED, prediction=EPSILON).model_dump()
    with pytest.raises(SettingsError) as raised:
        resolve(table, (84, 120))
    assert raised.value.message == (
        "train-diffusion.prediction = 'epsilon': preset factored answers with matrices of low rank, which noise is not"
    )
    assert raised.value.hint == "use x0, or the preset mlp, or a U-Net"
    assert resolve(table | {"prediction": MEAN}, (84, 120))["prediction"] == MEAN


def test_it_is_built_from_its_description():
    table = TrainDiffusionTable(preset=FACTORED, width=16, blocks=2, rank=2).model_dump()
    decided = resolve(table, (3, 4))
    assert decided == {
        "preset": FACTORED,
        "width": 16,
        "blocks": 2,
        "rank": 2,
        "prediction": X0,
        "lr": 1.4e-3,
        "batch_size": 256,
    }
    built = make_denoiser(decided | {"shape": [3, 4], "fields": FIELD_WIDTHS}).eval()
    wanted = make().eval()
    built.load_state_dict(wanted.state_dict())
    noisy, t, fields = random(ROWS, 3, 4), torch.arange(ROWS), make_fields()
    assert torch.equal(built(noisy, t, built.encode(fields)), wanted(noisy, t, wanted.encode(fields)))


# Learning


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


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return trained_on_four(FactoredDenoiser(SHAPE, ConditioningEncoder(FIELDS, 64), 64, 2, 4, X0), 600, 128, 3e-3)


def test_training_comes_near_the_exact_denoiser(trained):
    found, blind = distances(trained)
    # Seen: 0.008 and 0.076; halving the first takes several times as many steps.
    assert found < blind / 4, (found, blind)


@pytest.mark.parametrize("kind", [0, 1])
def test_samples_are_the_deltas_as_often_as_the_conditioning_says(trained, kind):
    check_shares(trained, kind)
