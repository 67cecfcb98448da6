"""Encoders of pictures and sounds, the normalisation before them, and both from the command line."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Folder, make_folder, states
from safetensors.torch import load_file, save_file
from test_networks import random
from torch import nn

from stages.diffusion.conditioning import ConditioningEncoder, NormalisedFields, _Moments
from stages.diffusion.delta_batch import DeltaBatch
from stages.diffusion.denoiser import unit
from stages.diffusion.denoising import denoising_errors, step_draws
from stages.diffusion.encoders import KINDS, PictureEncoder, SoundEncoder, Vgg11, make_encoders
from stages.diffusion.mlp import MlpDenoiser
from stages.diffusion.schedule import X0, make_schedule
from stages.foundation.errors import DataError, SettingsError
from stages.training.encoders import OwnEncoder
from stages.training.trainer import Trainer

# Of torchvision's vgg11: places of the convolutions, channels in and out.
CONVOLUTIONS = {
    0: (3, 64),
    3: (64, 128),
    6: (128, 256),
    8: (256, 256),
    11: (256, 512),
    13: (512, 512),
    16: (512, 512),
    18: (512, 512),
}


@pytest.fixture(scope="module")
def torchvision_weights():
    """As torchvision's `vgg11().state_dict()`, with a classifier of fewer numbers."""
    found = {}
    for place, (given, width) in CONVOLUTIONS.items():
        # Of a size that keeps the numbers' from layer to layer.
        found[f"features.{place}.weight"] = random(width, given, 3, 3, seed=place) * (2 / (9 * given)) ** 0.5
        found[f"features.{place}.bias"] = 0.1 * random(width, seed=100 + place)
    for place in (0, 3, 6):
        found |= {f"classifier.{place}.weight": random(4, 4), f"classifier.{place}.bias": random(4)}
    return found


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
    for place, (given, width) in CONVOLUTIONS.items():
        assert features[place].weight.shape == (width, given, 3, 3)
    assert features(torch.zeros(2, 3, 64, 96)).shape == (2, 512, 2, 3)


