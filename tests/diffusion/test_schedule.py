"""Noise schedules against diffusers and against the textbook, and the conversions between clean, noisy and noise."""

import itertools
import math

import pytest
import reference
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.diffusion.schedule import (
    EPSILON,
    LARGEST_UNSCALED,
    LEADING,
    TRAILING,
    X0,
    NoiseSchedule,
    add_noise,
    linear_betas,
    make_schedule,
    rescale_terminal,
    schedule_warning,
    to_x0,
)
from stages.foundation.errors import SettingsError

# name: first and last β, T
LINEAR = {"ddpm": (1e-4, 2e-2, 1000), "authors": (1e-6, 1e-2, 1000), "paper": (1e-4, 1e-2, 10)}
# A delta small enough for the plain schedules, and two for which ours is rescaled.
SIZES = (16, 24_001, 4_000_000)
# For these n both round T − i·T/n alike; elsewhere diffusers adds T/n up in floating point, and so may fall on the other side
# of a half, or take a step too many. 16, 80 and 400 meet halves that both can represent, and round to even.
STEPS = (1, 2, 4, 5, 7, 10, 16, 20, 25, 30, 50, 80, 100, 250, 400, 500, 1000)


def every_schedule():
    return [
        pytest.param(make_schedule(name, numel, prediction), id=f"{name}-{numel}-{prediction}")
        for name in LINEAR
        for numel in SIZES
        for prediction in (X0, EPSILON)
    ]


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("name", LINEAR)
def test_schedules_equal_diffusers(name, scheduler):
    first, last, steps = LINEAR[name]
    wanted = scheduler(num_train_timesteps=steps, beta_start=first, beta_end=last, beta_schedule="linear")
    ours = make_schedule(name, 16, EPSILON)
    assert ours.steps == steps
    # diffusers computes in float32: a product of 1,000 factors is good to about 1e-5 of itself.
    torch.testing.assert_close(ours.betas, wanted.betas.double(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.alpha_bar, wanted.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", LINEAR)
def test_schedules_equal_the_textbook(name):
    betas, alpha_bar = reference.linear_schedule(*LINEAR[name])
    ours = make_schedule(name, 16, X0)
    torch.testing.assert_close(ours.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.alpha_bar, torch.tensor(alpha_bar, dtype=torch.float64), rtol=1e-12, atol=0)


def test_spacing_of_each_schedule():
    assert make_schedule("ddpm", 16, X0).visited(10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert make_schedule("authors", 16, X0).visited(10) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert make_schedule("paper", 16, X0).visited(10) == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("spacing", [TRAILING, LEADING])
@pytest.mark.parametrize("sample_steps", STEPS)
def test_visited_steps_equal_diffusers(spacing, sample_steps):
    wanted = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing)
    wanted.set_timesteps(sample_steps)
    assert NoiseSchedule(linear_betas(1e-4, 2e-2, 1000), spacing).visited(sample_steps) == wanted.timesteps.tolist()


@given(steps=st.integers(1, 1000), part=st.floats(0, 1), spacing=st.sampled_from([TRAILING, LEADING]))
@settings(max_examples=200)
def test_visited_steps_descend_inside_the_schedule(steps, part, spacing):
    sample_steps = max(1, math.ceil(part * steps))
    visited = NoiseSchedule(torch.full((steps,), 0.01, dtype=torch.float64), spacing).visited(sample_steps)
    assert len(visited) == sample_steps
    assert all(before > after for before, after in itertools.pairwise(visited))
    assert visited[0] == steps - 1 if spacing == TRAILING else visited[-1] == 0
    assert visited[0] < steps
    assert visited[-1] >= 0


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 1000), ("authors", 1000), ("paper", 10)])
def test_more_sample_steps_than_the_schedule_has(name, steps):
    schedule = make_schedule(name, 16, X0)
    assert len(schedule.visited(steps)) == steps
    with pytest.raises(SettingsError, match=f"infer.sample_steps = {steps + 1}: the schedule has {steps} steps") as caught:
        schedule.visited(steps + 1)
    assert caught.value.hint == f"take at most {steps}"


@pytest.mark.parametrize("schedule", every_schedule())
def test_noise_only_grows(schedule):
    alpha_bar = schedule.alpha_bar
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[-1] >= 0
    assert alpha_bar[0] < 1
    assert ((schedule.betas > 0) & (schedule.betas <= 1)).all()


@pytest.mark.parametrize("betas", [(1e-4, 2e-2, 1000), (1e-4, 1e-2, 10)])
def test_rescaling_to_no_signal_equals_diffusers(betas):
    plain = linear_betas(*betas)
    torch.testing.assert_close(rescale_terminal(plain, 0.0), rescale_zero_terminal_snr(plain), rtol=1e-12, atol=1e-15)


