"""Encoders of pictures and sounds, the normalisation before them, and both from the command line."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import CONVOLUTIONS, random, torchvision_weights
from refusals import refusal
from torch import nn

from stages.diffusion.conditioning import ConditioningEncoder
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import unit
from stages.diffusion.denoising import denoising_errors, step_draws
from stages.diffusion.encoders import KINDS, PictureEncoder, SoundEncoder, Vgg11, make_encoders
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.schedule import X0, make_schedule
from stages.foundation.errors import DataError, SettingsError
from stages.training.trainer import Trainer


@pytest.fixture(scope="module")
def given():
    return torchvision_weights()


def seen_by(encoder, values):
    """What an encoder shows to VGG-11."""
    pictures = []
    handle = encoder.features.register_forward_pre_hook(lambda module, args: pictures.append(args[0]))
    with torch.no_grad():
        encoder(values)
    handle.remove()
    return pictures[0]


# VGG-11


def test_vgg11_has_its_layers_and_its_size():
    features = Vgg11()
    assert sum(p.numel() for p in features.parameters()) == 9_220_480
    assert list(features.state_dict()) == [f"{place}.{kind}" for place in CONVOLUTIONS for kind in ("weight", "bias")]
    for place, (channels, width) in CONVOLUTIONS.items():
        assert features[place].weight.shape == (width, channels, 3, 3)
    assert features(torch.zeros(2, 3, 64, 96)).shape == (2, 512, 2, 3)


@torch.no_grad()
def test_vgg11_is_the_published_chain(given):
    """Simonyan & Zisserman's configuration A: 64 M 128 M 256 256 M 512 512 M 512 512 M."""
    encoder, values = PictureEncoder((3, 32, 64), 5, given), random(2, 3 * 32 * 64)
    hidden = values.view(2, 3, 32, 64)
    for place in CONVOLUTIONS:
        weight, bias = given[f"features.{place}.weight"], given[f"features.{place}.bias"]
        hidden = F.conv2d(hidden, weight, bias, padding=1).clamp_min(0)
        if place in (0, 3, 8, 13, 18):
            hidden = hidden.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
    wanted = F.linear(hidden.mean((2, 3)), encoder.leave.weight, encoder.leave.bias)
    # float32 through eight layers; their order of summation is the same library's.
    torch.testing.assert_close(encoder(values), wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std() > 0.01


def test_given_weights_stay_as_they_are_in_training(given):
    given = PictureEncoder((1, 4, 4), 8, given)
    denoiser = MlpDenoiser((2, 3), ConditioningEncoder({"picture": 16, "plain": 2}, 8, {"picture": given}), 8, 1, X0)
    rows = DeltaBatch({"picture": random(4, 1, 4, 4), "plain": random(4, 2)}, torch.ones(4), unit(random(4, 2, 3)))
    denoiser.encoder.normalise.fit([rows.fields])
    schedule, before = make_schedule("ddpm", 6, X0), copy.deepcopy(denoiser.state_dict())

    def step_loss(step):
        yield denoising_errors(denoiser, schedule, rows, *step_draws(4, (2, 3), schedule.steps, step)).mean()

    trained = [p for p in denoiser.parameters() if p.requires_grad]
    trainer = Trainer(denoiser, torch.optim.AdamW(trained, lr=1e-2), step_loss)
    for _ in range(3):
        trainer.advance()
    for network in (trainer.network, trainer.averaged):
        for name, value in network.state_dict().items():
            fixed = ".features." in name or "normalise" in name
            assert torch.equal(value, before[name]) == fixed, name
    assert all(p.grad is None for p in given.features.parameters())


def test_without_weights_all_is_trained():
    torch.manual_seed(0)
    encoder = PictureEncoder((1, 4, 4), 8)
    encoder(random(2, 16)).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in encoder.parameters())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda kept: kept.pop("features.8.bias"), "8.bias"),
        (lambda kept: kept.update({"features.3.weight": torch.zeros(128, 64, 1, 1)}), "3.weight"),
        (lambda kept: kept.update({"features.21.weight": torch.zeros(3)}), "21.weight"),
        (lambda kept: [kept.pop(name) for name in list(kept) if name.startswith("features")], "0.weight, 0.bias, 3.weight"),
    ],
    ids=["missing", "shape", "too many", "none"],
)
def test_other_weights_are_refused(given, change, named):
    kept = dict(given)
    change(kept)
    message, hint = refusal(DataError, PictureEncoder, (3, 8, 8), 4, kept)
    assert message.startswith(f"the encoder's weights are not VGG-11's: {named}")
    assert hint == "save torchvision's vgg11 as safetensors: keys features.0.weight, features.0.bias, …"


