"""Samplers, step by step against diffusers and against the textbook; rows that do not depend on their batch."""

import functools

import pytest
import reference
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.generate import DeltaGenerator
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.sampler import DDIM, DDPM, Noise, sample
from stages.diffusion.scale import ScaleNetwork
from stages.diffusion.schedule import EPSILON, LEADING, TRAILING, X0, NoiseSchedule, linear_betas, make_schedule
from stages.foundation.seeds import generator

SHAPE = (3, 4)
DIFFUSERS_NAME = {X0: "sample", EPSILON: "epsilon"}
PLAIN = make_schedule("ddpm", 12, X0)
LINEAR = {"ddpm": (1e-4, 2e-2, 1000), "authors": (1e-6, 1e-2, 1000), "paper": (1e-4, 1e-2, 10)}


class Replayed:
    """Noise drawn beforehand, so that two samplers get the same; float64, so that they may be held to rounding."""

    def __init__(self, draws):
        self._draws = iter(draws)

    def draw(self):
        return next(self._draws)


def draws(count, rows=5):
    return torch.randn(count, rows, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network():
    """A fixed function of all numbers of the noisy delta, and of t."""
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 12**0.5

    def denoise(noisy, t):
        turn = torch.cos(t.double() / 300).view(-1, 1)
        return torch.tanh(noisy.flatten(1) @ mix * turn + 0.1).view(noisy.shape)

    return denoise


def sampled(denoise, noise, sampler, steps=10, prediction=X0, schedule=PLAIN):
    return sample(denoise, schedule, noise, prediction=prediction, sampler=sampler, sample_steps=steps)


def our_path(schedule, prediction, sampler, sample_steps, noise):
    """What the network is shown at every step, and the result."""
    denoise, seen = network(), []

    def watched(noisy, t):
        seen.append(noisy)
        return denoise(noisy, t)

    result = sampled(watched, Replayed(noise), sampler, sample_steps, prediction, schedule)
    return torch.stack([*seen, result])


def diffusers_path(scheduler, betas, sample_steps, noise):
    """The same path, by diffusers."""
    # Its tables in float64: rounded to float32 they alone would cost five digits.
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(*betas, dtype=torch.float64), dim=0)
    scheduler.set_timesteps(sample_steps)
    denoise, path = network(), [noise[0]]
    for t in scheduler.timesteps:
        output = denoise(path[-1], t.expand(len(noise[0])))
        path.append(scheduler.step(output, int(t), path[-1]).prev_sample)
    return torch.stack(path)


THEIRS = {
    DDIM: functools.partial(DDIMScheduler, set_alpha_to_one=True),
    DDPM: functools.partial(DDPMScheduler, variance_type="fixed_small"),
}