@given(st.floats(0, 1e-2))
@settings(max_examples=30)
def test_rescaling_keeps_the_first_step_and_reaches_the_last(terminal):
    plain = linear_betas(1e-4, 2e-2, 1000)
    alpha_bar = torch.cumprod(1 - rescale_terminal(plain, terminal), dim=0)
    assert float(alpha_bar[0]) == pytest.approx(1 - 1e-4, rel=1e-12)
    # Beside ᾱ of about 1, 1e-15 is the last bit of float64.
    assert float(alpha_bar[-1]) == pytest.approx(terminal, rel=1e-9, abs=1e-15)


@given(numel=st.integers(1, 10**8), prediction=st.sampled_from([X0, EPSILON]))
@settings(max_examples=60)
def test_no_delta_is_so_large_that_a_signal_is_left(numel, prediction):
    terminal = float(make_schedule("ddpm", numel, prediction).alpha_bar[-1])
    assert numel * terminal <= 1 + 1e-9
    # x0 needs no signal at all; from epsilon the clean delta is found by dividing by sqrt(ᾱ_T), which must not be zero.
    assert terminal == 0 if prediction == X0 and numel > LARGEST_UNSCALED else terminal > 0


@pytest.mark.parametrize(("name", "numel"), [("ddpm", LARGEST_UNSCALED), ("authors", 10**7), ("paper", 10**7)])
def test_small_deltas_and_schedules_to_reproduce_are_not_rescaled(name, numel):
    for prediction in (X0, EPSILON):
        assert torch.equal(make_schedule(name, numel, prediction).betas, linear_betas(*LINEAR[name]))


def test_warnings():
    assert schedule_warning("ddpm", 10_080) == ""
    assert schedule_warning("ddpm", 10**7) == ""
    for name, first in (("authors", 900), ("paper", 9)):
        _, alpha_bar = reference.linear_schedule(*LINEAR[name])
        signal = 10_080 * alpha_bar[first] / (1 - alpha_bar[first])
        text = schedule_warning(name, 10_080)
        assert f"schedule = '{name}' begins sampling where d·ᾱ/(1 − ᾱ) = {signal:.3g};" in text
        assert "'ddpm'" in text
    assert "= 175;" in schedule_warning("authors", 10_080)


def example(schedule, rows=12):
    """Clean, noise and steps from the first to the last, in float64."""
    draw = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, rows, 3, 5, generator=draw, dtype=torch.float64)
    return clean, noise, torch.linspace(0, schedule.steps - 1, rows).long()


@pytest.mark.parametrize("schedule", every_schedule())
def test_adding_noise_equals_the_textbook_row_by_row(schedule):
    clean, noise, t = example(schedule)
    noisy = add_noise(clean, noise, t, schedule.alpha_bar)
    for i, step in enumerate(t.tolist()):
        wanted = reference.q_sample(clean[i], float(schedule.alpha_bar[step]), noise[i])
        torch.testing.assert_close(noisy[i], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", every_schedule())
def test_variance_is_kept(schedule):
    # Clean and noise alike in size and without overlap: the squares of the two factors must add up to one.
    _, _, t = example(schedule)
    clean, noise = torch.zeros(2, 12, 2, dtype=torch.float64)
    clean[:, 0], noise[:, 1] = 1, 1
    noisy = add_noise(clean, noise, t, schedule.alpha_bar)
    torch.testing.assert_close(noisy.square().sum(1), torch.ones(12, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", every_schedule())
def test_round_trips(schedule):
    clean, noise, t = example(schedule)
    noisy = add_noise(clean, noise, t, schedule.alpha_bar)
    # Dividing by sqrt(ᾱ_T), 5e-4 where d is four million, costs digits.
    assert to_x0(clean, noisy, t, schedule.alpha_bar, X0) is clean
    some_signal = schedule.alpha_bar[t] > 0
    back = to_x0(noise, noisy, t, schedule.alpha_bar, EPSILON)
    torch.testing.assert_close(back[some_signal], clean[some_signal], rtol=1e-10, atol=1e-10)


def test_float32_stays_float32():
    schedule = make_schedule("ddpm", 16, X0)
    clean, noise, t = example(schedule)
    clean, noise = clean.float(), noise.float()
    noisy = add_noise(clean, noise, t, schedule.alpha_bar)
    assert noisy.dtype == torch.float32
    assert to_x0(noise, noisy, t, schedule.alpha_bar, EPSILON).dtype == torch.float32