@torch.no_grad()
def test_vgg11_is_the_published_chain(torchvision_weights):
    """Simonyan & Zisserman's configuration A: 64 M 128 M 256 256 M 512 512 M 512 512 M."""
    encoder, values = PictureEncoder((3, 32, 64), 5, torchvision_weights), random(2, 3 * 32 * 64)
    hidden = values.view(2, 3, 32, 64)
    for place in CONVOLUTIONS:
        weight, bias = torchvision_weights[f"features.{place}.weight"], torchvision_weights[f"features.{place}.bias"]
        hidden = F.conv2d(hidden, weight, bias, padding=1).clamp_min(0)
        if place in (0, 3, 8, 13, 18):
            hidden = hidden.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
    wanted = F.linear(hidden.mean((2, 3)), encoder.leave.weight, encoder.leave.bias)
    # float32 through eight layers; their order of summation is the same library's.
    torch.testing.assert_close(encoder(values), wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std() > 0.01


def test_given_weights_stay_as_they_are_in_training(torchvision_weights):
    given = PictureEncoder((1, 4, 4), 8, torchvision_weights)
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
def test_other_weights_are_refused(torchvision_weights, change, named):
    kept = dict(torchvision_weights)
    change(kept)
    with pytest.raises(DataError) as raised:
        PictureEncoder((3, 8, 8), 4, kept)
    assert raised.value.message.startswith(f"the encoder's weights are not VGG-11's: {named}")
    assert raised.value.hint == "save torchvision's vgg11 as safetensors: keys features.0.weight, features.0.bias, …"


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


@pytest.mark.parametrize("shape", [(5,), (2, 8, 8), (4, 8, 8), (1, 3, 8, 8)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(SettingsError) as raised:
        PictureEncoder(shape, 4)
    assert raised.value.message == f"vgg11 encodes pictures of (H, W), (1, H, W) or (3, H, W), this field is {shape}"
    assert raised.value.hint == "use linear, or let the task's reduce() keep the field a picture"


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


@pytest.mark.parametrize("shape", [(512,), (2, 512), (1, 2, 600)])
def test_what_is_no_sound_is_refused(shape):
    with pytest.raises(SettingsError) as raised:
        SoundEncoder(shape, 4)
    wanted = f"spectrogram encodes sounds of (L,) or (channels, L) with L > 512, this field is {shape}"
    assert raised.value.message == wanted
    assert raised.value.hint == "use linear, or let the task's reduce() keep the field a sound"


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


# Normalisation


def fitted(values, parts, channels=None):
    normalise = NormalisedFields({"a": values[0].size}, {"a": channels} if channels else None)
    normalise.fit([{"a": torch.from_numpy(part)} for part in np.array_split(values, parts)])
    return normalise


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1000.0, 0.01), (-3.0, 1e4)])
@pytest.mark.parametrize("parts", [2, 7, 300])
def test_statistics_taken_in_parts_are_those_of_all_rows(mean, deviation, parts):
    values = mean + deviation * np.random.default_rng(0).normal(size=(300, 2, 3))
    at_once, by_parts = _Moments(6, None), _Moments(6, None)
    at_once.add(torch.from_numpy(values))
    for part in np.array_split(values, parts):
        by_parts.add(torch.from_numpy(part))
    wanted = values.reshape(300, 6).mean(0), values.reshape(300, 6).std(0), np.sqrt(np.square(values).mean())
    for one, other, number in zip(at_once.result(), by_parts.result(), wanted, strict=True):
        # float64; of a deviation a hundred-thousandth of the mean, numpy's own is no better.
        np.testing.assert_allclose(one.numpy(), number, rtol=1e-10)
        np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-10)
    # And what travels with the weights is these in float32.
    normalise = fitted(values, parts)
    np.testing.assert_allclose(normalise.mean_a.numpy(), wanted[0], rtol=1e-6)
    np.testing.assert_allclose(normalise.scale_a.numpy(), wanted[1], rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_pictures_and_sounds_are_normalised_by_channel(parts):
    draw = np.random.default_rng(0)
    # Each pixel with a mean of its own.
    values = draw.normal(size=(50, 3, 4, 5)) + 2 * draw.normal(size=(3, 4, 5))
    values = values * np.reshape([1.0, 10.0, 0.1], (3, 1, 1)) + np.reshape([5.0, 0.0, -1.0], (3, 1, 1))
    normalise = fitted(values, parts, channels=3)
    found = normalise({"a": torch.from_numpy(values)})["a"].view(50, 3, 20).numpy()
    for channel in range(3):
        one = values[:, channel]
        # Statistics are float32.
        np.testing.assert_allclose(found[:, channel].reshape(one.shape), (one - one.mean()) / one.std(), rtol=1e-4, atol=1e-5)


def test_an_encoder_with_channels_has_its_field_normalised_by_channel():
    encoder = ConditioningEncoder({"picture": 48, "plain": 4}, 4, {"picture": PictureEncoder((3, 4, 4), 4)})
    encoder.normalise.fit([{"picture": random(20, 3, 4, 4), "plain": random(20, 4)}])
    assert len(encoder.normalise.mean_picture.unique()) == 3
    assert len(encoder.normalise.mean_plain.unique()) == 4


# From the command line

TASK = """\
import torch
from torch import nn
from stages.foundation.seeds import generator
from stages.tasks.data import ArrayDataset
from stages.tasks.losses import CLASSIFICATION, cross_entropy
from stages.tasks.protocol import Task


class Seen(Task):
    kind = CLASSIFICATION

    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

    def points(self, name, count):
        draw = generator("encoders", name)
        x = torch.randn(count, 4, generator=draw)
        return ArrayDataset(x, (x[:, :3] + torch.randn(count, 3, generator=draw)).argmax(1))

    def train(self):
        return self.points("train", 40)

    def test(self):
        return self.points("test", 12)

    def loss(self, output, y):
        return cross_entropy(output, y)

    def conditioning(self, x, output, captured):
        side = torch.cat([x, -x], dim=1)
        picture = side[:, None, :, None] * side[:, None, None, :] * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
        return {"picture": picture, "given": output, "seen": captured["layer_input"]}
"""

OWN = """\
import torch
from torch import nn

HIDDEN = 7


def bend(shape, width):
    return nn.Sequential(nn.Linear(shape[0], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, width))


def raises(shape, width):
    raise ValueError(f"{shape} is not for me")


def narrow(shape, width):
    return nn.Linear(shape[0], width - 1)


def fails(shape, width):
    return nn.Linear(shape[0] + 1, width)


def nothing(shape, width):
    return None


class Chooses(nn.Linear):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else -x)


def chooses(shape, width):
    return Chooses(shape[0], width)


class Counts(nn.Module):
    def __init__(self, shape, width):
        super().__init__()
        self.channels, self.edges = 5, torch.linspace(-1, 1, 5).numpy()
        self.leave = nn.Linear(5, width)

    def forward(self, x):
        return self.leave(torch.stack([(x > float(edge)).float().mean(1) for edge in self.edges], dim=1))
"""

ENCODERS = {"picture": "vgg11", "given": "myencoder:bend"}
SMALL_TRAINING = {"max_steps": 4, "evaluate_steps": 2, "batch_size": 4, "encoder_weights": "vgg.safetensors"}


@pytest.fixture(scope="module")
def collected_pictures(ocd, tmp_path_factory, torchvision_weights):
    """A project through collect, with a file of weights and a module of encoders beside it; not to be changed."""
    unset = dict.fromkeys(("model", "loss", "train", "test"))
    settings = {
        "task": {"class": "mytask:Seen", **unset},
        "select-layer": {"draws": 0, "layer": "2.weight"},
        "train-diffusion": SMALL_TRAINING | {"encoders": ENCODERS},
    }
    folder = make_folder(tmp_path_factory.mktemp("pictures") / "project", settings)
    (folder.root / "mytask.py").write_text(TASK)
    (folder.root / "myencoder.py").write_text(OWN)
    save_file(torchvision_weights, folder.root / "vgg.safetensors")
    ocd(folder, "run", "--quiet", "--until", "collect")
    return folder


def copy_of(folder, place):
    shutil.copytree(folder.root, place)
    return Folder(place)


@pytest.fixture
def pictures(collected_pictures, tmp_path):
    return copy_of(collected_pictures, tmp_path / "pictures")


@pytest.fixture(scope="module")
def trained_pictures(ocd, collected_pictures, tmp_path_factory):
    """The same through infer; not to be changed but for what is put back."""
    folder = copy_of(collected_pictures, tmp_path_factory.mktemp("trained") / "project")
    ocd(folder, "run", "--quiet", "--until", "infer")
    return folder


def test_a_run_with_encoders_predicts(trained_pictures, torchvision_weights):
    folder = trained_pictures
    description = json.loads((folder.run / "train-diffusion" / "denoiser.json").read_text())
    assert description["encoders"] == {
        "picture": {"kind": "vgg11", "shape": [3, 8, 8]},
        "given": {"kind": "myencoder:bend", "shape": [3]},
    }
    kept = load_file(folder.run / "train-diffusion" / "denoiser.safetensors")
    # VGG-11 as it was given, in the snapshot; the user's own encoder, trained.
    for place in CONVOLUTIONS:
        wanted = torchvision_weights[f"features.{place}.weight"]
        assert torch.equal(kept[f"encoder.encoders.of_picture.features.{place}.weight"], wanted)
    assert kept["encoder.encoders.of_given.module.0.weight"].shape == (7, 3)
    assert kept["encoder.encoders.of_seen.weight"].shape == (16, 6)
    with np.load(folder.run / "infer" / "test" / "predictions.npz") as found:
        assert found["output"].shape == (12, 3)
        assert np.isfinite(found["output"]).all()
        assert (found["member_output"][:, 0] != found["member_output"][:, 1]).any()


def test_weights_are_needed_no_more_once_trained(ocd, trained_pictures, tmp_path):
    """They are in the snapshot: the same bytes again, though the first weights are others."""
    folder = trained_pictures
    with np.load(folder.run / "infer" / "test" / "predictions.npz") as found:
        before = found["output"]
    ocd(folder, "infer", "--force", "--quiet")
    with np.load(folder.run / "infer" / "test" / "predictions.npz") as found:
        np.testing.assert_array_equal(found["output"], before)


def test_other_weights_and_other_code_make_the_training_stale(ocd, trained_pictures):
    folder = trained_pictures
    assert states(ocd, folder)["train-diffusion"] == "done"
    weights, code = folder.root / "vgg.safetensors", folder.root / "myencoder.py"
    for path, change, name in (
        (weights, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "encoder weights"),
        (code, lambda data: data.replace(b"HIDDEN = 7", b"HIDDEN = 8"), "encoder code myencoder.py"),
    ):
        data = path.read_bytes()
        path.write_bytes(change(data))
        found = states(ocd, folder)
        assert found["collect"] == "done"
        assert {stage for stage, state in found.items() if state == "stale"} >= {"train-diffusion", "infer"}
        assert name in ocd(folder, "train-diffusion", code=3).stderr
        path.write_bytes(data)
        assert states(ocd, folder)["train-diffusion"] == "done"
    # A comment changes no result.
    code.write_text(OWN + "# a comment\n")
    assert states(ocd, folder)["train-diffusion"] == "done"
    code.write_text(OWN)


def refused(ocd, folder, *settings):
    """What train-diffusion says, writing nothing."""
    before = folder.files()
    words = [word for setting in settings for word in ("--set", f"train-diffusion.{setting}")]
    found = ocd(folder, "train-diffusion", *words, code=2).stderr
    assert folder.files() == before
    return " ".join(found.split())


SAYS = {
    'encoders={sight = "vgg11"}': "train-diffusion.encoders: the store has no field 'sight' it has picture, given, seen",
    'encoders={picture = "vgg9"}': (
        "train-diffusion.encoders.picture = 'vgg9': expected linear, vgg11, spectrogram, or a module of yours "
        'name one as "module:name", a callable (shape, width) -> nn.Module'
    ),
    'encoders={given = "vgg11"}': "vgg11 encodes pictures of (H, W), (1, H, W) or (3, H, W), this field is (3,)",
    'encoders={given = "spectrogram"}': "spectrogram encodes sounds of (L,) or (channels, L) with L > 512, this field is (3,)",
    'encoders={given = "myencoder:bent"}': "myencoder.py has no bent did you mean bend?",
    'encoders={given = "nowhere:bend"}': "train-diffusion.encoders: no module nowhere in",
    'encoders={given = "myencoder:raises"}': "myencoder:raises((3,), 16) raised ValueError: (3,) is not for me",
    "encoder_weights=nowhere.safetensors": "nowhere.safetensors is missing",
    "encoder_weights=myencoder.py": "myencoder.py is not a safetensors file save them with safetensors.torch.save_file",
}


@pytest.mark.parametrize("setting", SAYS)
def test_what_cannot_be_is_refused(ocd, pictures, setting):
    assert SAYS[setting] in refused(ocd, pictures, setting)


def test_weights_of_another_network_are_refused(ocd, pictures):
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, pictures.root / "other.safetensors")
    said = refused(ocd, pictures, "encoder_weights=other.safetensors")
    assert "the encoder's weights are not VGG-11's: 0.bias, 3.weight, 3.bias" in said
    (pictures.root / "other.safetensors").write_bytes(b"no tensors")
    assert "other.safetensors is damaged" in refused(ocd, pictures, "encoder_weights=other.safetensors")