@pytest.mark.parametrize("prediction", [X0, EPSILON])
@pytest.mark.parametrize("spacing", [TRAILING, LEADING])
@pytest.mark.parametrize("sampler", [DDIM, DDPM])
@pytest.mark.parametrize(("name", "sample_steps"), [("ddpm", 10), ("ddpm", 50), ("authors", 10), ("paper", 10)])
def test_samplers_follow_diffusers(name, sample_steps, sampler, spacing, prediction, monkeypatch):
    betas, noise = LINEAR[name], draws(sample_steps + 1)
    named = {"prediction_type": DIFFUSERS_NAME[prediction], "clip_sample": False, "timestep_spacing": spacing}
    theirs, replayed = THEIRS[sampler](num_train_timesteps=betas[2], **named), Replayed(noise[1:])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: replayed.draw())
    ours = our_path(NoiseSchedule(linear_betas(*betas), spacing), prediction, sampler, sample_steps, noise)
    # From epsilon, ᾱ_T = 4e-5 makes numbers of the order of 100. DDPM's last step there, which ends at ᾱ = 1, adds noise of
    # 1e-10 where ours adds none.
    torch.testing.assert_close(ours, diffusers_path(theirs, betas, sample_steps, noise), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction", [X0, EPSILON])
@pytest.mark.parametrize("sampler", [DDIM, DDPM])
@pytest.mark.parametrize(("spacing", "sample_steps"), [(TRAILING, 1), (TRAILING, 7), (LEADING, 13), (TRAILING, 1000)])
def test_samplers_equal_the_textbook(spacing, sample_steps, sampler, prediction):
    betas, noise = LINEAR["ddpm"], draws(sample_steps + 1)
    _, alpha_bar = reference.linear_schedule(*betas)
    schedule = NoiseSchedule(linear_betas(*betas), spacing)
    ours = our_path(schedule, prediction, sampler, sample_steps, noise)
    visited, denoise, path = schedule.visited(sample_steps), network(), [noise[0]]
    for i, step in enumerate(visited):
        here, there = alpha_bar[step], alpha_bar[visited[i + 1]] if i + 1 < sample_steps else 1.0
        output = denoise(path[-1], torch.full((len(noise[0]),), step))
        epsilon = output if prediction == EPSILON else reference.epsilon_of(output, path[-1], here)
        if sampler == DDIM:
            path.append(reference.ddim_step(path[-1], epsilon, here, there))
        else:
            path.append(reference.ddpm_step(path[-1], epsilon, here, there, noise[i + 1]))
    # The textbook's form divides by sqrt(ᾱ), 6e-3 at the start: two digits are lost where ours works on x0 directly.
    torch.testing.assert_close(ours, torch.stack(path), rtol=1e-8, atol=1e-8)


def test_single_precision_follows_double():
    noise, denoise = draws(11), network()
    for sampler in (DDIM, DDPM):
        double = our_path(PLAIN, X0, sampler, 10, noise)
        single = sampled(lambda noisy, t: denoise(noisy.double(), t).float(), Replayed(noise.float()), sampler)
        assert single.dtype == torch.float32
        # Numbers of the order of one, ten steps of float32.
        torch.testing.assert_close(single.double(), double[-1], rtol=0, atol=1e-5)


def test_the_last_step_gives_the_predicted_clean_delta():
    wanted = torch.full(SHAPE, 0.3, dtype=torch.float64)
    for sampler in (DDIM, DDPM):
        found = sampled(lambda noisy, t: wanted.expand_as(noisy), Replayed(draws(11)), sampler)
        assert torch.equal(found, wanted.expand_as(found))


@pytest.mark.parametrize("prediction", [X0, EPSILON])
@pytest.mark.parametrize("sampler", [DDIM, DDPM])
def test_large_deltas_begin_from_pure_noise(sampler, prediction):
    """With ᾱ_T = 0 (x0) or 1/d (epsilon) nothing is divided by zero."""
    schedule = make_schedule("ddpm", 4_000_000, prediction)
    result = our_path(schedule, prediction, sampler, 10, draws(11))
    assert torch.isfinite(result).all()


def seeded(rows):
    return Noise([generator(7, "row", row) for row in rows], SHAPE, torch.device("cpu"))


def test_noise_is_one_generator_a_row():
    noise = seeded([3, 8])
    first, second = noise.draw(), noise.draw()
    for place, row in enumerate([3, 8]):
        alone = generator(7, "row", row)
        assert torch.equal(first[place], torch.randn(SHAPE, generator=alone))
        assert torch.equal(second[place], torch.randn(SHAPE, generator=alone))


@given(rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=6), sampler=st.sampled_from([DDIM, DDPM]), data=st.data())
@settings(max_examples=25)
def test_a_row_does_not_depend_on_its_batch(rows, sampler, data):
    """Bit for bit, with a network of single products and sums: those are the same in any batch."""

    def run(picked):
        return sampled(lambda noisy, t: 0.5 * noisy.clamp(-1, 1) + t.view(-1, 1, 1) / 1000, seeded(picked), sampler, 6)

    whole = run(rows)
    order = data.draw(st.permutations(range(len(rows))))
    part = order[: data.draw(st.integers(1, len(rows)))]
    assert torch.equal(run([rows[i] for i in part]), whole[list(part)])


@pytest.fixture(scope="module")
def delta_generator():
    """A generator of deltas whose networks answer to their inputs."""
    torch.manual_seed(0)
    denoiser = MlpDenoiser(SHAPE, ConditioningEncoder({"a": 4, "b": 3}, 16), 16, 2, X0)
    scale = ScaleNetwork({"a": 4, "b": 3}, 8)
    for network in (denoiser, scale):
        network.requires_grad_(False).eval()
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def make(sampler, strength=1.0):
        return DeltaGenerator(denoiser, PLAIN, scale, seed=5, sampler=sampler, sample_steps=4, strength=strength)

    return make


@pytest.fixture
def fields():
    return {"a": torch.randn(6, 4, generator=generator(0)), "b": torch.randn(6, 3, generator=generator(1))}


@pytest.mark.parametrize("sampler", [DDIM, DDPM])
def test_deltas_do_not_depend_on_batch_or_members(delta_generator, fields, sampler):
    make = delta_generator(sampler)
    whole, rho = make(fields, list(range(10, 16)), range(4))
    some = {name: value[[4, 1]] for name, value in fields.items()}
    part, part_rho = make(some, [14, 11], range(2, 4))
    # Products of batches of other sizes differ in the last bits.
    whole, part = whole.matrices(), part.matrices()
    torch.testing.assert_close(part, whole[[4, 1], 2:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(part_rho, rho[[4, 1]], rtol=1e-5, atol=1e-7)
    assert (whole[:, 0] - whole[:, 1]).flatten(1).norm(dim=1).min() > 0.01 * rho.min()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_deltas_have_the_predicted_length(delta_generator, fields, strength):
    deltas, rho = delta_generator(DDIM, strength)(fields, list(range(6)), range(3))
    deltas = deltas.matrices()
    assert deltas.shape == (6, 3, *SHAPE)
    assert rho.std() > 0
    torch.testing.assert_close(deltas.flatten(2).norm(dim=2), strength * rho.unsqueeze(1).expand(6, 3), rtol=1e-5, atol=0)
