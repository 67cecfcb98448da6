"""What the tests of collect share: the plain loop on the samples that a store has."""

import numpy as np
import reference
import torch
import torch.nn.functional as F
from folders import arrays
from safetensors.torch import load_file

NAMES = {"rho", "degenerate", "base_loss", "overfit_loss", "steps", "sample_index", "layer_input", "activation", "base_output"}


def cross_entropy(output, y):
    return F.cross_entropy(output.float(), y, reduction="none")


def base_of(folder):
    return load_file(folder.run / "train-base" / "base.safetensors")


def reference_of(folder, model, layer, found, **recipe):
    """The loop over copies of the model, for the samples that a store has, in its order."""
    x, y = (torch.from_numpy(part)[torch.from_numpy(found["sample_index"])] for part in arrays(40, 0))
    recipe = {"optimizer": "sgd", "lr": 0.05, "steps": 3, **recipe}
    return reference.overfit_loop(model, layer, cross_entropy, x, y, **recipe)


def assert_as_wanted(found, wanted, **close):
    for name in ("delta", "rho", "base_loss", "overfit_loss"):
        np.testing.assert_allclose(found[name], getattr(wanted, name).float().numpy(), err_msg=name, **close)
    np.testing.assert_array_equal(found["steps"], wanted.steps)
    np.testing.assert_array_equal(found["degenerate"], wanted.largest_gradient < 1e-6)