OWN_SAYS = {
    "narrow": "myencoder:narrow gave (2, 15) for 2 samples, expected (2, 16)",
    "nothing": "myencoder:nothing gave NoneType, expected an nn.Module",
    "fails": "myencoder:fails raised RuntimeError: mat1 and mat2 shapes cannot be multiplied",
}


@pytest.mark.parametrize("name", OWN_SAYS)
def test_encoders_that_do_not_give_what_they_should_are_refused(ocd, pictures, name):
    assert OWN_SAYS[name] in refused(ocd, pictures, f'encoders={{given = "myencoder:{name}"}}')


@pytest.mark.parametrize("name", ["chooses", "Counts"])
def test_encoders_that_look_at_their_numbers_train(ocd, pictures, name):
    """Though memory is estimated without numbers; and one whose `channels` are no channels of the field."""
    setting = f'train-diffusion.encoders={{given = "myencoder:{name}"}}'
    ocd(pictures, "train-diffusion", "--quiet", "--set", setting)
    assert states(ocd, pictures, setting)["train-diffusion"] == "done"


def test_running_out_of_memory_inside_an_encoder_is_told_as_such():
    """So that the training can take fewer at once."""

    class Full(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        OwnEncoder("mine:Full", Full(3, 4), (3,), 4)(torch.zeros(2, 3))
