"""What evaluate and infer advise on scikit-learn's wine, diabetes and digits, as a new user would try them."""

import numpy as np
import pytest
import torch
from evaluating import evaluated, rows_of
from safetensors.torch import save_file
from sklearn.datasets import load_diabetes, load_wine
from torch import nn

from stages.lifecycle.context import GIVE_VALIDATION, PROBABLY_SEEN

QUICK = {
    "train-diffusion": {"max_steps": 300, "evaluate_steps": 100, "width": 64, "batch_size": 32},
    "train-scale": {"max_steps": 200, "evaluate_steps": 100, "width": 32},
    "infer": {"ensemble": 3, "sample_steps": 5},
}


def shares(x, y, *sizes):
    """Standardised inputs and labels, in a seeded order, in parts."""
    order = np.random.default_rng(0).permutation(len(x))
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)[order]
    ends = np.cumsum(sizes)
    return list(zip(np.split(x, ends)[:-1], np.split(y[order], ends)[:-1], strict=True))


@pytest.fixture(scope="module")
def wine(ocd, make_run):
    """Weights that have learned all of train by heart, imported: a tenth of train is held out all the same."""
    train, validation, test = shares(*load_wine(return_X_y=True), 100, 39, 39)
    folder = make_run({"task": {"weights": "wine.safetensors"}, **QUICK}, "wine", "")
    for name, (x, y) in {"train": train, "validation": validation, "test": test}.items():
        folder.save(f"{name}.npz", x, y)
    x, y = map(torch.from_numpy, train)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    save_file(model.state_dict(), folder.root / "wine.safetensors")
    ocd(folder, "run", "--quiet", "--until", "train-scale")
    return folder


def test_nothing_is_fitted_on_rows_that_imported_weights_have_seen(ocd, wine):
    results = evaluated(ocd, wine)
    assert results["warnings"] == [f"{PROBABLY_SEEN}: no strength and no temperature is fitted; {GIVE_VALIDATION}"]
    assert results["validation_samples"] == 0
    assert not any(row["validated"] for row in results["rows"])
    left_out = {entry["name"]: entry["reason"] for entry in results["left_out"]}
    for name in ("ocd validated strength", "temperature-scaled base"):
        assert left_out[name] == "the base was probably trained on the validation samples"
    assert results["outcome"] != "helps"
    # Neither a strength nor a row can be chosen, and an answer that is there stays.
    ocd(wine, "infer", "--quiet")
    before = wine.files()
    for words, said in (
        (("--strength", "auto"), "evaluate fitted no strength, for want of validation samples"),
        (("--row", "auto"), "evaluate had no validation samples to choose a row by"),
    ):
        shown = " ".join(ocd(wine, "infer", *words, code=3).stderr.split())
        assert said in shown
        assert "task.validation" in shown
    assert wine.files() == before


def test_a_validation_set_makes_up_for_it(ocd, wine, tmp_path):
    folder = wine.copy(tmp_path / "wine")
    given = ("--set", "task.validation=validation.npz", "--quiet")
    ocd(folder, "run", "--until", "train-scale", "--force", *given)
    results = evaluated(ocd, folder, *given[:2])
    assert not any(PROBABLY_SEEN in text for text in results["warnings"])
    assert results["validation_samples"] == 39
    rows = rows_of(results)
    # What validation favours does no harm that the test samples could show.
    low, _ = rows["ocd validated strength"]["metrics"]["cross_entropy"]["interval"]
    assert low <= 0
    found = ocd.json(folder, "infer", "--strength", "auto", *given[:2])
    shown = rows["ocd validated strength"]["metrics"]["cross_entropy"]["mean"]
    assert found["metrics"]["ocd ensemble"]["cross_entropy"] == pytest.approx(shown, rel=1e-4)


@pytest.fixture(scope="module")
def diabetes(ocd, make_run):
    """A regression, targets scaled, its base stopped after two epochs."""
    x, y = load_diabetes(return_X_y=True)
    train, test = shares(x, ((y - y.mean()) / y.std())[:, None].astype(np.float32), 353, 89)
    settings = {"task": {"loss": "mse"}, "train-base": {"epochs": 2, "lr": 3e-3}, "evaluate": {"longer_base": True}}
    folder = make_run(settings | QUICK, "diabetes", "")
    for name, (features, target) in {"train": train, "test": test}.items():
        folder.save(f"{name}.npz", features, target)
    ocd(folder, "run", "--quiet", "--until", "train-scale")
    return folder


def test_a_longer_base_is_asked_first(ocd, diabetes, tmp_path):
    """After two epochs of four OCD gains, and so do the others."""
    results = evaluated(ocd, diabetes)
    row = rows_of(results)["base trained for as long again"]["metrics"]["mse"]
    assert row["interval"][1] < 0
    assert results["outcome"] != "helps"
    assert results["rival"] == "base trained for as long again"
    command = "ocd train-base --set train-base.epochs=4 --set train-base.patience=0 --force"
    assert results["next"].startswith(f"train the base longer first: {command}")
    # Obeyed, it gives what the row promised.
    longer = diabetes.copy(tmp_path / "longer")
    ocd(longer, *command.split()[1:], "--quiet")
    found = longer.summary("train-base")["test"]["mse"]
    assert found == pytest.approx(rows_of(results)["base trained for as long again"]["metrics"]["mse"]["mean"], rel=1e-4)


def test_few_test_samples_decide_nothing(ocd, diabetes):
    results = evaluated(ocd, diabetes, "--set", "evaluate.samples=8", "--set", "evaluate.longer_base=false")
    assert results["outcome"] == "undecided", results["verdict"]
    assert results["verdict"].startswith("undecided: 8 test samples do not tell the ensemble from ")
    assert results["next"] == "evaluate on more test samples"
