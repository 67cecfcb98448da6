"""What train-base says of a base that is weak, on the tables that scikit-learn brings along."""

import numpy as np
import pytest
import torch
from folders import make_folder, put
from safetensors.torch import save_file
from sklearn.datasets import load_diabetes, load_wine

from stages.lifecycle.context import GIVE_VALIDATION, PROBABLY_SEEN
from stages.tasks.data import split_rows

IMPROVING = "still improving: the last of 3 epochs was the best; raise train-base.epochs, training then goes on from there"


def real(place, loss, x, y, outputs):
    """A project on a table: every fifth row is for testing."""
    task = {"model_args": {"inputs": x.shape[1], "outputs": outputs}, "loss": loss}
    folder = make_folder(place / "project", {"task": task, "train-base": {"epochs": 3}}, code="real")
    testing = np.arange(len(x)) % 5 == 0
    for name, rows in (("train", ~testing), ("test", testing)):
        folder.save(f"{name}.npz", x[rows].astype(np.float32), y[rows])
    return folder


def diabetes(place, scale):
    x, y = load_diabetes(return_X_y=True)
    return real(place, "mse", x / x.std(0), scale(y[:, None]).astype(np.float32), 1)


def wine(place):
    x, y = load_wine(return_X_y=True)
    return real(place, "cross_entropy", (x - x.mean(0)) / x.std(0), y, 3)


@pytest.fixture(scope="module")
def raw(tmp_path_factory, ocd):
    """Raw targets, about 152 ± 77; not to be changed."""
    folder = diabetes(tmp_path_factory.mktemp("raw"), lambda y: y)
    ocd(folder, "train-base", "--quiet")
    return folder


@pytest.fixture(scope="module")
def tasted(tmp_path_factory, ocd):
    """A classifier of wines after three epochs; not to be changed."""
    folder = wine(tmp_path_factory.mktemp("wine"))
    ocd(folder, "train-base", "--quiet")
    return folder


def test_raw_targets(raw, ocd):
    with np.load(raw.root / "train.npz") as data:
        train, held_out = (data["y"][rows.numpy()] for rows in split_rows(len(data["y"]), 0.1, 1))
    best = float(np.square(held_out - train.mean()).mean())
    summary = ocd.json(raw, "train-base")
    base = summary["validation"]["mse"]
    assert 20_000 < base < 40_000
    assert 4_000 < best < 8_000
    worse = (
        f"the base is worse than a constant: mse {base:,.0f} on 35 validation samples, where one output for all of them has "
        f"{best:,.0f}; scale the targets to mean 0 and standard deviation 1: y has mean {train.mean():.3g} and standard "
        f"deviation {train.std():.3g}"
    )
    assert summary["warnings"] == [IMPROVING, worse]


def test_it_is_said_again_after_the_table(raw, ocd):
    lines = " ".join(ocd(raw, "train-base").stdout.split())
    assert "up to date" in lines
    assert f"┘ warning: {IMPROVING} warning: the base is worse than a constant: mse " in lines


def test_scaled_targets(tmp_path, ocd):
    folder = diabetes(tmp_path, lambda y: (y - y.mean()) / y.std())
    assert ocd.json(folder, "train-base")["warnings"] == [IMPROVING]


def test_a_larger_number_of_epochs_goes_on(tasted, tmp_path, ocd):
    assert ocd.json(tasted, "train-base")["warnings"] == [IMPROVING]
    folder, further = tasted.copy(tmp_path / "copy"), put("train-base.epochs=5")
    result = ocd(folder, "train-base", *further)
    assert "continues from step 24" in result.stderr
    assert folder.summary("train-base")["epochs"] == 5


def test_patience_may_end_it_too_early(raw, tmp_path, ocd):
    slow = put("train-base.epochs=20", "train-base.patience=2", "train-base.lr=1e-5")
    found = ocd.json(raw.copy(tmp_path / "copy"), "train-base", "--force", *slow)
    assert found["epochs"] == found["best_epoch"] == 3
    assert found["warnings"][0] == (
        "still improving, though by less than 1 % an epoch, when patience ended it: a larger train-base.lr, or "
        "train-base.patience=0, takes it further; both with --force"
    )
    assert [text.partition(":")[0] for text in found["warnings"][1:]] == ["the base is worse than a constant"]


def test_one_epoch(tasted, tmp_path, ocd):
    folder = tasted.copy(tmp_path / "copy").without("train-base")
    (said,) = ocd.json(folder, "train-base", *put("train-base.epochs=1"))["warnings"]
    assert said.startswith("still improving: the only epoch was the best; raise ")


def test_imported_weights(tasted, tmp_path, ocd):
    folder = tasted.copy(tmp_path / "copy").without("train-base")
    weights = {name: 5 * torch.randn(shape) for name, shape in {"0.weight": (16, 13), "0.bias": (16,), "2.weight": (3, 16),
               "2.bias": (3,)}.items()}  # fmt: skip
    save_file(weights, folder.root / "given.safetensors")
    given = put("task.weights=given.safetensors")
    seen, worse = ocd.json(folder, "train-base", *given)["warnings"]
    assert seen == f"{PROBABLY_SEEN}; {GIVE_VALIDATION}"
    assert worse.startswith("the base is worse than a constant: cross_entropy ")
    assert worse.endswith("; see whether these weights are this model's, and the data scaled as those they were trained on")
    (worse,) = ocd.json(folder, "train-base", "--force", *given, *put("task.validation=test.npz"))["warnings"]
    assert " on 36 validation samples, " in worse


def test_a_learning_rate_that_is_no_good(tasted, tmp_path, ocd):
    folder = tasted.copy(tmp_path / "copy").without("train-base")
    *_, worse = ocd.json(folder, "train-base", *put("train-base.lr=30"))["warnings"]
    assert worse.startswith("the base is worse than a constant: cross_entropy ")
    assert worse.endswith("; train longer, or try another learning rate")
