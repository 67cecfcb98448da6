"""probe on real data: it sees headroom that the test split confirms, and finds nothing in rows that the base has fitted."""

import shlex

import numpy as np
import pytest
import torch
from folders import Folder, example, put
from safetensors.torch import save_file
from sklearn.datasets import load_wine
from torch import nn

from stages.lifecycle.context import GIVE_VALIDATION, PROBABLY_SEEN

MODEL = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
"""
CONFIG = """
[task]
model = "wine:net"
weights = "wine.safetensors"
loss = "cross_entropy"
train = "train.npz"
test = "test.npz"
"""


@pytest.fixture
def wine(tmp_path):
    """A network that has fitted all its training rows, given as weights without a validation set."""
    data = load_wine()
    x = ((data.data - data.data.mean(0)) / data.data.std(0)).astype(np.float32)
    order, folder = np.random.default_rng(0).permutation(len(x)), Folder(tmp_path)
    folder.save("train.npz", x[order[38:]], data.target[order[38:]])
    folder.save("test.npz", x[order[:38]], data.target[order[:38]])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    inputs, labels = torch.from_numpy(x[order[38:]]), torch.from_numpy(data.target[order[38:]])
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    save_file(model.state_dict(), tmp_path / "wine.safetensors")
    (tmp_path / "wine.py").write_text(MODEL)
    folder.config.write_text(CONFIG)
    return folder


def test_rows_that_imported_weights_have_fitted_show_nothing(ocd, wine):
    ocd(wine, "train-base", "--quiet")
    found = ocd.json(wine, "probe", "--quick")
    assert found["warnings"] == [f"{PROBABLY_SEEN}; {GIVE_VALIDATION}"]
    assert found["headroom"] == "unknown"
    assert found["verdict"].startswith("no finding: the base was probably trained on these samples")
    shown = " ".join(ocd(wine, "probe", "--quick", "--layer", "2.weight").stdout.split())
    assert shown.count(f"warning: {PROBABLY_SEEN}; {GIVE_VALIDATION}") == 1


def test_headroom_for_x_that_the_test_split_confirms(ocd, tmp_path):
    folder = example("digits", tmp_path)
    words = put("task.validation_fraction=0.3", "train-base.epochs=20")
    ocd(folder, "train-base", "--quiet", *words)
    found = ocd.json(folder, "probe", "--quick", "--layer", "fc1.weight", *words)
    assert found["headroom"] == "x"
    assert not any(PROBABLY_SEEN in text for text in found["warnings"])
    chosen = found["chosen"]["neighbours"]
    assert chosen["interval"][1] < 0
    words += put(*(word for word in shlex.split(found["next"])[2:] if word != "--set"))
    words += put(
        "train-diffusion.max_steps=20", "train-scale.max_steps=20", "evaluate.memorisation_samples=16", "infer.ensemble=1"
    )
    ocd(folder, "run", "--quiet", *words)
    rows = {row["name"]: row["metrics"]["cross_entropy"] for row in ocd.json(folder, "evaluate", *words)["rows"]}
    # Only these rows have strengths that are fitted by evaluate as well.
    gains = [rows[name]["difference"] for name in ("nearest neighbour in layer input", "nearest k blended in layer input")]
    assert min(gains) < 0
    assert chosen["interval"][0] < min(gains) < chosen["interval"][1]
