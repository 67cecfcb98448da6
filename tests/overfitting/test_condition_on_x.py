"""x itself as a field of the conditioning, on request."""

import numpy as np
import pytest
import torch
from folders import store

from stages.foundation.errors import SettingsError
from stages.tasks.conditioning import fields_of
from stages.tasks.protocol import Task

ON = ("--set", "collect.condition_on_x=true")


def fields(x, **captured):
    task = Task()
    task.condition_on_x = True
    return fields_of(task, torch.nn.Linear, x, None, captured)[0]


def test_the_store_and_the_networks_have_x(ocd, project):
    folder = project()
    summary = ocd.json(folder, "run", *ON)["stages"]["infer"]
    assert summary["inputs"] == 24
    arrays = store(folder)
    given = np.load(folder.root / "train.npz")["x"]
    assert np.array_equal(arrays["x"], given[arrays["sample_index"]])
    description = folder.read("train-diffusion/denoiser.json")
    assert description["fields"]["x"] == 4
    assert {"layer_input", "activation", "base_output"} < set(description["fields"])


def test_it_is_off_by_default(collected):
    assert "x" not in store(collected)


def test_parts_of_x_lie_side_by_side():
    x = {"camera": torch.randn(3, 2), "rays": torch.randn(3, 4, 2)}
    found = fields(x, layer_input=torch.zeros(3, 5))
    assert torch.equal(found["x"], torch.cat([x["camera"], x["rays"].flatten(1)], dim=1))
    assert found["layer_input"].shape == (3, 5)


def test_large_pictures_become_smaller_ones():
    x = torch.randn(2, 3, 64, 48)
    found = fields(x)["x"]
    assert found.shape == (2, 3, 36, 36)
    # Averages over squares keep the picture's mean, up to squares of unequal size.
    constant = torch.ones_like(x) * torch.arange(3.0).view(1, 3, 1, 1)
    torch.testing.assert_close(fields(constant)["x"].mean((2, 3)), constant.mean((2, 3)))
    small = torch.randn(2, 1, 28, 28)
    assert torch.equal(fields(small)["x"], small)


def test_integers_are_refused():
    with pytest.raises(SettingsError, match="x holds integers"):
        fields(torch.zeros(2, 3, dtype=torch.long))
