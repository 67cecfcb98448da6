"""The conditioning: the encoding of steps and fields, and the statistics by which fields are normalised."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import WIDTHS, make_fields, random

from stages.diffusion.conditioning import ConditioningEncoder, NormalisedFields, positional_encoding
from stages.diffusion.encoders import PictureEncoder


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
    # A hundredth of the field's typical size divides.
    torch.testing.assert_close(normalise.scale_a, torch.full((4,), 0.005))
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


# Statistics


def fitted(values, parts, dtype=torch.float64, channels=None):
    normalise = NormalisedFields({"a": values[0].size}, {"a": channels} if channels else None).to(dtype)
    normalise.fit([{"a": torch.from_numpy(part)} for part in np.array_split(values, parts)])
    return normalise


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (1000.0, 0.01), (-3.0, 1e4)])
@pytest.mark.parametrize("parts", [2, 7, 300])
def test_statistics_taken_in_parts_are_those_of_all_rows(mean, deviation, parts):
    values = mean + deviation * np.random.default_rng(0).normal(size=(300, 2, 3))
    wanted = values.reshape(300, 6).mean(0), values.reshape(300, 6).std(0)
    for one in (fitted(values, 1), fitted(values, parts)):
        # float64; of a deviation a hundred-thousandth of the mean, numpy's own is no better.
        np.testing.assert_allclose(one.mean_a.numpy(), wanted[0], rtol=1e-10)
        np.testing.assert_allclose(one.scale_a.numpy(), wanted[1], rtol=1e-10)
    # What travels with the weights is these in float32.
    np.testing.assert_allclose(fitted(values, parts, torch.float32).scale_a.numpy(), wanted[1], rtol=1e-6)


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
