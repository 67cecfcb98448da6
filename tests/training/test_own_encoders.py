"""Encoders from the command line: VGG-11 with weights that are given, and modules of the user's own."""

import numpy as np
import pytest
import torch
from folders import own_task, put, states
from networks import CONVOLUTIONS, torchvision_weights
from safetensors.torch import load_file, save_file
from torch import nn

from stages.training.encoders import OwnEncoder

ENCODERS = {"picture": "vgg11", "given": "myencoder:bend"}
SMALL_TRAINING = {"max_steps": 4, "evaluate_steps": 2, "batch_size": 4, "encoder_weights": "vgg.safetensors"}


@pytest.fixture(scope="module")
def collected_pictures(make_run):
    """A project through collect, with a file of weights and a module of encoders beside it; not to be changed."""
    settings = {
        "task": own_task("mytask:Seen"),
        "select-layer": {"draws": 0, "layer": "2.weight"},
        "train-diffusion": SMALL_TRAINING | {"encoders": ENCODERS},
    }
    folder = make_run(settings, "forms", "collect")
    save_file(torchvision_weights(), folder.root / "vgg.safetensors")
    return folder


@pytest.fixture
def pictures(collected_pictures, tmp_path):
    return collected_pictures.copy(tmp_path / "pictures")


@pytest.fixture(scope="module")
def trained_pictures(ocd, collected_pictures, tmp_path_factory):
    """The same through infer; not to be changed but for what is put back."""
    folder = collected_pictures.copy(tmp_path_factory.mktemp("trained") / "project")
    ocd(folder, "run", "--quiet", "--until", "infer")
    return folder


def test_a_run_with_encoders_predicts(trained_pictures):
    folder = trained_pictures
    description = folder.read("train-diffusion/denoiser.json")
    assert description["encoders"] == {
        "picture": {"kind": "vgg11", "shape": [3, 8, 8]},
        "given": {"kind": "myencoder:bend", "shape": [3]},
    }
    kept = load_file(folder.run / "train-diffusion" / "denoiser.safetensors")
    # VGG-11 as it was given, in the snapshot; the user's own encoder, trained.
    given = torchvision_weights()
    for place in CONVOLUTIONS:
        wanted = given[f"features.{place}.weight"]
        assert torch.equal(kept[f"encoder.encoders.of_picture.features.{place}.weight"], wanted)
    assert kept["encoder.encoders.of_given.module.0.weight"].shape == (7, 3)
    assert kept["encoder.encoders.of_seen.weight"].shape == (16, 6)
    found = folder.predictions()
    assert found["output"].shape == (30, 3)
    assert np.isfinite(found["output"]).all()
    assert (found["member_output"][:, 0] != found["member_output"][:, 1]).any()


def test_weights_are_needed_no_more_once_trained(ocd, trained_pictures):
    """They are in the snapshot: the same bytes again, though the first weights are others."""
    before = trained_pictures.predictions()["output"]
    ocd(trained_pictures, "infer", "--force", "--quiet")
    np.testing.assert_array_equal(trained_pictures.predictions()["output"], before)


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
    with code.open("a") as stream:
        stream.write("# a comment\n")
    assert states(ocd, folder)["train-diffusion"] == "done"


def refused(ocd, folder, *settings):
    """What train-diffusion says, writing nothing."""
    before = folder.files()
    found = ocd(folder, "train-diffusion", *put(*(f"train-diffusion.{one}" for one in settings)), code=2).stderr
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
    'encoders={given = "myencoder:narrow"}': "myencoder:narrow gave (2, 15) for 2 samples, expected (2, 16)",
    'encoders={given = "myencoder:nothing"}': "myencoder:nothing gave NoneType, expected an nn.Module",
    'encoders={given = "myencoder:fails"}': "myencoder:fails raised RuntimeError: mat1 and mat2 shapes cannot be multiplied",
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


@pytest.mark.parametrize("name", ["chooses", "Counts"])
def test_encoders_that_look_at_their_numbers_train(ocd, pictures, name):
    """Though memory is estimated without numbers; and one whose `channels` are no channels of the field."""
    setting = f'train-diffusion.encoders={{given = "myencoder:{name}"}}'
    ocd(pictures, "train-diffusion", "--quiet", *put(setting))
    assert states(ocd, pictures, setting)["train-diffusion"] == "done"


def test_running_out_of_memory_inside_an_encoder_is_told_as_such():
    """So that the training can take fewer at once."""

    class Full(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        OwnEncoder("mine:Full", Full(3, 4), (3,), 4)(torch.zeros(2, 3))