# Pictures


@pytest.mark.parametrize("shape", [(40, 33), (1, 40, 33), (3, 40, 33)])
def test_pictures_are_seen_in_three_colours(shape):
    encoder, values = PictureEncoder(shape, 6), random(2, int(np.prod(shape)))
    assert encoder(values).shape == (2, 6)
    found, wanted = seen_by(encoder, values), values.view(2, -1, 40, 33)
    assert found.shape == (2, 3, 40, 33)
    for colour in range(3):
        assert torch.equal(found[:, colour], wanted[:, colour if len(shape) == 3 and shape[0] == 3 else 0])
    assert encoder.channels == (3 if shape[0] == 3 else 1)


def test_small_pictures_are_enlarged():
    """Bilinearly, to 32: each new pixel's centre lies among the old ones' centres."""
    picture = random(8, 40).double().numpy()
    found = seen_by(PictureEncoder((8, 40), 4).double(), torch.from_numpy(picture).reshape(1, -1))[0, 0].numpy()
    assert found.shape == (32, 40)
    centres = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    wanted = np.stack([np.interp(centres, np.arange(8), picture[:, column]) for column in range(40)], axis=1)
    # float64.
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


# Sounds


@pytest.mark.parametrize("channels", [1, 2])
def test_spectrograms_equal_numpy(channels):
    """log(1 + |FFT|) of 1,024 samples under a Hann window, every 256 samples, the sound mirrored at its ends."""
    length = 10_000
    sound = np.random.default_rng(0).normal(size=(2, channels, length))
    encoder = SoundEncoder((length,) if channels == 1 else (channels, length), 4).double()
    assert encoder.channels == channels
    found = seen_by(encoder, torch.from_numpy(sound).reshape(2, -1))
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    wanted = []
    for one in sound.reshape(-1, length):
        mirrored = np.concatenate([one[512:0:-1], one, one[-2:-514:-1]])
        frames = [mirrored[start : start + 1024] * window for start in range(0, length + 1, 256)]
        wanted.append(np.log1p(np.abs(np.fft.rfft(frames))).T)
    wanted = np.stack(wanted)
    assert wanted.shape == (2 * channels, 513, 40)
    for colour in range(3):
        # The window is float32's.
        np.testing.assert_allclose(found[:, colour].numpy(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_channels_of_a_sound_lie_side_by_side():
    encoder, values = SoundEncoder((2, 600), 4), random(3, 2, 600)
    features = []
    handle = encoder.features.register_forward_hook(lambda module, args, output: features.append(output.mean((2, 3))))
    found = encoder(values.flatten(1))
    # What each channel gives by itself.
    alone = [encoder.features(seen_by(encoder, values.flatten(1))[channel::2]).mean((2, 3)) for channel in range(2)]
    handle.remove()
    torch.testing.assert_close(found, encoder.leave(torch.cat(alone, dim=1)), rtol=1e-4, atol=1e-6)
    assert encoder.leave.in_features == 1024


PICTURES = "vgg11 encodes pictures of (H, W), (1, H, W) or (3, H, W)"
SOUNDS = "spectrogram encodes sounds of (L,) or (channels, L) with L > 512"


@pytest.mark.parametrize(
    ("kind", "shape", "what", "says"),
    [
        *((PictureEncoder, shape, "picture", PICTURES) for shape in [(5,), (2, 8, 8), (4, 8, 8), (1, 3, 8, 8)]),
        *((SoundEncoder, shape, "sound", SOUNDS) for shape in [(512,), (2, 512), (1, 2, 600)]),
    ],
)
def test_what_is_no_picture_or_no_sound_is_refused(kind, shape, what, says):
    hint = f"use linear, or let the task's reduce() keep the field a {what}"
    assert refusal(SettingsError, kind, shape, 4) == (f"{says}, this field is {shape}", hint)


def test_the_shortest_sound_passes():
    assert SoundEncoder((513,), 4)(random(2, 513)).shape == (2, 4)


def test_encoders_are_made_from_their_descriptions():
    made = make_encoders(
        {"a": {"kind": "vgg11", "shape": [8, 8]}, "b": {"kind": "mine:make", "shape": [5]}},
        6,
        modules={"mine:make": lambda shape, width: nn.Linear(shape[0], width)},
    )
    assert {name: type(encoder) for name, encoder in made.items()} == {"a": PictureEncoder, "b": nn.Linear}
    assert (made["b"].in_features, made["b"].out_features) == (5, 6)
    assert set(KINDS) == {"vgg11", "spectrogram"}
